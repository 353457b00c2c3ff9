//! `tokenring streams`: what a data directory holds, without a server.

use crate::data_dir;
use crate::exit::{Exit, Fatal};
use protocol::durable::journal::{Recovered, StreamFacts};
use protocol::durable::relayed::RelayedFacts;
use protocol::resume::StreamId;
use shard::core::stream_id;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// What is asked of a data directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Question {
    pub(crate) directory: PathBuf,
    pub(crate) what: What,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum What {
    List,
    /// One stream, by its path.
    Show(String),
    /// What a read of it from its start would give.
    Export(String),
    Verify,
}

/// What is printed, and the exit code.
pub(crate) fn answer(question: &Question) -> Result<(Vec<u8>, Exit), Fatal> {
    let directory = &question.directory;
    let recovered = data_dir::read(directory)?;
    let relayed = Relayed::read(directory)?;
    let found = |path: &str| {
        let stream = recovered.streams().find(|stream| stream.path() == path && !stream.is_deleted());
        stream.ok_or_else(|| {
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
    Ok(match &question.what {
        What::List => {
            list(&recovered, &mut text);
            relayed.list(&mut text);
            (text.into_bytes(), Exit::Success)
        }
        What::Show(id) | What::Export(id) if relayed.find(id).is_some() => {
            let Some(stream) = relayed.find(id) else { return Ok((Vec::new(), Exit::Success)) };
            match question.what {
                What::Export(_) => (stream.content(), Exit::Success),
                _ => {
                    relayed.show(stream, &mut text);
                    (text.into_bytes(), Exit::Success)
                }
            }
        }
        What::Show(path) => {
            show(found(path)?, &mut text);
            (text.into_bytes(), Exit::Success)
        }
        What::Export(path) => {
            found(path)?;
            (recovered.content(path).unwrap_or_default(), Exit::Success)
        }
        What::Verify => {
            let exits = [verify(directory, &recovered, &mut text), relayed.verify(&mut text)];
            let damaged = exits.contains(&Exit::Damaged);
            (text.into_bytes(), if damaged { Exit::Damaged } else { Exit::Success })
        }
    })
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

// Writing to a String does not fail.
fn list(recovered: &Recovered, out: &mut String) {
    let width = recovered.streams().map(|stream| stream.path().len()).max().unwrap_or(0).max(4);
    writeln!(out, "{:<width$}  {:>10}  {:>12}  {:<6}  CONTENT TYPE", "PATH", "MESSAGES", "BYTES", "STATE")
        .ok();
    let mut streams: Vec<_> = recovered.streams().collect();
    streams.sort_by_key(|stream| stream.path());
    for stream in streams {
        let (messages, bytes) = held(stream);
        writeln!(
            out,
            "{:<width$}  {messages:>10}  {bytes:>12}  {:<6}  {}",
            stream.path(),
            state(stream),
            stream.content_type()
        )
        .ok();
    }
}

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

fn verify(directory: &Path, recovered: &Recovered, out: &mut String) -> Exit {
    if data_dir::is_in_use(directory) {
        writeln!(out, "a server writes this directory: its end is of a moment ago").ok();
    }
    for finding in &recovered.findings {
        writeln!(out, "{}", data_dir::describe(directory, finding)).ok();
    }
    let lost = recovered.findings.iter().filter(|finding| finding.lost).count();
    writeln!(
        out,
        "streams {}, records {}, segments {}, bytes {}: {}",
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
