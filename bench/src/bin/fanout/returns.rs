//! Readers that come back: who, when, and how long it takes until each has caught up.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::TcpStream;

use bench::clock::{now_ns, seconds_ns};
use bench::http::head_end;
use bench::mark::Mark;
use bench::net;
use bench::report::Report;

use crate::reader::ComingBack;
use crate::{Options, Run};

/// Those who return that may be on their way at once; the next one waits, and its time counts.
const RETURNING_MAX: usize = 1024;

/// Readers that come back, and when.
#[derive(Default)]
pub(crate) struct Returns {
    start_ns: u64,
    every_ns: u64,
    /// How many are to come, and how many have come and gone.
    all: u64,
    begun: u64,
    pub(crate) ended: u64,
    slots: Vec<Option<Returned>>,
    /// Of several streams: readers that have left, and when each is to come back.
    away: VecDeque<(usize, u64)>,
    away_ns: u64,
}

/// One who has come back.
struct Returned {
    socket: TcpStream,
    /// Until it is sent.
    request: String,
    due_ns: u64,
    /// Sequence number of the next event that it is owed, and of the last one that live readers had when it came back.
    next: u64,
    goal: u64,
    has_head: bool,
    has_first: bool,
    partial: Vec<u8>,
}

impl Returns {
    pub(crate) fn plan(&mut self, options: &Options, begin_ns: u64, end_ns: u64) {
        if options.storm > 0 {
            (self.start_ns, self.all) = (begin_ns + (end_ns - begin_ns) / 2, options.storm as u64);
        } else if options.returns > 0.0 {
            (self.start_ns, self.every_ns) = (begin_ns, (1e9 / options.returns) as u64);
            self.all = (end_ns - begin_ns) / self.every_ns.max(1);
            if options.streams > 1 {
                // They leave so long before, and come back within the window.
                self.away_ns = seconds_ns(options.away);
                self.start_ns -= self.away_ns;
            }
        }
    }

    /// When the next one is to come back, if there is room for one.
    fn next_due_ns(&self) -> Option<u64> {
        let room = self.begun - self.ended < RETURNING_MAX as u64;
        (self.begun < self.all && room).then(|| self.start_ns + self.begun * self.every_ns)
    }

    pub(crate) fn wake_ns(&self) -> u64 {
        let back_ns = self.away.front().map_or(u64::MAX, |&(_, due_ns)| due_ns);
        self.next_due_ns().unwrap_or(u64::MAX).min(back_ns)
    }

    pub(crate) fn are_over(&self) -> bool {
        self.ended == self.all
    }

    pub(crate) fn unfinished(&self) -> u64 {
        self.all - self.ended
    }

    fn free_slot(&mut self) -> usize {
        self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        })
    }

    fn begin(&mut self, slot: usize, returned: Returned) {
        self.slots[slot] = Some(returned);
        self.begun += 1;
    }

    fn end(&mut self, slot: usize) -> io::Result<()> {
        self.ended += 1;
        match self.slots[slot].take() {
            Some(returned) => net::reset_on_close(&returned.socket),
            None => Ok(()),
        }
    }
}

impl Returned {
    /// Takes bytes; true when it has caught up, or cannot.
    fn take(&mut self, bytes: &[u8], report: &mut Report) -> bool {
        let now = now_ns();
        self.partial.extend_from_slice(bytes);
        if !self.has_head {
            let Some(end) = head_end(&self.partial) else { return false };
            if !self.partial.starts_with(b"HTTP/1.1 200 ") {
                report.faults.status += 1;
                return true;
            }
            self.has_head = true;
            self.partial.drain(..end);
        }
        let mut from = 0;
        while let Some(start) = memchr::memchr(b'~', &self.partial[from..]).map(|at| from + at)
            && let Some(end) = memchr::memchr(b'~', &self.partial[start + 1..]).map(|at| start + 1 + at)
        {
            from = end + 1;
            let Some(mark) = Mark::decode(&self.partial[start..from]) else {
                report.faults.malformed += 1;
                return true;
            };
            if mark.sequence != self.next {
                let early = mark.sequence < self.next;
                *(if early {
                    &mut report.faults.sequence.doubled
                } else {
                    &mut report.faults.sequence.lost
                }) += 1;
                return true;
            }
            self.next += 1;
            if !std::mem::replace(&mut self.has_first, true) {
                report.first.record(now.saturating_sub(self.due_ns));
            }
            if mark.sequence >= self.goal {
                report.caught_up.record(now.saturating_sub(self.due_ns));
                return true;
            }
        }
        self.partial.drain(..from);
        false
    }
}

impl Run {
    /// Connects those whose time has come to come back.
    pub(crate) fn bring_back(&mut self, now: u64) -> io::Result<()> {
        while let Some(due_ns) = self.returns.next_due_ns().filter(|&due_ns| due_ns <= now) {
            let ids = &self.readers[0].received.ids;
            let newest = ids.back().map_or(0, |(sequence, _)| *sequence);
            let missed = ids.iter().rev().find(|(sequence, _)| sequence + self.options.behind <= newest);
            let Some((cursor, id)) = missed else {
                return Err(io::Error::other(
                    "nobody has had as many events as those who return are to miss",
                ));
            };
            let slot = self.returns.free_slot();
            let socket = net::connect(self.options.target)?;
            self.poller.add_connection(&socket, (self.readers.len() + slot) as u64)?;
            let request = format!(
                "GET {} HTTP/1.1\r\nHost: {}\r\nAccept: text/event-stream\r\nLast-Event-ID: {id}\r\n\r\n",
                self.options.read, self.options.target
            );
            self.returns.begin(
                slot,
                Returned {
                    socket,
                    request,
                    due_ns,
                    next: cursor + 1,
                    goal: newest,
                    has_head: false,
                    has_first: false,
                    partial: Vec::new(),
                },
            );
        }
        Ok(())
    }

    /// Of several streams: readers leave when their time has come, and come back to where they were.
    pub(crate) fn send_away(&mut self, now: u64) -> io::Result<()> {
        while let Some(due_ns) = self.returns.next_due_ns().filter(|&due_ns| due_ns <= now) {
            let index = (self.returns.begun % self.readers.len() as u64) as usize;
            let reader = &mut self.readers[index];
            if reader.socket.take().is_none() || reader.coming_back.is_some() {
                return Err(io::Error::other("a reader is to leave that is not there"));
            }
            self.returns.begun += 1;
            self.returns.away.push_back((index, due_ns + self.returns.away_ns));
        }
        while let Some(&(index, due_ns)) = self.returns.away.front().filter(|(_, due_ns)| *due_ns <= now) {
            self.returns.away.pop_front();
            let socket = net::connect(self.options.target)?;
            self.poller.add_connection(&socket, index as u64)?;
            let reader = &mut self.readers[index];
            (reader.socket, reader.asked) = (Some(socket), false);
            (reader.live_from_ns, reader.coming_back) =
                (due_ns, Some(ComingBack { due_ns, has_first: false }));
            reader.received.has_head = false;
            reader.received.partial.clear();
            reader.received.text.clear();
        }
        Ok(())
    }

    pub(crate) fn serve_returned(&mut self, slot: usize, piece: &mut [u8]) -> io::Result<()> {
        let Some(returned) = self.returns.slots.get_mut(slot).and_then(Option::as_mut) else { return Ok(()) };
        if !returned.request.is_empty() {
            match (&returned.socket).write(returned.request.as_bytes()) {
                Ok(_) => returned.request.clear(),
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        loop {
            match (&returned.socket).read(piece) {
                Ok(0) => {
                    self.report.faults.truncated += 1;
                    return self.returns.end(slot);
                }
                Ok(count) => {
                    if returned.take(&piece[..count], &mut self.report) {
                        return self.returns.end(slot);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(_) => {
                    self.report.faults.reset += 1;
                    return self.returns.end(slot);
                }
            }
        }
    }
}
