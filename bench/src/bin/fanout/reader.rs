//! A reader that stays, or leaves and comes back; what it has got is judged and timed.

use std::collections::VecDeque;
use std::net::TcpStream;

use bench::clock::now_ns;
use bench::http::head_end;
use bench::mark::{MARK_BYTES_MAX, Mark};
use bench::report::Report;
use bench::sequence::Sequence;

/// Events whose ids are remembered for those who return.
const IDS_MAX: usize = 4096;

pub(crate) struct Reader {
    pub(crate) socket: Option<TcpStream>,
    pub(crate) asked: bool,
    pub(crate) received: Received,
    /// Until it has caught up.
    pub(crate) coming_back: Option<ComingBack>,
    /// Events that were due before are none that it was there for.
    pub(crate) live_from_ns: u64,
}

/// A reader of one of several streams that has left and is there again.
pub(crate) struct ComingBack {
    pub(crate) due_ns: u64,
    pub(crate) has_first: bool,
}

/// What a reader has got.
pub(crate) struct Received {
    pub(crate) has_head: bool,
    pub(crate) sequence: Sequence,
    /// A head, or a mark, of which the rest has not arrived.
    pub(crate) partial: Vec<u8>,
    /// Of the last events: the sequence number, and the id that the server gave it.
    pub(crate) ids: VecDeque<(u64, String)>,
    /// Of an event of which the rest has not arrived.
    pub(crate) text: Vec<u8>,
    /// When the last event was due.
    pub(crate) last_due_ns: u64,
}

impl Reader {
    /// Of that stream.
    pub(crate) fn new(stream: u64) -> Self {
        let received = Received {
            has_head: false,
            sequence: Sequence::new(stream),
            partial: Vec::new(),
            ids: VecDeque::new(),
            text: Vec::new(),
            last_due_ns: 0,
        };
        Self { socket: None, asked: false, received, coming_back: None, live_from_ns: 0 }
    }
}

impl Received {
    /// Takes note of the ids of events.
    pub(crate) fn remember(&mut self, bytes: &[u8]) {
        self.text.extend_from_slice(bytes);
        while let Some(end) = memchr::memmem::find(&self.text, b"\n\n") {
            let event: Vec<u8> = self.text.drain(..end + 2).collect();
            if let (Some(mark), Some(id)) = (Mark::decode(&event), id_of(&event)) {
                self.ids.push_back((mark.sequence, id));
                if self.ids.len() > IDS_MAX {
                    self.ids.pop_front();
                }
            }
        }
    }

    /// Takes bytes: a head first, then whatever stands between marks.
    pub(crate) fn take(&mut self, bytes: &[u8], report: &mut Report, measured: &std::ops::Range<u64>) {
        report.bytes += bytes.len() as u64;
        let joined;
        let mut rest = bytes;
        if !self.partial.is_empty() {
            self.partial.extend_from_slice(bytes);
            joined = std::mem::take(&mut self.partial);
            rest = &joined;
        }
        if !self.has_head {
            let Some(end) = head_end(rest) else { return self.partial = rest.to_vec() };
            let ok = rest.starts_with(b"HTTP/1.1 200 ");
            report.faults.status += u64::from(!ok);
            self.has_head = true;
            rest = &rest[end..];
        }
        let now = now_ns();
        while let Some(start) = memchr::memchr(b'~', rest) {
            rest = &rest[start..];
            let Some(length) = memchr::memchr(b'~', &rest[1..]) else {
                if rest.len() < MARK_BYTES_MAX {
                    self.partial = rest.to_vec();
                    return;
                }
                report.faults.malformed += 1;
                return;
            };
            let (mark, after) = rest.split_at(length + 2);
            rest = after;
            let Some(mark) = Mark::decode(mark) else {
                report.faults.malformed += 1;
                continue;
            };
            report.events += 1;
            self.sequence.see(mark.stream, mark.sequence);
            self.last_due_ns = mark.due_ns;
            if measured.contains(&mark.due_ns) {
                report.added.record(now.saturating_sub(mark.due_ns));
                report.hop.record(now.saturating_sub(mark.due_ns + mark.late_ns));
            }
        }
    }
}

/// What an event's `id` line says.
fn id_of(event: &[u8]) -> Option<String> {
    let mut lines = event.split(|&byte| byte == b'\r' || byte == b'\n');
    let id = lines.find_map(|line| line.strip_prefix(b"id:"))?;
    String::from_utf8(id.to_vec()).ok().map(|id| id.trim().to_owned())
}
