//! What a load run found: counts, faults, latencies, and the window in which CPU is to be measured.

use std::collections::BTreeMap;
use std::io::Write as _;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::sequence::Faults as SequenceFaults;
use crate::tls::Agreed;

/// The longest latency that is told apart, in ns: two minutes.
const LATENCY_MAX_NS: u64 = 120_000_000_000;

/// The points of the curve from the median to the tail.
const QUANTILES: [f64; 17] = [
    0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999,
];

/// Latencies in ns, three significant digits.
pub struct Latency(Histogram<u64>);

impl Default for Latency {
    fn default() -> Self {
        Self(Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3).expect("constant bounds are valid"))
    }
}

impl Latency {
    /// Records one latency; what is longer than two minutes counts as two minutes.
    pub fn record(&mut self, ns: u64) {
        self.0.saturating_record(ns);
    }

    /// How many were recorded.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// The count, the mean, the percentiles, and the curve of all [`QUANTILES`] that enough latencies stand behind, in µs.
    pub fn summary(&self) -> Value {
        let us = |ns: u64| ns as f64 / 1000.0;
        json!({
            "count": self.0.len(),
            "mean_us": self.0.mean() / 1000.0,
            "p50_us": us(self.0.value_at_quantile(0.5)),
            "p90_us": us(self.0.value_at_quantile(0.9)),
            "p99_us": us(self.0.value_at_quantile(0.99)),
            "p999_us": us(self.0.value_at_quantile(0.999)),
            "max_us": us(self.0.max()),
            "curve_us": self.curve(),
        })
    }

    /// Pairs of a quantile and its latency in µs; at least ten lie beyond each.
    fn curve(&self) -> Vec<(f64, f64)> {
        let enough = |quantile: &f64| self.0.len() as f64 * (1.0 - quantile) >= 10.0;
        QUANTILES
            .into_iter()
            .filter(enough)
            .map(|quantile| (quantile, self.0.value_at_quantile(quantile) as f64 / 1000.0))
            .collect()
    }
}

/// What must not happen. Each field is a count of events or of streams.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Of the events' order and completeness.
    pub sequence: SequenceFaults,
    /// Streams that ended before their dialect's end: by a closed connection, a reset, broken framing, or well-framed.
    pub truncated: u64,
    /// Those of them that ended well-framed and without an error event, so that the client could take them for whole.
    pub silent: u64,
    /// Events after the dialect's end.
    pub after_done: u64,
    /// Streams with broken framing.
    pub malformed: u64,
    /// Error events.
    pub error_events: u64,
    /// Answers with another status than 200.
    pub status: u64,
    /// Connections that were reset.
    pub reset: u64,
    /// Connections that were refused.
    pub connect: u64,
    /// Connections on which TLS was refused, not trusted or broken.
    pub tls: u64,
    /// Streams that were still going when the time was up, grace included.
    pub unfinished: u64,
}

impl Faults {
    /// Each fault by its name.
    pub fn counts(&self) -> [(&'static str, u64); 14] {
        [
            ("lost", self.sequence.lost),
            ("doubled", self.sequence.doubled),
            ("reordered", self.sequence.reordered),
            ("foreign", self.sequence.foreign),
            ("truncated", self.truncated),
            ("silent", self.silent),
            ("after_done", self.after_done),
            ("malformed", self.malformed),
            ("error_events", self.error_events),
            ("status", self.status),
            ("reset", self.reset),
            ("connect", self.connect),
            ("tls", self.tls),
            ("unfinished", self.unfinished),
        ]
    }
}

/// TLS handshakes that succeeded.
#[derive(Default)]
pub struct Handshakes {
    full: u64,
    resumed: u64,
    /// How many agreed on which version, suite and key exchange.
    agreed: BTreeMap<String, u64>,
    /// From the connect to the handshake's end, within the window.
    took: Latency,
}

impl Handshakes {
    /// Counts one; `in_window_ns`: how long it took, if it is to be measured.
    pub fn see(&mut self, agreed: Agreed, in_window_ns: Option<u64>) {
        *(if agreed.resumed { &mut self.resumed } else { &mut self.full }) += 1;
        *self.agreed.entry(agreed.terms).or_default() += 1;
        if let Some(ns) = in_window_ns {
            self.took.record(ns);
        }
    }

    fn summary(&self) -> Value {
        json!({"full": self.full, "resumed": self.resumed, "agreed": self.agreed, "took": self.took.summary()})
    }
}

/// All that a run found.
#[derive(Default)]
pub struct Report {
    /// Requests begun.
    pub streams: u64,
    /// Streams with their dialect's end and a well-framed body.
    pub complete: u64,
    /// Streams that this side left on purpose.
    pub left: u64,
    /// Marked events.
    pub events: u64,
    /// Other events: roles, usage, a demo's words.
    pub events_other: u64,
    /// Events that had an `id` line.
    pub events_with_id: u64,
    /// Comment lines (heartbeats).
    pub comments: u64,
    /// Bytes received, heads and framing included.
    pub bytes: u64,
    /// Statuses other than 200.
    pub statuses: BTreeMap<u16, u64>,
    /// What went wrong.
    pub faults: Faults,
    /// From the time a request was to be sent to the first event.
    pub first: Latency,
    /// From the time a reader was to come back to the event that was the newest then.
    pub caught_up: Latency,
    /// From the time an event was to be sent, within the window.
    pub added: Latency,
    /// From the time the backend really wrote an event, within the window.
    pub hop: Latency,
    /// From the time an append was to be sent to its answer, within the window.
    pub answered: Latency,
    /// TLS handshakes.
    pub handshakes: Handshakes,
    /// The window, once it is over.
    pub window: Value,
}

impl Report {
    /// An empty report.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing went wrong but what is allowed by name.
    pub fn is_clean(&self, allow: &[String]) -> bool {
        self.faults
            .counts()
            .iter()
            .all(|(name, count)| *count == 0 || allow.iter().any(|allowed| allowed == name))
    }

    /// Prints one line of JSON, or a table.
    pub fn print(&self, as_json: bool) {
        let faults: serde_json::Map<String, Value> =
            self.faults.counts().iter().map(|(name, count)| ((*name).to_owned(), json!(count))).collect();
        let statuses: serde_json::Map<String, Value> =
            self.statuses.iter().map(|(status, count)| (status.to_string(), json!(count))).collect();
        if as_json {
            let result = json!({"result": {
                "streams": self.streams, "complete": self.complete, "left": self.left,
                "events": self.events, "events_other": self.events_other, "events_with_id": self.events_with_id,
                "comments": self.comments, "bytes": self.bytes, "statuses": statuses, "faults": faults,
                "first_event": self.first.summary(), "added": self.added.summary(), "hop": self.hop.summary(),
                "answered": self.answered.summary(), "caught_up": self.caught_up.summary(),
                "handshakes": self.handshakes.summary(), "window": self.window,
            }});
            return print_line(&result.to_string());
        }
        let mut table = format!(
            "streams {} · complete {} · left {} · events {} (other {}, with id {}) · comments {} · {} bytes\n",
            self.streams,
            self.complete,
            self.left,
            self.events,
            self.events_other,
            self.events_with_id,
            self.comments,
            self.bytes
        );
        let seen: Vec<String> = self
            .faults
            .counts()
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        table += &format!("faults: {}\n", if seen.is_empty() { "none".to_owned() } else { seen.join(" · ") });
        if !self.statuses.is_empty() {
            table += &format!("statuses: {:?}\n", self.statuses);
        }
        table += &format!("window: {}\n", self.window);
        if !self.handshakes.agreed.is_empty() {
            table += &format!("handshakes: {}\n", self.handshakes.summary());
        }
        table += "latency, µs        count         p50         p90         p99       p99.9         max";
        let latencies = [
            ("first event", &self.first),
            ("caught up", &self.caught_up),
            ("added", &self.added),
            ("hop", &self.hop),
            ("answered", &self.answered),
        ];
        for (name, latency) in latencies.into_iter().filter(|(_, latency)| latency.count() > 0) {
            let summary = latency.summary();
            table += &format!("\n{name:14}{:>10}", latency.count());
            for quantile in ["p50_us", "p90_us", "p99_us", "p999_us", "max_us"] {
                table += &format!("{:>12.1}", summary[quantile].as_f64().unwrap_or(0.0));
            }
        }
        print_line(&table);
    }
}

/// Prints at once, so that who reads the marks from a pipe has them in time. A reader that has gone is no fault of the run.
fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(line.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()).is_err()
    {
        eprintln!("{line}");
    }
}

/// The steady part of a run: latencies are recorded in it, and whoever reads the marks samples the servers' CPU at its edges.
pub struct Window {
    marks: bool,
    begin: Option<Edge>,
    planned_end_ns: Option<u64>,
    end: Option<Edge>,
}

#[derive(Clone, Copy)]
struct Edge {
    at_ns: u64,
    events: u64,
    bytes: u64,
    complete: u64,
}

impl Edge {
    fn new(at_ns: u64, report: &Report) -> Self {
        let events = report.events + report.events_other;
        Self { at_ns, events, bytes: report.bytes, complete: report.complete }
    }
}

impl Window {
    /// A window that has not begun; `marks`: print its edges.
    pub fn new(marks: bool) -> Self {
        Self { marks, begin: None, planned_end_ns: None, end: None }
    }

    /// Begins it.
    pub fn begin(&mut self, now: u64, report: &Report) {
        assert!(self.begin.is_none(), "a window begins once");
        self.begin = Some(Edge::new(now, report));
        self.print("begin", self.begin);
    }

    /// Sets when it is to end.
    pub fn plan_end(&mut self, at_ns: u64) {
        self.planned_end_ns = Some(at_ns);
    }

    /// When it is to end; `None` before it began, after it ended, and if it ends with the run.
    pub fn planned_end(&self) -> Option<u64> {
        self.planned_end_ns.filter(|_| self.is_open())
    }

    /// Ends it, unless it has ended or never began.
    pub fn end(&mut self, now: u64, report: &Report) {
        if self.is_open() {
            self.end = Some(Edge::new(now, report));
            self.print("end", self.end);
        }
    }

    /// Whether it has begun and not ended.
    pub fn is_open(&self) -> bool {
        self.begin.is_some() && self.end.is_none()
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.end.is_some()
    }

    /// Its length and what came in it.
    pub fn summary(&self) -> Value {
        let (Some(begin), Some(end)) = (self.begin, self.end) else { return Value::Null };
        let seconds = (end.at_ns - begin.at_ns) as f64 / 1e9;
        let events = end.events - begin.events;
        json!({
            "seconds": seconds,
            "events": events,
            "events_per_s": events as f64 / seconds,
            "bytes": end.bytes - begin.bytes,
            "complete": end.complete - begin.complete,
        })
    }

    fn print(&self, name: &str, edge: Option<Edge>) {
        if let (true, Some(edge)) = (self.marks, edge) {
            let Edge { at_ns, events, bytes, complete } = edge;
            println!(
                "{}",
                json!({"mark": name, "at_ns": at_ns, "events": events, "bytes": bytes, "complete": complete})
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_ends_where_too_few_latencies_stand_behind_it() {
        let mut latency = Latency::default();
        for us in 1..=1000 {
            latency.record(us * 1000);
        }
        let curve = latency.curve();
        assert_eq!(curve.last().map(|point| point.0), Some(0.99));
        assert!(curve.iter().all(|&(quantile, us)| (us / 1000.0 - quantile).abs() < 0.01), "{curve:?}");
        assert_eq!(Latency::default().curve(), []);
    }

    #[test]
    fn a_run_is_clean_only_without_faults_or_with_allowed_ones() {
        let mut report = Report::new();
        assert!(report.is_clean(&[]));
        report.faults.sequence.lost = 1;
        assert!(!report.is_clean(&["doubled".to_owned()]));
        assert!(report.is_clean(&["lost".to_owned()]));
    }

    #[test]
    fn a_window_counts_what_came_in_it() {
        let mut report = Report::new();
        let mut window = Window::new(false);
        report.events = 5;
        window.begin(1_000_000_000, &report);
        report.events = 15;
        window.end(3_000_000_000, &report);
        report.events = 99;
        window.end(9_000_000_000, &report);
        assert_eq!(window.summary()["events"], 10);
        assert_eq!(window.summary()["events_per_s"], 5.0);
    }
}
