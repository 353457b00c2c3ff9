//! Bugs put into the core on purpose: a simulation that does not find each of them proves nothing. They exist only with the
//! feature `planted-bugs`, which the tests' package alone switches on, and do nothing until one is planted.

/// One bug of those that this design could have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// A completed send does not make its connection look for the rest of what it owes.
    LostWakeUp,
    /// A completion moves the cursor twice.
    DoubleCompletion,
    /// The generation stands still: two uses of a slot share a key.
    SlotReuse,
    /// A segment of a log is released as soon as its first byte is confirmed.
    WindowEdge,
    /// A receive that the kernel ended is not armed again.
    ForgottenReceive,
    /// A paused backend is not read again when its client has caught up.
    ForgottenResume,
    /// A client slot that is free again does not arm the accept.
    ForgottenAccept,
    /// The timer of a stream that is over stays in the wheel.
    TimerLeft,
    /// A backend's connection that is let go goes on counting as one of its streams.
    PermitLost,
    /// The first event behind a retry is relayed twice.
    EventTwice,
    /// A pooled connection that died is used again, although part of its answer was relayed.
    RetryTooLate,
    /// The error of a stream that broke is not told.
    SilentEnd,
    /// Who comes back begins behind one event too many.
    ReplaySkips,
    /// Who comes back begins with an event that it has had.
    ReplayRepeats,
    /// A reader that was left behind is not told what it misses.
    GapUntold,
    /// The last of a stream's readers is not served.
    ReaderForgotten,
    /// What is cut off in a reader's range is sent from the stream's newest place.
    RestLost,
    /// What a client that is moved has sent does not go with it.
    MovedBytesLost,
    /// What a client that is moved has sent is read twice.
    MovedBytesTwice,
    /// A client for whom there was no room on its way is not looked at again.
    MoveForgotten,
    /// Who waits for room in a queue to another shard is not told that there is.
    RoomUntold,
    /// A shard is not told of the clients that were handed to it.
    BellForgotten,
    /// A part of a stream does not get to its mirrors.
    MirrorPieceLost,
    /// A mirror that was left behind goes on as if nothing were missing.
    MirrorHoleUnseen,
    /// A mirror is not told of the end of its stream.
    MirrorEndUntold,
    /// A mirror whose queue was full is not looked at again.
    MirrorForgotten,
    /// A mirror does not say how far it has come.
    MirrorNotRead,
    /// A mirror that goes does not say so.
    MirrorLeftUntold,
    /// A mirror's readers do not count when the last one at home leaves.
    MirrorCountsNot,
    /// The shard of a fork's path is not told that the fork is gone.
    GoneUntold,
    /// The shard of a fork's path hears of the fork after its creator has.
    ForkToldLate,
    /// A path is given up while the disk can still take that back.
    GoneTooEarly,
    /// A path stays reserved for a fork that was not made.
    ReservedForEver,
    /// Who is handed over to a mirror goes on behind what it has not had.
    HandedOverAhead,
    /// Who is handed back by a mirror begins anew.
    HandedBackAnew,
    /// Who is left behind by a mirror stays there.
    HandBackForgotten,
    /// A response is read on from one event too late.
    SequenceShifted,
    /// The end of a response that was cancelled is told as its backend told it, or not at all.
    CancelForgotten,
    /// The id of a response that is not kept any more leads nowhere.
    ResponseLeft,
}

impl Bug {
    /// Those that only readers of a mirror can see.
    pub const OF_MIRRORS: &'static [Bug] = &[
        Bug::MirrorPieceLost,
        Bug::MirrorHoleUnseen,
        Bug::MirrorEndUntold,
        Bug::MirrorForgotten,
        Bug::MirrorNotRead,
        Bug::MirrorLeftUntold,
        Bug::MirrorCountsNot,
    ];

    /// Those that only live readers of durable streams can see.
    pub const OF_HANDOVERS: &'static [Bug] =
        &[Bug::HandedOverAhead, Bug::HandedBackAnew, Bug::HandBackForgotten];

    /// Every bug that any relayed stream can show.
    pub const ALL: &'static [Bug] = &[
        Bug::LostWakeUp,
        Bug::DoubleCompletion,
        Bug::SlotReuse,
        Bug::WindowEdge,
        Bug::ForgottenReceive,
        Bug::ForgottenResume,
        Bug::ForgottenAccept,
        Bug::TimerLeft,
        Bug::PermitLost,
        Bug::EventTwice,
        Bug::RetryTooLate,
        Bug::SilentEnd,
    ];

    /// Those that only who reads a stream by its id can see.
    pub const OF_READERS: &'static [Bug] =
        &[Bug::ReplaySkips, Bug::ReplayRepeats, Bug::GapUntold, Bug::ReaderForgotten, Bug::RestLost];

    /// Those that only show between shards.
    pub const OF_MOVES: &'static [Bug] =
        &[Bug::MovedBytesLost, Bug::MovedBytesTwice, Bug::MoveForgotten, Bug::RoomUntold, Bug::BellForgotten];

    /// Those that only forks of streams on other shards can show.
    pub const OF_FORKS: &'static [Bug] = &[Bug::GoneUntold, Bug::ForkToldLate, Bug::ReservedForEver];

    /// Those that only responses in background can show.
    pub const OF_RESPONSES: &'static [Bug] = &[Bug::SequenceShifted, Bug::CancelForgotten, Bug::ResponseLeft];
}

#[cfg(feature = "planted-bugs")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug in everything that runs on this thread, or takes it out again.
#[cfg(feature = "planted-bugs")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this bug is planted on this thread.
#[cfg(feature = "planted-bugs")]
#[inline]
pub fn is_planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Never.
#[cfg(not(feature = "planted-bugs"))]
#[inline]
pub const fn is_planted(_: Bug) -> bool {
    false
}
