//! One thread, one glommio executor, one shard: placement, the loop, and where an idle shard sleeps.
//!
//! ```text
//!   ┌─► turn ─► commands, reports ─┬─ sleeps in the data ring (inside its next turn) ◄─┐ nothing outstanding in glommio
//!   │                              │                                                   │
//!   │                              └─ sleeps in glommio's reactor ◄────────────────────┘ background tasks, or Sleep::Reactor
//!   └─────────────────────────────────────┘   woken by the data ring's completion event, or by time
//! ```
//!
//! A sleep in the ring is one syscall and does not poll glommio at all; one in glommio is eight or so, and runs whatever
//! glommio has. So glommio is slept in exactly while a [`Background`] task is outstanding there.

use crate::core::{JournalOf, Shard, Sleepy};
use crate::disk::Disk;
pub use crate::disk::{JournalPlan, StreamJournalPlan};
use crate::io::{Errno, Io, Wait};
use crate::mesh::{Command, Neighbours, Report, ShardPort};
use crate::settings::{Settings, Sleep, TlsSet, UpstreamSet};
use crate::uring::{EventFd, Parcel, RingError, UringIo};
use futures_lite::future::{BoxedLocal, or, pending};
use glommio::io::BufferedFile;
use glommio::timer::Timer;
use glommio::{LocalExecutorBuilder, Placement, PoolPlacement};
use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Between two looks at glommio while the shard is busy and background tasks are outstanding, µs. With the time one turn
/// takes, it bounds the delay of a background task (10 ms are promised).
const GLOMMIO_LOOK_US: u64 = 1_000;
/// The same while a job of the journal is under way: it is three steps (write, sync, told), and publishers wait for it.
const GLOMMIO_LOOK_JOURNAL_US: u64 = 100;
/// A sleep in glommio that is long enough for its executor to run out of tasks and poll its reactor.
const GLOMMIO_LOOK_SLEEP: Duration = Duration::from_micros(20);
/// Entries of each of glommio's three rings: background work is a few files.
const GLOMMIO_RING_DEPTH: usize = 64;
/// How long the last report of a shard waits for room in the mailbox.
const LAST_REPORT_MS_MAX: u64 = 5_000;

/// Jobs of the journal that a shard that has left still waits for: what was written, its sync, the mark behind it.
const LAST_JOBS_MAX: usize = 16;
/// How long a shard that has left waits for its background tasks; then they are abandoned where they are.
const BACKGROUND_END_MS_MAX: u64 = 5_000;

/// What one shard is made from.
#[derive(Debug)]
pub struct ShardPlan {
    /// From 0; names the thread and the shard in metrics.
    pub index: usize,
    /// The CPU to be bound to; `None` leaves it to the scheduler.
    pub cpu: Option<usize>,
    /// Shared by all shards.
    pub settings: Arc<Settings>,
    /// The backends to begin with.
    pub upstreams: Arc<UpstreamSet>,
    /// Certificates, keys and roots to begin with.
    pub tls: Arc<TlsSet>,
    /// This shard's own listeners, made by [`crate::uring::listen`].
    pub listeners: Vec<TcpListener>,
    /// This shard's end of its mailbox.
    pub port: ShardPort,
    /// Its end of the mesh; none for an only shard.
    pub neighbours: Option<Neighbours<Parcel>>,
    /// Where its durable streams are written; `None`: they are held in memory only.
    pub journal: Option<JournalPlan>,
    /// Paths of this shard at which there are forks on others, with those.
    pub forks: Vec<(Box<str>, usize)>,
    /// Where its relayed streams are; `None`: they are held in memory only.
    pub stream_journal: Option<StreamJournalPlan>,
}

/// A shard could not be started, or is lost.
#[derive(Debug)]
pub enum HostError {
    /// No thread.
    Thread(std::io::Error),
    /// glommio refuses: no such CPU, too little locked memory, no descriptors.
    Executor(String),
    /// The data ring cannot be made.
    Ring(RingError),
    /// The data ring has become unusable.
    Turn(Errno),
    /// Sleeping in glommio failed.
    Sleep(String),
    /// A bug: an assertion failed in the shard.
    Panicked,
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostError::Thread(error) => write!(f, "no thread for a shard: {error} (ulimit -u, TasksMax=)"),
            HostError::Executor(error) => write!(
                f,
                "the shard's executor cannot be made ({error}): check that its CPU exists and that the locked-memory limit is at \
                 least 512 KiB (ulimit -l, LimitMEMLOCK=)"
            ),
            HostError::Ring(error) => error.fmt(f),
            HostError::Turn(errno) => write!(f, "the shard's ring failed: {errno}"),
            HostError::Sleep(error) => write!(f, "the shard cannot wait for its ring: {error}"),
            HostError::Panicked => write!(f, "a shard panicked; this is a bug in tokenring"),
        }
    }
}

impl std::error::Error for HostError {}

/// The thread of a shard.
#[derive(Debug)]
pub struct ShardThread {
    thread: std::thread::JoinHandle<Result<(), HostError>>,
}

impl ShardThread {
    /// Waits until the shard has left, as told by [`Command::Drain`] or [`Command::Stop`].
    ///
    /// # Errors
    /// Why it was lost; [`Report::Failed`] has said the same, unless it panicked.
    pub fn join(self) -> Result<(), HostError> {
        self.thread.join().unwrap_or(Err(HostError::Panicked))
    }

    /// True when [`ShardThread::join`] would not wait.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

/// Starts a shard on a thread of its own. That it accepts clients, or failed to, is told by its first report.
///
/// # Errors
/// When there is no thread.
pub fn spawn(plan: ShardPlan) -> Result<ShardThread, HostError> {
    spawn_with(plan, |_| {})
}

/// As [`spawn`]; `beside` runs on the shard's thread before its first turn and may start background tasks.
///
/// # Errors
/// When there is no thread.
pub fn spawn_with(
    mut plan: ShardPlan,
    beside: impl FnOnce(&Background) + Send + 'static,
) -> Result<ShardThread, HostError> {
    let thread = std::thread::Builder::new()
        .name(format!("shard-{}", plan.index))
        .spawn(move || {
            let result = host(&mut plan, beside);
            if let Err(error) = &result {
                report_last(&mut plan.port, Report::Failed(error.to_string()));
            }
            result
        })
        .map_err(HostError::Thread)?;
    Ok(ShardThread { thread })
}

/// Tasks on the shard's own thread beside the shard, for glommio's file I/O. While one is outstanding the shard sleeps in
/// glommio. A task must not hold the thread for longer than a turn may (10 ms).
#[derive(Clone, Debug, Default)]
pub struct Background {
    outstanding: Rc<Cell<usize>>,
}

impl Background {
    /// Runs it to its end: a started task cannot be cancelled (glommio leaks cancelled tasks). It starts when the shard next
    /// yields to glommio, within about a millisecond.
    pub fn start(&self, task: impl Future<Output = ()> + 'static) {
        /// Counts down also when the task panics.
        struct Outstanding(Rc<Cell<usize>>);
        impl Drop for Outstanding {
            fn drop(&mut self) {
                self.0.set(self.0.get() - 1);
            }
        }
        self.outstanding.set(self.outstanding.get() + 1);
        let outstanding = Outstanding(Rc::clone(&self.outstanding));
        glommio::spawn_local(async move {
            let _outstanding = outstanding;
            task.await;
        })
        .detach();
    }

    /// Tasks that have not ended.
    pub fn outstanding(&self) -> usize {
        self.outstanding.get()
    }
}

fn host(plan: &mut ShardPlan, beside: impl FnOnce(&Background)) -> Result<(), HostError> {
    let settings = &plan.settings;
    // io_memory: registered buffers of glommio's own, which nothing here uses, would cost 10 MB.
    // Pool placement: by default its thread would share the shard's CPU.
    let mut builder = LocalExecutorBuilder::new(plan.cpu.map_or(Placement::Unbound, Placement::Fixed))
        .io_memory(0)
        .ring_depth(GLOMMIO_RING_DEPTH)
        .preempt_timer(Duration::from_millis(u64::from(settings.preempt_ms.max(1))))
        .blocking_thread_pool_placement(PoolPlacement::Unbound(1));
    if settings.sleep == Sleep::Reactor && settings.spin_us > 0 {
        // In the other mode the data ring spins.
        builder = builder.spin_before_park(Duration::from_micros(u64::from(settings.spin_us)));
    }
    let executor = builder.make().map_err(|error| HostError::Executor(error.to_string()))?;
    executor.run(async {
        let background = Background::default();
        let io = UringIo::new(&plan.settings, std::mem::take(&mut plan.listeners), plan.port.bell())
            .map_err(HostError::Ring)?;
        let mut shard = Shard::new(io, plan.index, Arc::clone(&plan.settings), Arc::clone(&plan.upstreams));
        shard.command(Command::Tls(Arc::clone(&plan.tls)));
        if let Some(neighbours) = plan.neighbours.take() {
            shard.meet(neighbours);
        }
        let mut disks = Vec::new();
        if let Some(journal) = plan.journal.take() {
            shard.open_journal(journal.recovered, journal.salt);
            disks.push((JournalOf::Durable, Disk::new(journal.directory)));
        }
        shard.know_forks(std::mem::take(&mut plan.forks));
        if let Some(StreamJournalPlan { journal, reserved }) = plan.stream_journal.take() {
            shard.open_stream_journal(journal.recovered, journal.salt, reserved);
            disks.push((JournalOf::Relayed, Disk::new(journal.directory)));
        }
        beside(&background);
        serve(shard, &mut plan.port, plan.settings.sleep, &background, disks).await
    })
}

async fn serve(
    mut shard: Shard<UringIo>,
    port: &mut ShardPort,
    sleep: Sleep,
    background: &Background,
    disks: Vec<(JournalOf, Disk)>,
) -> Result<(), HostError> {
    let mut reactor: Option<Reactor> = None;
    let mut orphaned = false;
    let mut looked_us = 0;
    loop {
        let busy_elsewhere = background.outstanding() > 0;
        let elsewhere = busy_elsewhere || sleep == Sleep::Reactor;
        if elsewhere && reactor.is_none() {
            let event = shard.io_mut().completion_event().and_then(|event| Ok((event.try_clone()?, event)));
            reactor = Some(Reactor::new(event.map_err(|error| HostError::Sleep(error.to_string()))?));
        }
        shard.io_mut().sleep_elsewhere(elsewhere);

        for (of, disk) in &disks {
            if let Some(result) = disk.take_result() {
                shard.job_done(*of, result);
            }
        }
        shard.turn(Sleepy::Yes).map_err(HostError::Turn)?;
        if shard.take_woken() {
            while let Some(command) = port.receive() {
                shard.command(command);
            }
            if port.is_abandoned() && !orphaned {
                orphaned = true;
                log::error!("the control thread is gone: the shard stops");
                shard.command(Command::Stop);
            }
        }
        deliver(&mut shard, port);
        if shard.has_left() {
            break;
        }
        for (of, disk) in disks.iter().filter(|(_, disk)| !disk.is_busy()) {
            if let Some(job) = shard.next_job(*of) {
                disk.start(job, background);
                // It begins at the next look at glommio, which is to come at once.
                looked_us = 0;
            }
        }

        if let Some(reactor) = reactor.as_mut().filter(|_| elsewhere) {
            let now_us = shard.io_mut().now_us();
            let journal = disks.iter().any(|(_, disk)| disk.is_busy());
            let look_us = if journal { GLOMMIO_LOOK_JOURNAL_US } else { GLOMMIO_LOOK_US };
            match shard.io_mut().sleep_owed() {
                Some(wait) => {
                    reactor.sleep(wait, now_us, &disks).await?;
                    looked_us = now_us;
                }
                // Its rings would be refused as well, and glommio asks again at once, and panics when that went on for long.
                None if shard.io_mut().is_refused() => {}
                None if busy_elsewhere && now_us >= looked_us + look_us => {
                    Timer::new(GLOMMIO_LOOK_SLEEP).await;
                    looked_us = now_us;
                }
                None => {}
            }
        }
    }
    for (of, disk) in disks {
        finish_journal(&mut shard, of, disk, background).await;
    }
    // Its sockets are closed and its memory is given back before the tasks beside it are waited for.
    drop(shard);
    if let Some(reactor) = reactor {
        reactor.close().await;
    }
    for _ in 0..BACKGROUND_END_MS_MAX {
        if background.outstanding() == 0 {
            break;
        }
        Timer::new(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// Whatever is recorded and not yet on the disk goes there now, unless the disk does not take it.
async fn finish_journal(shard: &mut Shard<UringIo>, of: JournalOf, disk: Disk, background: &Background) {
    for _ in 0..LAST_JOBS_MAX {
        if !disk.is_busy() {
            let Some(job) = shard.last_job(of) else { break };
            disk.start(job, background);
        }
        disk.done().await;
        if let Some(result) = disk.take_result() {
            shard.last_job_done(of, result);
        }
    }
    disk.close().await;
}

/// Passes on what the shard reports; what finds no room is dropped and counted, except the news that it left.
fn deliver(shard: &mut Shard<UringIo>, port: &mut ShardPort) {
    while let Some(report) = shard.next_report() {
        if let Report::Left { .. } = report {
            report_last(port, report);
        } else if port.report(report).is_err() {
            shard.report_dropped();
        }
    }
    port.flush();
}

/// Reports what the control thread waits for; waits for room, since there is nothing else to do any more.
fn report_last(port: &mut ShardPort, mut report: Report) {
    for _ in 0..LAST_REPORT_MS_MAX {
        let Err(back) = port.report(report) else { break };
        report = back;
        port.flush();
        if port.is_abandoned() {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    port.flush();
}

/// Sleeps in glommio until the data ring's completion event rings.
struct Reactor {
    event: Rc<BufferedFile>,
    bell: EventFd,
    /// The read in flight: kept over turns that end by time, since a dropped one would take a ring of the bell with it.
    read: Option<BoxedLocal<Result<(), HostError>>>,
}

impl Reactor {
    fn new((event, bell): (EventFd, EventFd)) -> Self {
        Reactor { event: Rc::new(event.into_file()), bell, read: None }
    }

    /// Until the bell, the time, or the end of a job of the disk's, whichever is first. A bell that has rung before ends it at
    /// once.
    async fn sleep(&mut self, wait: Wait, now_us: u64, disks: &[(JournalOf, Disk)]) -> Result<(), HostError> {
        let event = &self.event;
        let read = self.read.get_or_insert_with(|| {
            let event = Rc::clone(event);
            Box::pin(async move {
                let result = event.read_at(0, size_of::<u64>()).await;
                result.map(|_| ()).map_err(|error| HostError::Sleep(error.to_string()))
            })
        });
        let heard = async { Some(read.await) };
        let done = async {
            let mut busy = disks.iter().map(|(_, disk)| disk).filter(|disk| disk.is_busy());
            match (busy.next(), busy.next()) {
                (Some(one), Some(other)) => or(one.done(), other.done()).await,
                (Some(one), None) => one.done().await,
                (None, _) => pending().await,
            }
            None
        };
        let heard = or(heard, done);
        let result = match wait {
            Wait::Not => return Ok(()),
            Wait::Forever => heard.await,
            Wait::Until(until_us) => {
                let timer = Timer::new(Duration::from_micros(until_us.saturating_sub(now_us)));
                or(heard, async {
                    timer.await;
                    None
                })
                .await
            }
        };
        match result {
            Some(result) => {
                self.read = None;
                result
            }
            None => Ok(()),
        }
    }

    /// Ends the read in flight and closes the event.
    async fn close(mut self) {
        if let Some(read) = self.read.take() {
            self.bell.ring();
            if let Err(error) = read.await {
                log::warn!("{error}");
            }
        }
        if let Some(event) = Rc::into_inner(self.event)
            && let Err(error) = event.close().await
        {
            log::warn!("closing the completion event: {error}");
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tests measure time from outside")]
mod tests {
    use super::*;
    use crate::mesh::{ControlPort, mailbox, neighbours};
    use crate::uring::listen;
    use crate::uring::tests::settings;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};
    use std::sync::mpsc;
    use std::time::Instant;

    /// Shards that share their clients; only the first has a listener.
    fn neighbourhood(shards: usize, settings: &Settings) -> (SocketAddr, Vec<(ShardThread, ControlPort)>) {
        let listener = listen("127.0.0.1:0".parse().unwrap(), 1024, settings.notsent_lowat_bytes).unwrap();
        let address = listener.local_addr().unwrap();
        let (controls, ports): (Vec<_>, Vec<_>) = (0..shards).map(|_| mailbox().unwrap()).unzip();
        let mesh = neighbours(&ports);
        let mut listeners = vec![listener];
        let threads = ports.into_iter().zip(mesh).enumerate().map(|(index, (port, neighbours))| {
            let plan = ShardPlan {
                index,
                cpu: None,
                settings: Arc::new(settings.clone()),
                upstreams: Arc::default(),
                tls: Arc::default(),
                listeners: std::mem::take(&mut listeners),
                port,
                neighbours: Some(neighbours),
                journal: None,
                forks: Vec::new(),
                stream_journal: None,
            };
            spawn(plan).unwrap()
        });
        let mut hosted: Vec<_> = threads.zip(controls).collect();
        for (_, control) in &mut hosted {
            assert!(matches!(report(control), Report::Started));
        }
        (address, hosted)
    }

    /// The next report, waited for as the control thread does.
    fn report(control: &mut ControlPort) -> Report {
        for _ in 0..300 {
            control.clear();
            if let Some(report) = control.receive() {
                return report;
            }
            control.wait(100);
        }
        panic!("no report within 30 s");
    }

    fn snapshot(control: &mut ControlPort) -> Box<crate::stats::Snapshot> {
        control.send(Command::Snapshot { ticket: 1 }).unwrap();
        loop {
            if let Report::Snapshot { snapshot, .. } = report(control) {
                return snapshot;
            }
        }
    }

    /// Clients of each shard, once there are so many in all and none is on its way. The shards answer one after another,
    /// and a client that moves meanwhile is seen twice or not at all: so only what two rounds agree on is believed.
    fn spread(hosted: &mut [(ShardThread, ControlPort)], clients: usize) -> Vec<usize> {
        let mut before = Vec::new();
        for _ in 0..2_000 {
            let mut loads = Vec::with_capacity(hosted.len());
            let (mut away, mut taken) = (0, 0);
            for (_, control) in &mut *hosted {
                let snapshot = snapshot(control);
                loads.push(snapshot.connections);
                away += snapshot.stats.counters.handed_away;
                taken += snapshot.stats.counters.handed_in;
            }
            if loads.iter().sum::<usize>() == clients && away == taken && loads == before {
                return loads;
            }
            before = loads;
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("there are not {clients} clients: {before:?}");
    }

    #[test]
    fn shards_share_the_clients_that_one_of_them_accepts() {
        for sleep in [Sleep::Ring, Sleep::Reactor] {
            let (address, mut hosted) = neighbourhood(3, &with(sleep));
            let clients: Vec<_> = (0..150).map(|_| TcpStream::connect(address).unwrap()).collect();
            let loads = spread(&mut hosted, 150);
            // A shard that loses its CPU between taking clients and telling so is handed some too many: room for that.
            assert!(loads.iter().all(|load| (30..=70).contains(load)), "{loads:?}");
            // Served where they were handed to.
            for mut client in &clients {
                client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                client.write_all(REQUEST).unwrap();
            }
            for mut client in &clients {
                let mut answer = String::new();
                client.read_to_string(&mut answer).unwrap();
                assert_answer(&answer);
            }
            drop(clients);
            spread(&mut hosted, 0);
            let mut totals = [0; 4];
            for (_, control) in &mut hosted {
                let counters = snapshot(control).stats.counters;
                assert_eq!(counters.accepts + counters.handed_in, counters.handed_away + counters.closes);
                let more = [counters.accepts, counters.handed_away, counters.handed_in, counters.closes];
                totals.iter_mut().zip(more).for_each(|(total, more)| *total += more);
            }
            assert!(totals[0] == 150 && totals[1] == totals[2] && totals[3] == 150, "{totals:?}");
            for (_, control) in &mut hosted {
                control.send(Command::Drain { deadline_ms: 5_000 }).unwrap();
            }
            for (thread, mut control) in hosted {
                assert!(matches!(report(&mut control), Report::Left { forced: 0 }));
                thread.join().unwrap();
            }
        }
    }

    #[test]
    fn a_shard_that_has_left_is_handed_nothing() {
        let (address, mut hosted) = neighbourhood(2, &with(Sleep::Ring));
        let (leaver, mut control) = hosted.pop().unwrap();
        control.send(Command::Stop).unwrap();
        assert!(matches!(report(&mut control), Report::Left { .. }));
        leaver.join().unwrap();
        let clients: Vec<_> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
        assert_eq!(spread(&mut hosted, 20), [20]);
        drop(clients);
        let (thread, mut control) = hosted.pop().unwrap();
        // Its neighbour is gone, and so need not be waited for.
        control.send(Command::Drain { deadline_ms: 60_000 }).unwrap();
        assert!(matches!(report(&mut control), Report::Left { forced: 0 }));
        thread.join().unwrap();
    }

    struct Hosted {
        thread: ShardThread,
        control: ControlPort,
        address: SocketAddr,
    }

    impl Hosted {
        fn new(settings: Settings, beside: impl FnOnce(&Background) + Send + 'static) -> Self {
            let (control, port) = mailbox().unwrap();
            let listener = listen("127.0.0.1:0".parse().unwrap(), 128, settings.notsent_lowat_bytes).unwrap();
            let address = listener.local_addr().unwrap();
            let plan = ShardPlan {
                index: 0,
                cpu: Some(0),
                settings: Arc::new(settings),
                upstreams: Arc::default(),
                tls: Arc::default(),
                listeners: vec![listener],
                port,
                neighbours: None,
                journal: None,
                forks: Vec::new(),
                stream_journal: None,
            };
            let mut hosted = Hosted { thread: spawn_with(plan, beside).unwrap(), control, address };
            assert!(matches!(hosted.report(), Report::Started));
            hosted
        }

        fn report(&mut self) -> Report {
            report(&mut self.control)
        }

        /// An answer of the demo model.
        fn request(&self, request: &[u8]) -> String {
            let mut client = TcpStream::connect(self.address).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            client.write_all(request).unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            answer
        }

        fn stop(mut self) {
            self.control.send(Command::Stop).unwrap();
            assert!(matches!(self.report(), Report::Left { .. }));
            self.thread.join().unwrap();
        }
    }

    const REQUEST: &[u8] =
        b"POST /v1/chat/completions?tokens_per_s=200&first_token_ms=5&tokens=20 HTTP/1.1\r\n\
        Host: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 57\r\n\r\n\
        {\"model\":\"demo\",\"stream\":true,\"messages\":[              ]}";

    /// Keeps a shard from ever sleeping while it is answered.
    const FLOOD: &[u8] =
        b"POST /v1/chat/completions?tokens_per_s=100000&first_token_ms=0&tokens=50000 HTTP/1.1\r\n\
        Host: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 57\r\n\r\n\
        {\"model\":\"demo\",\"stream\":true,\"messages\":[              ]}";

    fn with(sleep: Sleep) -> Settings {
        Settings { sleep, ..settings() }
    }

    fn assert_answer(answer: &str) {
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("0\r\n\r\n"), "{answer}");
    }

    #[test]
    fn a_hosted_shard_serves_reports_and_leaves_wherever_it_sleeps() {
        for sleep in [Sleep::Ring, Sleep::Reactor] {
            for spin_us in [0, 200] {
                let mut hosted = Hosted::new(Settings { spin_us, ..with(sleep) }, |_| {});
                for _ in 0..3 {
                    assert_answer(&hosted.request(REQUEST));
                }
                hosted.control.send(Command::Snapshot { ticket: 7 }).unwrap();
                let Report::Snapshot { ticket: 7, snapshot } = hosted.report() else {
                    panic!("the snapshot")
                };
                assert_eq!(snapshot.stats.counters.accepts, 3);
                hosted.stop();
            }
        }
    }

    #[test]
    fn a_sleeping_shard_answers_the_control_thread_at_once() {
        for sleep in [Sleep::Ring, Sleep::Reactor] {
            let mut hosted = Hosted::new(with(sleep), |_| {});
            let mut round_trips = Vec::new();
            for expected in 0..200 {
                std::thread::sleep(Duration::from_millis(1));
                let asked = Instant::now();
                hosted.control.send(Command::Snapshot { ticket: expected }).unwrap();
                assert!(matches!(hosted.report(), Report::Snapshot { ticket, .. } if ticket == expected));
                round_trips.push(asked.elapsed());
            }
            round_trips.sort();
            println!("{sleep:?}: half of the round trips within {:?}", round_trips[100]);
            assert!(round_trips[100] < Duration::from_millis(5), "{round_trips:?}");
            hosted.stop();
        }
    }

    #[test]
    fn a_drained_shard_finishes_its_streams_first() {
        for sleep in [Sleep::Ring, Sleep::Reactor] {
            let mut hosted = Hosted::new(with(sleep), |_| {});
            let mut client = TcpStream::connect(hosted.address).unwrap();
            client.write_all(REQUEST).unwrap();
            client.read_exact(&mut [0; 64]).unwrap();
            hosted.control.send(Command::Drain { deadline_ms: 10_000 }).unwrap();
            let mut rest = String::new();
            client.read_to_string(&mut rest).unwrap();
            assert!(rest.ends_with("0\r\n\r\n"), "{rest}");
            assert!(matches!(hosted.report(), Report::Left { forced: 0 }));
            hosted.thread.join().unwrap();
        }
    }

    #[test]
    fn a_shard_whose_control_thread_is_gone_stops() {
        let Hosted { thread, control, .. } = Hosted::new(with(Sleep::Ring), |_| {});
        drop(control);
        thread.join().unwrap();
    }

    #[test]
    fn a_shard_that_cannot_be_made_says_why() {
        let (mut control, port) = mailbox().unwrap();
        let plan = ShardPlan {
            index: 0,
            cpu: Some(100_000),
            settings: Arc::new(settings()),
            upstreams: Arc::default(),
            tls: Arc::default(),
            listeners: Vec::new(),
            port,
            neighbours: None,
            journal: None,
            forks: Vec::new(),
            stream_journal: None,
        };
        let thread = spawn(plan).unwrap();
        assert!(control.wait(5_000));
        assert!(matches!(control.receive(), Some(Report::Failed(why)) if why.contains("CPU")));
        assert!(matches!(thread.join(), Err(HostError::Executor(_))));
    }

    /// How often the thread went to sleep so far.
    fn sleeps_of_thread(name: &str) -> u64 {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let status = tasks
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok())
            .find(|status| status.lines().next() == Some(&format!("Name:\t{name}")))
            .unwrap();
        let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).unwrap();
        line.split_whitespace().last().unwrap().parse().unwrap()
    }

    #[test]
    fn an_idle_shard_is_not_woken_by_anything() {
        for (index, sleep) in [(70, Sleep::Ring), (71, Sleep::Reactor)] {
            let (mut control, port) = mailbox().unwrap();
            let listener = listen("127.0.0.1:0".parse().unwrap(), 128, 0).unwrap();
            let plan = ShardPlan {
                index,
                cpu: Some(0),
                settings: Arc::new(with(sleep)),
                upstreams: Arc::default(),
                tls: Arc::default(),
                listeners: vec![listener],
                port,
                neighbours: None,
                journal: None,
                forks: Vec::new(),
                stream_journal: None,
            };
            let thread = spawn(plan).unwrap();
            assert!(control.wait(5_000));
            std::thread::sleep(Duration::from_millis(50));
            let before = sleeps_of_thread(&format!("shard-{index}"));
            std::thread::sleep(Duration::from_millis(500));
            let woken = sleeps_of_thread(&format!("shard-{index}")) - before;
            assert!(woken <= 1, "{sleep:?}: woken {woken} times in 0.5 s of idleness");
            control.send(Command::Stop).unwrap();
            thread.join().unwrap();
        }
    }

    /// A background task that asks glommio for many short sleeps and file reads, and tells how late each came.
    fn late_by(background: &Background, lateness: mpsc::Sender<Duration>) {
        background.start(async move {
            let file = BufferedFile::open("/proc/self/exe").await.unwrap();
            for _ in 0..60 {
                let asked = Instant::now();
                Timer::new(Duration::from_millis(3)).await;
                assert_eq!(file.read_at(0, 4).await.unwrap().len(), 4);
                lateness.send(asked.elapsed().saturating_sub(Duration::from_millis(3))).unwrap();
            }
            file.close().await.unwrap();
        });
    }

    #[test]
    fn a_background_task_is_not_delayed_by_an_idle_or_a_busy_shard() {
        for sleep in [Sleep::Ring, Sleep::Reactor] {
            for busy in [false, true] {
                let (sender, lateness) = mpsc::channel();
                let hosted = Hosted::new(with(sleep), move |background| late_by(background, sender));
                let mut late = Vec::new();
                while late.len() < 60 {
                    if busy {
                        assert_answer(&hosted.request(FLOOD));
                    }
                    late.push(lateness.recv_timeout(Duration::from_secs(5)).unwrap());
                    late.extend(lateness.try_iter());
                }
                late.sort();
                assert_eq!(late.len(), 60);
                println!("{sleep:?}, busy {busy}: half within {:?}, all within {:?}", late[30], late[59]);
                // The machine may be busy with others; half of them may not.
                assert!(late[late.len() / 2] < Duration::from_millis(10), "{late:?}");
                hosted.stop();
            }
        }
    }
}
