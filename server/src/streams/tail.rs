//! A stream's events to stdout, until its end: whoever broke the connection in between, none is missing and none comes twice.

use super::http::{Client, Response};
use super::server::{Which, refusal, unreachable};
use super::{Out, Stopped, Tail};
use crate::exit::{Exit, Fatal};
use protocol::sse::{Block, Decoder};
use serde_json::Value;
use std::io;
use std::time::Duration;

/// How often in a row it is tried again to come back, and how long it is waited before.
const ATTEMPTS: u32 = 30;
const PAUSE: Duration = Duration::from_secs(2);
/// Before a reading goes on that had brought something.
const SHORT_PAUSE: Duration = Duration::from_millis(200);
/// Bytes of one event.
const EVENT_BYTES_MAX: usize = 256 << 20;

/// Where a reading is, and what is known of the stream's end.
struct Following<'a> {
    client: &'a Client,
    which: &'a Which,
    data_only: bool,
    /// It was there.
    begun: bool,
    /// The id of the last event that was printed.
    cursor: Option<String>,
    /// Events that nobody can give us any more.
    lost: bool,
    /// The stream said that it failed.
    failed: Option<String>,
    /// Up to this event and no further.
    until: Option<u64>,
}

/// What became of one connection.
enum Ended {
    /// All of it was read.
    Whole,
    /// As readings of durable streams are now and then.
    Orderly,
    /// It is to be gone on elsewhere.
    Broken(String),
}

pub(super) fn follow(
    client: &Client,
    which: &Which,
    tail: &Tail,
    out: &mut Out<'_>,
) -> Result<Exit, Stopped> {
    let mut following = Following {
        client,
        which,
        data_only: tail.data,
        begun: false,
        cursor: begins_behind(client, which, tail)?,
        lost: false,
        failed: None,
        until: None,
    };
    following.run(out)
}

/// What it is to begin behind; where that is the end, the place where that is now.
fn begins_behind(client: &Client, which: &Which, tail: &Tail) -> Result<Option<String>, Fatal> {
    match (which, tail.after.as_deref()) {
        (Which::Path(path), Some("now")) => {
            let metadata = client.ask("HEAD", path, "").map_err(|error| unreachable(client, &error))?;
            match metadata.field("stream-next-offset").filter(|_| metadata.status == 200) {
                Some(end) => Ok(Some(end.to_owned())),
                None => Err(refusal(client, which, metadata.status, None)),
            }
        }
        (_, after) => Ok(after.map(str::to_owned)),
    }
}

/// What is held of a stream now.
pub(super) fn export(client: &Client, id: &str, out: &mut Out<'_>) -> Result<Exit, Stopped> {
    let which = Which::Id(id.to_owned());
    let path = format!("{}/status", which.events_path());
    let mut response = client.get(&path, "").map_err(|error| unreachable(client, &error))?;
    let body = response.whole().map_err(|error| unreachable(client, &error))?;
    let status: Option<Value> = serde_json::from_slice(&body).ok();
    let Some(status) = status.as_ref().filter(|_| response.status == 200) else {
        return Err(refusal(client, &which, response.status, status.as_ref()).into());
    };
    let (earliest, last) = (status["earliest_event_id"].as_u64(), status["last_event_id"].as_u64());
    if last == Some(0) {
        return Ok(Exit::Success);
    }
    let mut following = Following {
        client,
        which: &which,
        data_only: false,
        begun: false,
        cursor: earliest.map(|earliest| earliest.saturating_sub(1).to_string()),
        lost: false,
        failed: None,
        until: last,
    };
    following.run(out)
}

impl Following<'_> {
    fn run(&mut self, out: &mut Out<'_>) -> Result<Exit, Stopped> {
        let mut attempts = 0;
        loop {
            let before = self.cursor.clone();
            let (why, pause) = match self.begin() {
                Ok(Begun::Response(response)) => match self.read(*response, out)? {
                    Ended::Whole => return self.end(),
                    Ended::Orderly => (String::new(), SHORT_PAUSE),
                    // A connection that brought something is no failed attempt.
                    Ended::Broken(why) if self.cursor == before => (why, PAUSE),
                    Ended::Broken(_) => (String::new(), SHORT_PAUSE),
                },
                Ok(Begun::Again) => continue,
                Ok(Begun::Over) => return self.end(),
                Err(Attempt::Final(fatal)) => return Err(fatal.into()),
                Err(Attempt::Later(why)) => (why, PAUSE),
            };
            attempts = if pause == PAUSE { attempts + 1 } else { 0 };
            if attempts > ATTEMPTS || !self.begun {
                return Err(Fatal::unavailable(format!("{}: {why}", self.client.address)).into());
            }
            std::thread::sleep(pause);
        }
    }

    /// Asks for what follows the cursor.
    fn begin(&mut self) -> Result<Begun, Attempt> {
        let cursor = self.cursor.as_ref().map(|cursor| format!("Last-Event-ID: {cursor}\r\n"));
        let fields = format!("Accept: text/event-stream\r\n{}", cursor.unwrap_or_default());
        let mut response = match self.client.get(&self.which.events_path(), &fields) {
            Ok(response) => response,
            Err(error) => return Err(Attempt::Later(error.to_string())),
        };
        match response.status {
            200 => {
                self.begun = true;
                return Ok(Begun::Response(Box::new(response)));
            }
            204 => return Ok(Begun::Over),
            // A deploy, a storm.
            500..=599 if self.begun => return Err(Attempt::Later(format!("status {}", response.status))),
            _ => {}
        }
        let body: Option<Value> = response.whole().ok().and_then(|body| serde_json::from_slice(&body).ok());
        let earliest = response
            .field("tokenring-earliest-event-id")
            .or_else(|| response.field("stream-earliest-offset"));
        match earliest {
            Some(earliest) if response.status == 410 && self.cursor.as_deref() != Some(earliest) => {
                // What there is, and a word of what there is not.
                eprintln!("what lies before {earliest} is not held any more");
                self.lost |= self.begun;
                self.cursor = Some(earliest.to_owned());
                Ok(Begun::Again)
            }
            _ => {
                let mut fatal = refusal(self.client, self.which, response.status, body.as_ref());
                if self.begun {
                    // It was there.
                    fatal.exit = Exit::Forced;
                }
                Err(Attempt::Final(fatal))
            }
        }
    }

    fn read(&mut self, mut response: Response, out: &mut Out<'_>) -> Result<Ended, Stopped> {
        let mut decoder = Decoder::new(EVENT_BYTES_MAX);
        loop {
            let some = match response.some() {
                Ok(some) => some,
                Err(error) => return Ok(Ended::Broken(broken_words(&error))),
            };
            if some.is_empty() {
                break;
            }
            let mut input = &some[..];
            loop {
                let block = match decoder.next(&mut input) {
                    Ok(Some(block)) => block,
                    Ok(None) => break,
                    Err(error) => return Err(Fatal::internal(error.to_string()).into()),
                };
                if let Some(ended) = self.take(&block, out)? {
                    return Ok(ended);
                }
            }
        }
        // A durable stream's reading is ended now and then while the stream goes on; that it is over a 204 says.
        match self.which {
            Which::Path(path) if self.cursor.is_none() && self.is_closed(path) => Ok(Ended::Whole),
            Which::Path(_) => Ok(Ended::Orderly),
            Which::Id(_) => Ok(Ended::Whole),
        }
    }

    /// Whether nothing will ever come of a stream of which nothing has come.
    fn is_closed(&self, path: &str) -> bool {
        let metadata = self.client.ask("HEAD", path, "");
        metadata.is_ok_and(|metadata| metadata.status == 200 && metadata.field("stream-closed").is_some())
    }

    /// Prints an event; none of heartbeats. Gives the end, where this is one.
    fn take(&mut self, block: &Block<'_>, out: &mut Out<'_>) -> Result<Option<Ended>, Stopped> {
        if !block.dispatches {
            return Ok(None);
        }
        let id = id_of(block);
        let data: Vec<&[u8]> = block.data_lines().collect();
        match (&id, block.event()) {
            (Some(_), _) => {}
            (None, Some(b"ping")) => return Ok(None),
            (None, Some(b"tokenring.gap")) => self.lost = true,
            (None, _) => {
                let said: Option<Value> = serde_json::from_slice(&data.concat()).ok();
                let error =
                    said.as_ref().map(|said| if said["error"].is_object() { &said["error"] } else { said });
                let code = error.and_then(|error| error["code"].as_str()).unwrap_or_default();
                if code == "lagged" {
                    return Ok(Some(Ended::Broken("we were too slow".to_owned())));
                }
                self.failed = Some(if code.is_empty() { "an error".to_owned() } else { code.to_owned() });
            }
        }
        if self.data_only {
            for line in &data {
                out.put(&[line, &b"\n"[..]].concat())?;
            }
        } else {
            // What was said to us alone goes no further.
            let lines = block.raw.split_inclusive(|byte| *byte == b'\n');
            let lines = lines.filter(|line| !line.starts_with(b"retry:") && !line.starts_with(b":"));
            out.put(&lines.collect::<Vec<_>>().concat())?;
        }
        if let Some(id) = id {
            let reached = self.until.is_some_and(|until| id.parse::<u64>().is_ok_and(|id| id >= until));
            self.cursor = Some(id);
            if reached {
                return Ok(Some(Ended::Whole));
            }
        }
        Ok(None)
    }

    fn end(&self) -> Result<Exit, Stopped> {
        if self.lost {
            return Err(Fatal::new(Exit::Damaged, "some of its events are not there any more").into());
        }
        match &self.failed {
            Some(code) => Err(Fatal::new(Exit::Forced, format!("the stream ended with {code}")).into()),
            None => Ok(Exit::Success),
        }
    }
}

enum Begun {
    Response(Box<Response>),
    /// From another place.
    Again,
    /// All of it was read.
    Over,
}

enum Attempt {
    Final(Fatal),
    Later(String),
}

fn broken_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "nothing was heard for a minute".to_owned(),
        io::ErrorKind::UnexpectedEof => "the connection broke off".to_owned(),
        _ => error.to_string(),
    }
}

/// Its last `id` line.
fn id_of(block: &Block<'_>) -> Option<String> {
    let lines = block.raw.split(|byte| matches!(byte, b'\r' | b'\n'));
    let id = lines.filter_map(|line| line.strip_prefix(b"id:")).next_back()?;
    let id = id.strip_prefix(b" ").unwrap_or(id);
    std::str::from_utf8(id).ok().map(str::to_owned)
}
