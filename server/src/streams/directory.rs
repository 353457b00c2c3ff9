//! What a data directory holds, without a server.

use super::{Out, Stopped, Tail, What, table};
use crate::data_dir;
use crate::exit::{Exit, Fatal};
use protocol::durable::journal::{Recovered, StreamFacts};
use protocol::durable::relayed::RelayedFacts;
use protocol::resume::StreamId;
use serde_json::{Value, json};
use shard::core::stream_id;
use std::fmt::Write;
use std::path::{Path, PathBuf};

pub(super) fn answer(directory: &Path, what: &What, out: &mut Out<'_>) -> Result<Exit, Stopped> {
    if matches!(what, What::Tail(Tail { follow: true, .. })) {
        return Err(Fatal::new(
            Exit::Usage,
            "a data directory does not tell when something is appended: to follow a stream, name its server (--server URL)",
        )
        .into());
    }
    let journals = data_dir::read_durable(directory)?;
    let relayed = Relayed::read(directory)?;
    let found = |path: &str| {
        let all =
            journals.iter().flat_map(|(_, journal)| journal.streams().map(move |stream| (stream, journal)));
        let those = all.filter(|(stream, _)| stream.path() == path && !stream.is_deleted());
        // Of two, one was being brought to another shard.
        those.min_by_key(|(stream, _)| stream.is_damaged()).ok_or_else(|| {
            Fatal::new(
                Exit::Usage,
                format!(
                    "data directory {}: there is no stream {path} (`tokenring streams list`)",
                    directory.display()
                ),
            )
        })
    };
    let mut text = String::new();
    match what {
        What::List { json: true } => {
            let streams: Vec<Value> = sorted(&journals).into_iter().map(facts).collect();
            text = format!("{:#}\n", json!({ "streams": streams, "relayed": relayed.all() }));
        }
        What::List { json: false } => {
            text = list(&journals);
            relayed.list(&mut text);
        }
        What::Show { which, json } if relayed.find(which).is_some() => {
            let Some(stream) = relayed.find(which) else { return Ok(Exit::Success) };
            match json {
                true => text = format!("{:#}\n", relayed.facts(stream)),
                false => relayed.show(stream, &mut text),
            }
        }
        What::Tail(Tail { which, .. }) | What::Export(which) if relayed.find(which).is_some() => {
            // The events, with their ids.
            let content = relayed.find(which).map(|stream| stream.content()).unwrap_or_default();
            let from = match what {
                What::Tail(tail) => start_of_last(&content, tail.last),
                _ => 0,
            };
            return out.put(&content[from..]).map(|()| Exit::Success);
        }
        What::Show { which, json: true } => text = format!("{:#}\n", facts(found(which)?.0)),
        What::Show { which, json: false } => show(found(which)?.0, &mut text),
        What::Tail(tail) => return last(found(&tail.which)?.0, tail, out),
        What::Export(path) => {
            let (_, journal) = found(path)?;
            out.put(&journal.content(path).unwrap_or_default())?;
        }
        What::Verify => {
            let exits = [verify(directory, &journals, &mut text), relayed.verify(&mut text)];
            let exit = if exits.contains(&Exit::Damaged) { Exit::Damaged } else { Exit::Success };
            return out.put(text.as_bytes()).map(|()| exit);
        }
    }
    out.put(text.as_bytes()).map(|()| Exit::Success)
}

/// Where the last so many events begin, each of which ends with a blank line.
fn start_of_last(content: &[u8], events: usize) -> usize {
    let ends: Vec<usize> =
        content.windows(2).enumerate().filter(|(_, two)| *two == b"\n\n").map(|(at, _)| at + 2).collect();
    if events < ends.len() { ends[ends.len() - 1 - events] } else { 0 }
}

/// The last messages that are held of its own, a line each.
fn last(stream: StreamFacts<'_>, tail: &Tail, out: &mut Out<'_>) -> Result<Exit, Stopped> {
    let messages: Vec<&[u8]> = stream.messages().collect();
    let mut lines = Vec::new();
    for message in &messages[messages.len().saturating_sub(tail.last)..] {
        lines.extend_from_slice(message);
        if !message.ends_with(b"\n") {
            lines.push(b'\n');
        }
    }
    out.put(&lines).map(|()| Exit::Success)
}

fn state(stream: StreamFacts<'_>) -> &'static str {
    match (stream.is_deleted(), stream.is_damaged(), stream.is_closed()) {
        (true, ..) => "deleted, kept for its forks",
        (_, true, _) => "damaged",
        (.., true) => "closed",
        _ => "open",
    }
}

fn held(stream: StreamFacts<'_>) -> (usize, u64) {
    let bytes = stream.tail().position - stream.earliest().position;
    (stream.messages().count(), bytes)
}

/// Journals, each with its directory.
type Journals = [(PathBuf, Recovered)];

fn sorted(journals: &Journals) -> Vec<StreamFacts<'_>> {
    let mut streams: Vec<_> = journals.iter().flat_map(|(_, journal)| journal.streams()).collect();
    streams.sort_by_key(|stream| (stream.path(), stream.created_unix_ms(), stream.is_damaged()));
    // Of two, one was being brought to another shard.
    streams.dedup_by_key(|stream| (stream.path(), stream.created_unix_ms()));
    streams
}

fn facts(stream: StreamFacts<'_>) -> Value {
    let (messages, bytes) = held(stream);
    json!({
        "path": stream.path(),
        "state": state(stream),
        "content_type": stream.content_type(),
        "created_unix_ms": stream.created_unix_ms(),
        "forked_from": stream.forked_from(),
        "earliest": stream.earliest().to_string(),
        "tail": stream.tail().to_string(),
        "messages": messages,
        "bytes": bytes,
        "segment": stream.segment(),
    })
}

fn list(journals: &Journals) -> String {
    let mut rows = vec![["PATH", "MESSAGES", "BYTES", "STATE", "CONTENT TYPE"].map(str::to_owned).to_vec()];
    for stream in sorted(journals) {
        let (messages, bytes) = held(stream);
        rows.push(vec![
            stream.path().to_owned(),
            messages.to_string(),
            bytes.to_string(),
            state(stream).to_owned(),
            stream.content_type().to_owned(),
        ]);
    }
    table(&rows, &[1, 2])
}

// Writing to a String does not fail.
fn show(stream: StreamFacts<'_>, out: &mut String) {
    let (messages, bytes) = held(stream);
    let mut line = |name: &str, value: &dyn std::fmt::Display| _ = writeln!(out, "{name:<13} {value}");
    line("path", &stream.path());
    line("content type", &stream.content_type());
    line("state", &state(stream));
    line("created", &crate::tls::certificate::date(stream.created_unix_ms() / 1000));
    if let Some(path) = stream.forked_from() {
        line("forked from", &path);
    }
    line("begins", &stream.earliest());
    line("ends", &stream.tail());
    line("messages", &messages);
    line("bytes", &bytes);
    line("segment", &stream.segment());
    for (id, epoch, sequence) in stream.producers() {
        line("producer", &format_args!("{id}, epoch {epoch}, sequence {sequence}"));
    }
}

fn verify(directory: &Path, journals: &Journals, out: &mut String) -> Exit {
    if data_dir::is_in_use(directory) {
        writeln!(out, "a server writes this directory: its end is of a moment ago").ok();
    }
    let mut exit = Exit::Success;
    for (path, recovered) in journals {
        let name = path.file_name().filter(|_| path != directory);
        let name = name.map(|name| format!("{}: ", name.display())).unwrap_or_default();
        if verify_one(path, &name, recovered, out) != Exit::Success {
            exit = Exit::Damaged;
        }
    }
    exit
}

fn verify_one(directory: &Path, name: &str, recovered: &Recovered, out: &mut String) -> Exit {
    for finding in &recovered.findings {
        writeln!(out, "{}", data_dir::describe(directory, finding)).ok();
    }
    let lost = recovered.findings.iter().filter(|finding| finding.lost).count();
    writeln!(
        out,
        "{name}streams {}, records {}, segments {}, bytes {}: {}",
        recovered.streams().count(),
        recovered.records,
        recovered.segments(),
        recovered.bytes(),
        match lost {
            0 => "nothing that was acknowledged is lost".to_owned(),
            lost => format!("{lost} damages"),
        }
    )
    .ok();
    if lost == 0 { Exit::Success } else { Exit::Damaged }
}

/// Streams relayed from models: the journals of all shards, and the key of their ids.
struct Relayed {
    journals: Vec<(PathBuf, Recovered)>,
    key: Option<[u8; 32]>,
}

impl Relayed {
    fn read(directory: &Path) -> Result<Self, Fatal> {
        Ok(Relayed { journals: data_dir::read_relayed(directory)?, key: data_dir::key_of_ids(directory) })
    }

    fn streams(&self) -> impl Iterator<Item = RelayedFacts<'_>> {
        self.journals.iter().flat_map(|(_, recovered)| recovered.relayed())
    }

    fn id(&self, stream: RelayedFacts<'_>) -> Option<StreamId> {
        let (shard, number) = stream.stream();
        self.key.map(|key| stream_id(&key, shard, number))
    }

    fn find(&self, id: &str) -> Option<RelayedFacts<'_>> {
        let id: StreamId = id.parse().ok()?;
        self.streams().find(|stream| self.id(*stream) == Some(id))
    }

    fn all(&self) -> Vec<Value> {
        self.streams().map(|stream| self.facts(stream)).collect()
    }

    fn facts(&self, stream: RelayedFacts<'_>) -> Value {
        let ((shard, _), (first, last), facts) = (stream.stream(), stream.ids(), stream.facts());
        json!({
            "id": self.id(stream).map(|id| id.to_string()),
            "shard": shard,
            "state": relayed_state(stream),
            "route": facts.route,
            "dialect": facts.dialect,
            "began_unix_ms": facts.began_unix_ms,
            "ended_unix_ms": stream.end().map(|(_, unix_ms)| unix_ms),
            "earliest_event_id": first,
            "last_event_id": last,
            "bytes": stream.bytes(),
            "segment": stream.segment(),
        })
    }

    fn list(&self, out: &mut String) {
        if self.streams().next().is_none() {
            return;
        }
        writeln!(out, "\n{:<35}  {:>10}  {:>12}  {:<22}  ROUTE", "ID", "LAST EVENT", "BYTES", "STATE").ok();
        for stream in self.streams() {
            let id = self.id(stream).map_or_else(|| format!("{:?}", stream.stream()), |id| id.to_string());
            let (last, state, route) = (stream.ids().1, relayed_state(stream), &stream.facts().route);
            writeln!(out, "{id:<35}  {last:>10}  {:>12}  {state:<22}  {route}", stream.bytes()).ok();
        }
    }

    fn show(&self, stream: RelayedFacts<'_>, out: &mut String) {
        let (facts, ids) = (stream.facts(), stream.ids());
        let mut line = |name: &str, value: &dyn std::fmt::Display| _ = writeln!(out, "{name:<13} {value}");
        if let Some(id) = self.id(stream) {
            line("id", &id);
        }
        line("shard", &stream.stream().0);
        line("state", &relayed_state(stream));
        line("route", &facts.route);
        line("dialect", &facts.dialect);
        line("began", &crate::tls::certificate::date(facts.began_unix_ms / 1000));
        if let Some((_, unix_ms)) = stream.end() {
            line("ended", &crate::tls::certificate::date(unix_ms / 1000));
        }
        if ids.0 <= ids.1 {
            line("events", &format_args!("{} to {}", ids.0, ids.1));
        }
        line("bytes", &stream.bytes());
        line("segment", &stream.segment());
    }

    fn verify(&self, out: &mut String) -> Exit {
        let mut exit = Exit::Success;
        for (path, recovered) in &self.journals {
            for finding in &recovered.findings {
                writeln!(out, "{}", data_dir::describe(path, finding)).ok();
            }
            let lost = recovered.findings.iter().filter(|finding| finding.lost).count();
            if lost > 0 {
                exit = Exit::Damaged;
            }
            let streams = recovered.relayed().count();
            writeln!(
                out,
                "{}: streams {streams}, records {}, segments {}, bytes {}: {}",
                path.file_name().unwrap_or_default().display(),
                recovered.records,
                recovered.segments(),
                recovered.bytes(),
                match lost {
                    0 => "nothing that was promised is lost".to_owned(),
                    lost => format!("{lost} damages"),
                }
            )
            .ok();
        }
        exit
    }
}

fn relayed_state(stream: RelayedFacts<'_>) -> &str {
    match stream.end() {
        _ if stream.is_damaged() => "damaged",
        Some((end, _)) => end,
        None => "under way",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_events_are_whole() {
        let content = b"id: 1\ndata: a\n\nid: 2\ndata: b\ndata:\n\nid: 3\ndata: c\n\n";
        let last =
            |events| content[start_of_last(content, events)..].split(|byte| *byte == b'\n').next().unwrap();
        assert_eq!(
            (last(1), last(2), last(3), last(9)),
            (&b"id: 3"[..], &b"id: 2"[..], &b"id: 1"[..], &b"id: 1"[..])
        );
        assert_eq!((start_of_last(content, 0), start_of_last(b"", 3)), (content.len(), 0));
    }
}
