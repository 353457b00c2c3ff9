//! Logs: `log` records, filtered by env_logger's rules, go through a bounded queue to one thread that writes stderr. A shard
//! never waits for a log's reader: a line that finds the queue full is dropped and counted.

mod format;
mod limiter;

pub(crate) use format::Format;
use limiter::{Limiter, WINDOW_MS};
use log::{LevelFilter, Log, Metadata, Record};
use serde_json::Value;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

/// The target of access log lines: written whatever the level, and never limited, since each tells of another stream.
pub(crate) const ACCESS: &str = "tokenring::access";
/// Lines waiting for the writer. At 200 bytes a line some 2 MB; a burst of this many passes whole.
const LINES_MAX: usize = 8192;
/// Bytes of one line's text; the rest is cut. Text of peers is cut far shorter where it is logged.
const LINE_BYTES_MAX: usize = 8 * 1024;

/// One log line on its way.
pub(crate) struct Line {
    since_1970: Duration,
    level: log::Level,
    target: String,
    text: String,
    fields: Vec<(String, Value)>,
}

enum Message {
    Line(Line),
    /// Answered when everything before it is written.
    Flush(SyncSender<()>),
}

/// The installed log.
#[derive(Clone)]
pub(crate) struct Logs {
    sender: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

struct Queue {
    filter: env_logger::Logger,
    logs: Logs,
}

impl Logs {
    /// Installs the log of the process and starts its writer.
    pub(crate) fn install(filter: &str, format: Format) -> Result<Logs, String> {
        let (sender, receiver) = sync_channel(LINES_MAX);
        let logs = Logs { sender, dropped: Arc::default() };
        let filter =
            env_logger::Builder::new().parse_filters(filter).filter_module(ACCESS, LevelFilter::Info).build();
        log::set_max_level(filter.filter());
        log::set_boxed_logger(Box::new(Queue { filter, logs: logs.clone() }))
            .map_err(|error| error.to_string())?;
        let dropped = Arc::clone(&logs.dropped);
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || {
                Writer { receiver, dropped, format, limiter: Limiter::default(), reported: 0 }.run()
            })
            .map_err(|error| format!("cannot start the log's thread: {error} (ulimit -u, TasksMax=)"))?;
        Ok(logs)
    }

    /// Lines dropped so far.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Waits until everything logged so far is written, at most `limit`.
    pub(crate) fn flush(&self, limit: Duration) {
        let until = crate::clock::now() + limit;
        let (done, wait) = sync_channel(1);
        let mut message = Message::Flush(done);
        while let Err(TrySendError::Full(back)) = self.sender.try_send(message) {
            if crate::clock::now() >= until {
                return;
            }
            message = back;
            std::thread::sleep(Duration::from_millis(2));
        }
        // A log that is stuck is not waited for any longer.
        wait.recv_timeout(until.saturating_duration_since(crate::clock::now())).ok();
    }
}

impl Log for Queue {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.filter.matches(record) {
            return;
        }
        let mut text = record.args().to_string();
        if text.len() > LINE_BYTES_MAX {
            let cut = (0..=LINE_BYTES_MAX).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
            text.truncate(cut);
            text.push('…');
        }
        let mut fields = Fields(Vec::new());
        record.key_values().visit(&mut fields).unwrap_or_else(|_| unreachable!("the visitor takes all"));
        let line = Line {
            since_1970: crate::clock::since_1970(),
            level: record.level(),
            target: record.target().to_owned(),
            text,
            fields: fields.0,
        };
        if self.logs.sender.try_send(Message::Line(line)).is_err() {
            self.logs.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

struct Fields(Vec<(String, Value)>);

impl<'kvs> log::kv::VisitSource<'kvs> for Fields {
    fn visit_pair(
        &mut self,
        key: log::kv::Key<'kvs>,
        value: log::kv::Value<'kvs>,
    ) -> Result<(), log::kv::Error> {
        let mut field = Field(None);
        value.visit(&mut field)?;
        // An absent value is no field.
        self.0.extend(field.0.map(|value| (key.as_str().to_owned(), value)));
        Ok(())
    }
}

struct Field(Option<Value>);

impl<'v> log::kv::VisitValue<'v> for Field {
    fn visit_any(&mut self, value: log::kv::Value<'_>) -> Result<(), log::kv::Error> {
        self.0 = Some(Value::String(value.to_string()));
        Ok(())
    }

    fn visit_null(&mut self) -> Result<(), log::kv::Error> {
        Ok(())
    }

    fn visit_u64(&mut self, value: u64) -> Result<(), log::kv::Error> {
        self.0 = Some(value.into());
        Ok(())
    }

    fn visit_i64(&mut self, value: i64) -> Result<(), log::kv::Error> {
        self.0 = Some(value.into());
        Ok(())
    }

    fn visit_f64(&mut self, value: f64) -> Result<(), log::kv::Error> {
        self.0 = Some(value.into());
        Ok(())
    }

    fn visit_bool(&mut self, value: bool) -> Result<(), log::kv::Error> {
        self.0 = Some(value.into());
        Ok(())
    }
}

struct Writer {
    receiver: Receiver<Message>,
    dropped: Arc<AtomicU64>,
    format: Format,
    limiter: Limiter,
    /// Dropped lines already told of.
    reported: u64,
}

impl Writer {
    fn run(mut self) {
        let started = crate::clock::now();
        loop {
            let message = if self.limiter.is_watching() {
                self.receiver.recv_timeout(Duration::from_millis(WINDOW_MS / 4))
            } else {
                self.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            let now_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            // Before a flush, which may be the last, everything held back is told of.
            let until_ms = if matches!(message, Ok(Message::Flush(_))) { u64::MAX } else { now_ms };
            for (level, target, text, times) in self.limiter.expire(until_ms) {
                let fields = vec![("times".to_owned(), times.into())];
                self.write(&own_line(level, target, format!("repeated: {text}"), fields));
            }
            let dropped = self.dropped.load(Ordering::Relaxed);
            if dropped > self.reported {
                let fields = vec![("lines".to_owned(), (dropped - self.reported).into())];
                let text = "log lines dropped: the reader of stderr does not keep up".to_owned();
                self.write(&own_line(log::Level::Warn, "tokenring::logs".to_owned(), text, fields));
                self.reported = dropped;
            }
            match message {
                Ok(Message::Line(line)) => {
                    if line.target == ACCESS || self.limiter.admits(&line, now_ms) {
                        self.write(&line);
                    }
                }
                // Nobody waits any more when this fails.
                Ok(Message::Flush(done)) => done.send(()).unwrap_or(()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn write(&self, line: &Line) {
        // There is no place left to report a broken stderr to.
        std::io::stderr().write_all(self.format.render(line).as_bytes()).ok();
    }
}

fn own_line(level: log::Level, target: String, text: String, fields: Vec<(String, Value)>) -> Line {
    Line { since_1970: crate::clock::since_1970(), level, target, text, fields }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_keep_their_types_and_absent_ones_are_left_out() {
        let pairs = [
            ("status", log::kv::Value::from(200)),
            ("model", "tiny".into()),
            ("on", true.into()),
            ("upstream", log::kv::Value::null()),
        ];
        let mut fields = Fields(Vec::new());
        log::kv::Source::visit(&pairs, &mut fields).unwrap();
        let expected = [("status", Value::from(200)), ("model", "tiny".into()), ("on", true.into())];
        assert_eq!(fields.0, expected.map(|(key, value)| (key.to_owned(), value)));
    }
}
