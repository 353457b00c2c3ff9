//! Every bound of the data path, by name, with its reason. Settable ones are defaults that a flag overrides; relations
//! between them are asserted at compile time.

/// Bytes of a request or response head, request line and blank line included. Browsers' cookies need 8 KiB; more is abuse.
pub const HEAD_BYTES_MAX: usize = 32 * 1024;
/// Header fields of one head. Real clients send fewer than 40.
pub const HEADERS_MAX: usize = 100;
/// Bytes of a request target. RFC 9112 section 3 recommends that 8000 octets be supported.
pub const TARGET_BYTES_MAX: usize = 8 * 1024;
/// Bytes of one chunk-size line, extensions included (RFC 9112 section 7.1.1 asks for a limit on extensions).
pub const CHUNK_LINE_BYTES_MAX: usize = 256;
/// Bytes of the trailer section of one chunked body.
pub const TRAILER_BYTES_MAX: usize = 8 * 1024;
/// Bytes of one request body: base64 images in chat requests reach tens of megabytes.
pub const BODY_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Bytes of a request body in which model, stream and stream options are looked for; `stream` may follow a long `messages`.
pub const FACTS_PREFIX_BYTES_MAX: usize = 1024 * 1024;
/// Bytes of a request for a response in background that are held back until it is known whether it streams.
pub const BACKGROUND_HELD_BYTES_MAX: usize = FACTS_PREFIX_BYTES_MAX;
/// Bytes of one SSE event from a backend; images arrive as single events of some megabytes.
pub const EVENT_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Interim (1xx) responses accepted from a backend before its final head; each costs it nothing to send.
pub const INTERIM_RESPONSES_MAX: u32 = 8;

/// Bytes of the first segment of an event log. Segments have this size times a power of two.
pub const LOG_SEGMENT_FIRST_BYTES: usize = 512;
/// Bytes of segments of each size that a shard keeps for later when nobody holds them.
pub const LOG_SPARE_BYTES_MAX: usize = 256 * 1024;
/// Bytes of the largest segment whose content is copied to a log's history once it is delivered; of larger ones, the memory
/// itself becomes history.
pub const LOG_SETTLED_BYTES_MAX: usize = 4 * 1024;
/// Bytes to which segments grow, doubling: the most that one send lends to the kernel.
pub const LOG_SEGMENT_BYTES_MAX: usize = 64 * 1024;

/// Lag (bytes appended but not confirmed by completions) above which the producer's receive is paused.
pub const LAG_HIGH_BYTES: u64 = 64 * 1024;
/// Lag below which the producer's receive is resumed.
pub const LAG_LOW_BYTES: u64 = 16 * 1024;

/// Bytes of one TLS record: a head of 5, 2^14 of content, and 2048 that TLS 1.2 allows for its cipher (RFC 5246 section 6.2.3).
pub const TLS_RECORD_BYTES_MAX: usize = 5 + 16 * 1024 + 2048;
/// Bytes of a handshake kept until its message is complete. A message has at most 2^16 of them where rustls takes it, in records.
pub const TLS_HANDSHAKE_BYTES_MAX: usize = 64 * 1024 + 2 * TLS_RECORD_BYTES_MAX;
/// Bytes by which encryption makes a record longer, at most: head, explicit nonce, content type, tag.
pub const TLS_SEALED_OVERHEAD_BYTES: usize = 64;
/// Bytes of plaintext that are encrypted as one batch, and sent as one send: three full records, in one segment of a log.
pub const TLS_BATCH_BYTES_MAX: usize = 3 * 16 * 1024;
/// Sessions of backends that a shard remembers in order to resume them.
pub const TLS_SESSIONS_MAX: usize = 256;
/// Milliseconds that a client has for its TLS handshake when others wait for its place.
pub const TLS_HANDSHAKE_GRACE_MS: u64 = 1_000;
/// Receives of TLS handshakes that are taken in one turn: each may cost a signature, a quarter of a millisecond or more.
pub const TLS_HANDSHAKE_STEPS_PER_TURN_MAX: u32 = 8;
/// TLS failures told to the control thread in one turn; all are counted.
pub const TLS_FAILURES_TOLD_PER_TURN_MAX: usize = 8;
/// Bytes kept of a backend's error body that must be told in-band because the answer was committed before it came.
pub const LATE_ERROR_BYTES_MAX: usize = 8 * 1024;
/// Times that a send in flight is looked at within one write stall deadline.
pub const STALL_CHECKS: u64 = 4;
/// Milliseconds after something was received at which the socket is looked at for an RST that the kernel did not tell.
pub const RESET_LOOK_MS: u64 = 1_000;
/// Milliseconds of which those times are multiples (a slot of the wheel's second level): a shard wakes for all looks of one
/// step together.
pub const RESET_LOOK_STEP_MS: u64 = 64;
/// Bytes of a request body for which one body deadline is granted: a trickle does not extend it.
pub const BODY_PROGRESS_BYTES: u32 = 64 * 1024;
/// Connections tried for one request before it is refused.
pub const CONNECT_ATTEMPTS_MAX: u32 = 4;
/// Milliseconds for which a backend that refused a connection is tried last.
pub const UPSTREAM_BACKOFF_MS: u64 = 1_000;
/// Milliseconds a closed connection is drained so that what was sent is not destroyed by an RST.
pub const LINGER_MS: u64 = 1_000;
/// Bytes dropped while lingering; a client that sends more than this is cut off.
pub const LINGER_BYTES_MAX: u64 = 1024 * 1024;
/// Milliseconds after which accepting is tried again when descriptors or memory ran out.
pub const ACCEPT_RETRY_MS: u64 = 100;
/// One-shot accepts armed by a shard at a time (or one for each listener): enough to take a burst in a few turns, few enough to
/// be cancelled in one.
pub const ACCEPTS_ARMED_MAX: usize = 64;
/// Clients on their way from other shards to one, at most. Beyond, a shard keeps what it accepts. They take descriptors of the
/// shard that accepted them.
pub const HANDED_MAX: usize = 1024;
/// Clients by which loads may differ, beside a sixteenth, before any of those that are there are moved.
pub const BALANCE_SLACK: usize = 2;
/// Connections that are looked at in one turn for whether they can go to a shard with fewer.
pub const BALANCE_LOOKED_AT_PER_TURN: usize = 256;
/// Clients of a shard on their way for the sake of load at a time: until they are there, nobody reads what they send.
pub const BALANCE_MOVES_AT_ONCE_MAX: usize = 64;
/// Times a client is handed on before it is kept: each was decided by newer loads than the one before.
pub const HANDED_ON_MAX: u8 = 3;
/// Milliseconds a client that was accepted during a drain has for its first request.
pub const DRAIN_FRESH_MS: u64 = 1_000;
/// Milliseconds in which in-band errors may still leave once the process was told to stop.
pub const STOP_FLUSH_MS: u64 = 250;
/// Tokens the demo model writes in one turn at most, however fast it is asked to be.
pub const DEMO_TOKENS_PER_TURN_MAX: u32 = 256;
/// Finished-stream records waiting in a shard for the end of the turn.
pub const RECORDS_PER_TURN_MAX: usize = 4096;
/// Client connections listed in a snapshot as the slowest.
pub const SLOWEST_LISTED: usize = 10;

/// Bytes of a body that pay for one piece of it (a chunk, an event): real tokens have more. Pieces beyond are excess.
pub const PIECE_BYTES: u64 = 32;
/// Excess pieces that the receives of one connection may cost in a turn, a quarter of a millisecond or so; its further
/// receives wait.
pub const PIECES_EXCESS_PER_TURN_MAX: u64 = 2048;
/// Excess pieces that the receives which waited may cost in a turn, all together.
pub const PIECES_EXCESS_OF_WAITING_MAX: u64 = 4096;
/// Refusals that leave a client's connection open, before it is closed all the same: each costs the client a line.
pub const REFUSALS_PER_CONNECTION_MAX: u32 = 100;
/// Bytes that the streams and connections of one shard may hold together beyond the share that each has.
pub const OVERDRAFT_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Entries of a completion queue per entry of its submission queue: a multishot answers many times.
pub const COMPLETIONS_PER_ENTRY: u32 = 4;
/// Completions handled in one turn, so that one noisy neighbour cannot stretch it; the rest stay in the ring.
pub const COMPLETIONS_PER_TURN_MAX: usize = 1024;
/// Milliseconds after which a turn counts as a fault of the shard.
pub const TURN_FAULT_MS: u64 = 10;

/// Bytes of a stream that are kept behind its readers, for those who come back: a minute or more of a model's answer.
pub const RESUME_WINDOW_BYTES: u64 = 256 * 1024;
/// Memory of what is kept of the streams of one shard, bytes.
pub const RESUME_BYTES_MAX: u64 = 128 * 1024 * 1024;
/// Memory that a kept stream takes besides its log, bytes: its entry, its places in the indexes.
pub const RESUME_STREAM_COST_BYTES: u64 = 512;
/// Milliseconds a stream goes on without a client.
pub const DETACH_MS: u32 = 30_000;
/// Milliseconds a response in background is kept when it is over, at least.
pub const BACKGROUND_KEEP_MS: u32 = 600_000;
/// Bytes of a response in background that are kept, at least: events of a hundred or two bytes for each token.
pub const BACKGROUND_WINDOW_BYTES: u64 = 4 * 1024 * 1024;
/// Bytes of a response's id; one with a longer id cannot be asked for by it.
pub const RESPONSE_ID_BYTES_MAX: usize = 256;
/// Milliseconds a stream that is over is kept.
pub const KEEP_MS: u32 = 300_000;
/// Readers that begin on a shard within a second: each costs a replay of up to a window.
pub const RESUMES_PER_S: u32 = 4_000;
/// Readers of shared streams that are served in one turn; the others wait for the next.
pub const READERS_PER_TURN_MAX: usize = 512;
/// Slots of kept streams that are looked at in one turn for what has grown old: some 0.1 ms.
pub const AGED_PER_TURN_MAX: u32 = 1024;
/// Streams that the control thread is told of at once, and slots that are looked at for them: some 0.2 ms of a turn.
pub const LISTED_PER_TURN_MAX: usize = 256;
/// See above.
pub const LISTED_SLOTS_PER_TURN_MAX: u32 = 4096;
/// Milliseconds that what was delivered of a stream under way is kept.
pub const RESUME_WINDOW_MS: u32 = 3_600_000;

/// Readers that a stream has on its home before clients of other shards read it from a log of their own shard.
pub const MIRROR_READERS: usize = 64;
/// Mirrors that a shard has at a time; of further streams its readers are moved.
pub const MIRRORS_MAX: usize = 64;
/// Bytes of a stream that are sent to a mirror ahead of what it has taken; what one append made of it may go beyond.
pub const MIRROR_AHEAD_BYTES: u64 = 128 * 1024;
/// Bytes that a mirror takes before it says so.
pub const MIRROR_TELL_BYTES: u64 = 32 * 1024;
/// Milliseconds after which a mirror tells its home again how many read it, if something has come meanwhile.
pub const MIRROR_TELL_MS: u64 = 1_000;
/// Milliseconds a mirror that nobody reads waits for the next reader.
pub const MIRROR_IDLE_MS: u64 = 1_000;
/// Messages of mirrors on their way from other shards to one, at most.
pub const MIRROR_MESSAGES_MAX: usize = 1024;
/// Messages of mirrors that are taken in one turn.
pub const MIRROR_MESSAGES_PER_TURN_MAX: usize = 512;
/// Clients that a shard hands over in the middle of their answers at a time: until they are there, nothing is sent to them.
pub const HANDOVERS_AT_ONCE_MAX: usize = 32;
/// Readers of a stream that are looked at in one turn for whether they can be handed over.
pub const HANDOVERS_LOOKED_AT_PER_TURN: usize = 64;

/// Bytes of one append to a durable stream: checking JSON of that size takes a few milliseconds.
pub const DURABLE_BODY_BYTES_MAX: u64 = 1024 * 1024;
/// Bytes of one durable stream that are held.
pub const DURABLE_STREAM_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Memory of the durable streams of one shard, bytes.
pub const DURABLE_STORE_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Milliseconds a long-poll waits; proxies in between give up after 30 s or 60 s.
pub const DURABLE_LONG_POLL_MS: u32 = 20_000;
/// Milliseconds after which an event stream of a durable stream is ended (the protocol says about 60 s, for caches).
pub const DURABLE_EVENTS_MS: u32 = 60_000;
/// Bytes of one page of a durable stream, unless a single JSON message is longer.
pub const DURABLE_PAGE_BYTES_MAX: u64 = 1024 * 1024;
/// Bytes of messages that are put into one event for a reader who is behind.
pub const DURABLE_BATCH_BYTES: u64 = 16 * 1024;
/// Messages that are.
pub const DURABLE_BATCH_MESSAGES: usize = 256;
/// Messages of one append.
pub const DURABLE_MESSAGES_MAX: usize = 65_536;
/// Bytes of a field of the protocol: a producer's name, a content type.
pub const DURABLE_FIELD_BYTES_MAX: usize = 1024;
/// Producers known to one durable stream.
pub const DURABLE_PRODUCERS_MAX: usize = 1024;
/// Milliseconds without an append after which a producer may be forgotten for another (the protocol recommends 7 days).
pub const DURABLE_PRODUCER_FORGET_MS: u64 = 7 * 24 * 3_600_000;
/// Forks of forks: how many streams one behind the other a read may have to go through.
pub const DURABLE_FORK_DEPTH_MAX: usize = 32;
/// Memory that a durable stream takes without its data, bytes: its entry, its places in the indexes.
pub const DURABLE_STREAM_COST_BYTES: usize = 1024;
/// Memory that it takes beside its path on the shard that its path belongs to, if it lives on another one, bytes.
pub const DURABLE_AWAY_COST_BYTES: usize = 128;
/// Shards that a creation is sent to, one after the other, until it is refused: it takes two or three where nothing changes meanwhile.
pub const ERRAND_HOPS_MAX: u8 = 16;
/// Creations from other shards that wait on one, for what another creation at the same path becomes, or for its disk.
pub const ERRANDS_WAITING_MAX: usize = 1024;
/// Letters about durable streams that are taken in one turn.
pub const ERRAND_LETTERS_PER_TURN_MAX: usize = 256;
/// Durable streams that are looked at for old messages at once.
pub const DURABLE_LOOKS_PER_TURN_MAX: usize = 256;
/// Milliseconds of which the times are multiples at which expired streams are removed; they cannot be used before that.
pub const DURABLE_EXPIRY_STEP_MS: u64 = 1_000;
/// Readers of durable streams served in one turn; those of an append to many wait for the next.
pub const DURABLE_WAKES_PER_TURN_MAX: usize = 1024;
/// Bytes of a segment file of the journal of durable streams; the last append in it may go beyond.
pub const DURABLE_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;
/// Bytes of records that wait for the disk beyond which publishing is refused.
pub const DURABLE_BACKLOG_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Bytes of records given to the disk at once: copying them takes a millisecond or two of a turn.
pub const DURABLE_WRITE_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Milliseconds after which what the disk did not take is tried again, doubling up to the second.
pub const DURABLE_RETRY_MS: u64 = 250;
/// The longest of them.
pub const DURABLE_RETRY_MS_MAX: u64 = 4_000;
/// Bytes of streams that are written anew in one turn, to free old segments.
pub const DURABLE_REWRITE_BYTES_PER_TURN: u64 = 128 * 1024;
/// Bytes of records that wait for the disk above which nothing is written anew.
pub const DURABLE_REWRITE_BACKLOG_BYTES_MAX: u64 = 1024 * 1024;
/// Milliseconds that events of relayed streams wait for the disk, where nothing is delivered before it is synced; then streams go
/// on without.
pub const STORED_WAIT_MS_MAX: u64 = 3_000;
/// Numbers of relayed streams that are reserved on disk at a time, so that none is given twice whatever happens.
pub const RELAYED_NUMBERS_RESERVED: u64 = 1 << 24;
/// Bytes that a reader of a durable stream is given at a time.
pub const DURABLE_PIECE_BYTES: usize = 16 * 1024;

const _: () = assert!(
    DURABLE_BODY_BYTES_MAX <= DURABLE_STREAM_BYTES_MAX && DURABLE_STREAM_BYTES_MAX <= DURABLE_STORE_BYTES_MAX,
    "an append fits into a stream, a stream into the store"
);
const _: () =
    assert!(LAG_LOW_BYTES < LAG_HIGH_BYTES, "marks need a gap, or pause and resume alternate per event");
const _: () = assert!(
    TLS_BATCH_BYTES_MAX + (TLS_BATCH_BYTES_MAX / (16 * 1024) + 2) * TLS_SEALED_OVERHEAD_BYTES
        <= LOG_SEGMENT_BYTES_MAX,
    "a batch goes out as one send"
);
const _: () = assert!(
    MIRROR_TELL_BYTES <= MIRROR_AHEAD_BYTES,
    "a mirror that has taken all it was sent says so, and is sent more"
);
const _: () = assert!(LOG_SEGMENT_FIRST_BYTES <= LOG_SEGMENT_BYTES_MAX, "segments grow");
const _: () = assert!(TARGET_BYTES_MAX < HEAD_BYTES_MAX, "a target that fits must leave room for its head");
