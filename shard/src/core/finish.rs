//! How streams end: what the client is told, what is counted, and what becomes of its connection.

use super::Shard;
use super::conn::{Conn, State};
use super::relay::ExtraLines;
use super::stream::{Answer, Stream, write_late_error};
use crate::io::{Close, Io};
use crate::mesh::Report;
use crate::stats::StreamRecord;
use protocol::fault::{Culprit, Fault};
use protocol::http::{Framing, Refusal, write_own_response_head};
use protocol::limits::{RECORDS_PER_TURN_MAX, REFUSALS_PER_CONNECTION_MAX};
use protocol::phase::{End, Phase, Step};
use protocol::planted::{Bug, is_planted};
use protocol::slots::Key;

impl<I: Io> Shard<I> {
    /// Ends a stream for the first reason given; a second one is too late. The backend is let go at once; what the client is
    /// owed (the rest, the end, or the error in its dialect) is in the log when this returns.
    pub(super) fn end_stream(&mut self, key: Key, end: End) {
        let (now_us, unix_time_s) = (self.now_us, self.unix_time_s());
        if self.end_tail(key, end) {
            return;
        }
        if self.has_all_of_its_source(key) {
            // The end is among what is on its way to it, and nothing may follow that.
            return;
        }
        let Some(stream) = self.streams.get_mut(key) else { return };
        if stream.end.is_some() {
            return;
        }
        let end = match end {
            End::Done | End::ClientLeft | End::WriteStall => end,
            // Its end mark is out, and nothing may follow that: it has finished, whatever came in between.
            _ if stream.end_mark && stream.has_events_answer() => {
                self.stats.counters.unclean_ends += 1;
                End::Done
            }
            _ => end,
        };
        stream.end = Some(end);
        let backend = stream.backend;
        match (stream.answer, end) {
            // A whole answer of our own is in the log already.
            _ if stream.produced => {}
            // Nobody is left to be told.
            (_, End::ClientLeft | End::WriteStall) => {}
            (Answer::None, _) => {
                write_error(stream, &end.fault(), &mut self.scratch, self.date.at(unix_time_s), now_us, "");
            }
            // The error is the last event, and the body is ended: a reader that is still behind must get it, and some
            // (fetch in browsers and Node) throw away what they have not read when a body breaks off.
            (Answer::Events { .. }, End::Done) => stream.append_last_chunk(now_us),
            // A reader comes again and finds where it was; only what is incomplete must not look whole.
            (Answer::Events { .. }, _) if stream.durable.is_some() => {
                if stream.is_within_event() {
                    stream.reset = !stream.events_chunked();
                } else {
                    stream.append_last_chunk(now_us);
                }
                stream.close = true;
            }
            (Answer::Events { .. }, _) => {
                if end != End::UpstreamError && !is_planted(Bug::SilentEnd) {
                    self.scratch.clear();
                    let late = stream.late_error_mut().map(std::mem::take).unwrap_or_default();
                    let own_words = end == End::UpstreamStatus
                        && write_late_error(stream.dialect, &late, &mut self.scratch);
                    let next = stream.sequence_number.get().map(|last| last + 1);
                    if !own_words {
                        stream.dialect.write_error_event_numbered(&end.fault(), next, &mut self.scratch);
                    }
                    stream.append_block(&self.scratch, now_us);
                }
                stream.append_last_chunk(now_us);
                stream.close = true;
            }
            (Answer::Body(_), End::Done) => stream.append_last_chunk(now_us),
            // An ordinary body has no place for an error: it must break off visibly.
            (Answer::Body(framing), _) => {
                stream.close = true;
                stream.reset = framing == Framing::UntilClose;
            }
        }
        stream.produced = true;
        stream.stop_scanning();
        if stream.phase != Phase::Finishing {
            stream.step(Step::ProducerDone);
        }
        let client = stream.client;
        if let Some(backend) = backend {
            self.disengage(backend, Close::Orderly);
        }
        self.appended(key);
        if client.is_none() {
            // Nothing is to be delivered by it.
            if let Some(stream) = self.streams.get_mut(key) {
                stream.step(Step::Delivered);
            }
            self.settle(key);
        }
    }

    /// Answers a request that breaks a rule or a limit.
    pub(super) fn refuse(&mut self, key: Key, refusal: Refusal) {
        let (now_us, unix_time_s) = (self.now_us, self.unix_time_s());
        self.stats.counters.refusals += 1;
        if let Some(index) = Refusal::ALL.iter().position(|&known| known == refusal) {
            self.stats.refusals[index] += 1;
        }
        let Some(stream) = self.streams.get_mut(key) else { return };
        if let Some(description) = &mut stream.description {
            description.refusal = Some(refusal.reason());
        }
        if stream.answer == Answer::None && stream.end.is_none() {
            let fault = Fault {
                status: refusal.status(),
                code: refusal.reason(),
                message: refusal.message(),
                culprit: Culprit::Client,
                retry_helps: false,
            };
            let harmless = matches!(refusal, Refusal::NotFound | Refusal::MethodNotAllowed);
            stream.close |= !harmless || !stream.request_done;
            let client = stream.client.and_then(|key| self.conns.get_mut(key)).and_then(Conn::client);
            if let Some(client) = client {
                client.refused += 1;
                if client.refused >= REFUSALS_PER_CONNECTION_MAX && !stream.close {
                    self.stats.counters.refusal_closes += 1;
                    stream.close = true;
                }
            }
            let extra = match refusal {
                // Some of their answers are other people's words: no browser is to guess what they are.
                _ if stream.durable.is_some() => "X-Content-Type-Options: nosniff\r\n",
                Refusal::MethodNotAllowed => "Allow: GET, HEAD, POST\r\n",
                _ => "",
            };
            write_error(stream, &fault, &mut self.scratch, self.date.at(unix_time_s), now_us, extra);
            stream.produced = true;
        }
        self.end_stream(key, End::Refused);
    }

    /// A whole answer of our own.
    pub(super) fn answer_json(&mut self, key: Key, status: u16, body: &[u8]) {
        self.answer_json_with(key, status, body, "");
    }

    /// The same with header lines.
    pub(super) fn answer_json_with(&mut self, key: Key, status: u16, body: &[u8], extra: &str) {
        let (now_us, unix_time_s) = (self.now_us, self.unix_time_s());
        let Some(stream) = self.streams.get_mut(key) else { return };
        write_answer(stream, status, body, &mut self.scratch, self.date.at(unix_time_s), now_us, extra);
        self.end_stream(key, End::Done);
    }

    /// An error in the dialect's form, the request being whole.
    pub(super) fn answer_error(&mut self, key: Key, fault: &Fault, extra: &str) {
        let (now_us, unix_time_s) = (self.now_us, self.unix_time_s());
        let Some(stream) = self.streams.get_mut(key) else { return };
        write_error(stream, fault, &mut self.scratch, self.date.at(unix_time_s), now_us, extra);
        stream.produced = true;
        self.end_stream(key, End::Done);
    }

    /// An answer without a body.
    pub(super) fn answer_empty(&mut self, key: Key, status: u16, extra: &str) {
        let (now_us, unix_time_s) = (self.now_us, self.unix_time_s());
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.status = status;
        stream.answer = Answer::Body(Framing::None);
        let mut lines = ExtraLines::new(self.date.at(unix_time_s));
        lines.push(stream.cors_lines());
        lines.push(extra);
        self.scratch.clear();
        write_own_response_head(
            &mut self.scratch,
            status,
            stream.version,
            !stream.close,
            Framing::None,
            lines.as_str(),
        );
        stream.append_response(&self.scratch, now_us);
        self.end_stream(key, End::Done);
    }

    /// Everything produced was confirmed sent.
    pub(super) fn delivered(&mut self, key: Key) {
        let Some(conn) = self.conns.get(key) else { return };
        let Some(stream_key) = conn.stream else { return };
        let Some(stream) = self.streams.get_mut(stream_key) else { return };
        let whole = stream.reader.is_some() || conn.ledger.sent() == stream.response.end();
        assert!(whole, "delivered means confirmed to the last byte");
        let (reset, close) = (stream.reset, stream.close || !stream.request_done);
        stream.step(Step::Delivered);
        self.settle(stream_key);
        if reset {
            self.join(key, Close::Reset);
        } else if close {
            self.linger(key);
        } else {
            self.next_request(key);
        }
    }

    /// Counts a stream that is over, reports it and frees it.
    pub(super) fn settle(&mut self, key: Key) {
        self.release_source(key);
        let Some(mut stream) = self.streams.remove(key) else { return };
        debug_assert!(stream.backend.is_none(), "a settled stream holds no backend");
        let end = stream.end.unwrap_or(End::ClientLeft);
        self.stats.ends[end as usize] += 1;
        self.overdraft_bytes -= stream.drawn;
        let mut sent_bytes = 0;
        if let Some(durable) = stream.durable.take() {
            sent_bytes += durable.shared_bytes;
            self.durable_settle(key, *durable);
        }
        let reader = stream.reader.take();
        if let Some(source) = stream.request().and_then(|request| request.waits_for) {
            self.waiter_left(source);
        }
        let duration_us = self.now_us - stream.started_us;
        if end == End::Done {
            self.stats.histograms.stream_us.saturating_record(duration_us);
        }
        if let Some((timer, _)) = stream.timer.take()
            && !is_planted(Bug::TimerLeft)
        {
            self.wheel.remove(timer);
        }
        let mut client_certificate = None;
        if let Some(conn) = stream.client.and_then(|key| self.conns.get_mut(key))
            && conn.stream == Some(key)
        {
            sent_bytes += conn.ledger.sent();
            if let (Some(tls), Some(_)) = (&conn.tls, &stream.description) {
                client_certificate = tls.peer_certificate().map(Box::from);
            }
            if conn.state == State::Open {
                conn.stream = None;
            }
        }
        if let Some(reader) = reader {
            self.reader_left(&reader);
        }
        stream.forget_request();
        if let Some(description) = stream.description.take() {
            if self.reports.len() >= RECORDS_PER_TURN_MAX {
                self.stats.counters.records_dropped += 1;
                return;
            }
            self.reports.push_back(Report::Ended(Box::new(StreamRecord {
                end,
                refusal: description.refusal,
                route: stream.route as u16,
                dialect: stream.dialect.name(),
                status: stream.status,
                client_certificate,
                request: description.request,
                model: description.model,
                upstream: description.upstream.map(|upstream| upstream as u16),
                events: stream.events_sent,
                sent_bytes,
                first_token_us: stream.first_token_us.get(),
                duration_us,
            })));
        }
    }
}

/// An error answer in the shape that the path's API uses.
fn write_error(
    stream: &mut Stream,
    fault: &Fault,
    scratch: &mut Vec<u8>,
    date: &str,
    now_us: u64,
    extra: &str,
) {
    let mut body = Vec::with_capacity(192);
    stream.dialect.write_error_body(fault, &mut body);
    stream.close |= !stream.request_done;
    let retry = if fault.status == 503 { "Retry-After: 1\r\n" } else { extra };
    write_answer(stream, fault.status, &body, scratch, date, now_us, retry);
}

#[allow(clippy::too_many_arguments, reason = "the parts of one answer")]
fn write_answer(
    stream: &mut Stream,
    status: u16,
    body: &[u8],
    scratch: &mut Vec<u8>,
    date: &str,
    now_us: u64,
    extra: &str,
) {
    let framing = Framing::Length(body.len() as u64);
    stream.status = status;
    stream.answer = Answer::Body(framing);
    scratch.clear();
    let mut lines = ExtraLines::new("Content-Type: application/json\r\n");
    lines.push(date);
    lines.push(extra);
    lines.push(stream.cors_lines());
    write_own_response_head(scratch, status, stream.version, !stream.close, framing, lines.as_str());
    if !stream.head_only {
        scratch.extend_from_slice(body);
    }
    stream.append_response(scratch, now_us);
}
