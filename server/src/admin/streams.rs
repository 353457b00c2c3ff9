//! /streams: the streams that can be read by their ids, and the durable ones, of all shards. Page by page: a shard tells of some hundred at a
//! time, so that none is long at it.

use super::{Control, gone, json};
use axum::extract::State;
use axum::http::{StatusCode, Uri};
use axum::response::Response;
use protocol::durable::{StreamLine, home_of};
use protocol::resume::StreamId;
use serde_json::{Value, json};
use shard::listing::{Inquiry, KeptStream, Page, Place};
use shard::settings::Route;
use std::fmt;
use std::str::FromStr;

/// Streams of one answer, about; more by `limit`.
const LIMIT_DEFAULT: usize = 1_000;
const LIMIT_MAX: usize = 10_000;

/// Where a listing goes on, as it is told and given back.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Cursor {
    shard: usize,
    place: Place,
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.place.durable { 'd' } else { 'k' };
        write!(f, "{}-{kind}-{}", self.shard, self.place.slot)
    }
}

impl FromStr for Cursor {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('-');
        let (Some(shard), Some(kind), Some(slot), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(());
        };
        let durable = match kind {
            "k" => false,
            "d" => true,
            _ => return Err(()),
        };
        let place = Place { durable, slot: slot.parse().map_err(|_| ())? };
        Ok(Cursor { shard: shard.parse().map_err(|_| ())?, place })
    }
}

pub(super) async fn list(State(control): State<Control>, uri: Uri) -> Response {
    let Some(view) = control.view(false).await else { return gone() };
    let query = |name: &str| {
        let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(key, _)| *key == name).map(|(_, value)| value).next_back()
    };
    let cursor = query("after").map_or(Ok(Cursor::default()), str::parse);
    let limit = query("limit").map_or(Ok(LIMIT_DEFAULT), |text| text.parse().map_err(|_| ()));
    let (Ok(mut at), Ok(limit @ 1..)) = (cursor, limit) else {
        return refused(
            StatusCode::BAD_REQUEST,
            "bad_query",
            "`after` is the `next` of another answer, `limit` a number.",
        );
    };
    let settings = &view.fixed.plan.settings;
    let (shards, limit) = (view.fixed.plan.cpus.len(), limit.min(LIMIT_MAX));
    let (mut streams, mut silent) = (Vec::new(), Vec::new());
    while at.shard < shards && streams.len() < limit {
        let Some(page) = control.streams(at.shard, Inquiry::From(at.place)).await else {
            silent.push(at.shard);
            at = Cursor { shard: at.shard + 1, place: Place::default() };
            continue;
        };
        let now_unix_ms = now_unix_ms();
        streams.extend(entries(&page, at.shard, &settings.routes, now_unix_ms));
        at = match page.next {
            Some(place) => Cursor { place, ..at },
            None => Cursor { shard: at.shard + 1, place: Place::default() },
        };
    }
    let next = (at.shard < shards).then(|| at.to_string());
    json(StatusCode::OK, &json!({ "streams": streams, "next": next, "silent_shards": silent }))
}

pub(super) async fn show(State(control): State<Control>, uri: Uri) -> Response {
    let Some(view) = control.view(false).await else { return gone() };
    let settings = &view.fixed.plan.settings;
    // As it was sent: paths of streams are names.
    let which = uri.path().strip_prefix("/streams/").unwrap_or_default();
    let all = view.fixed.plan.cpus.len();
    // The shard that it names has it, unless the process before this one had more of them.
    let (first, inquiry) = match which.parse::<StreamId>() {
        Ok(id) => (usize::from(id.shard), Inquiry::Id(id)),
        // A fork may be elsewhere.
        Err(_) => {
            let path = format!("/{which}");
            (home_of(&path, all), Inquiry::Path(path))
        }
    };
    let shards = (0..all).map(|nth| (first + nth) % all);
    let mut silent = None;
    for shard in shards {
        let Some(page) = control.streams(shard, inquiry.clone()).await else {
            silent = Some(shard);
            continue;
        };
        if let Some(entry) = entries(&page, shard, &settings.routes, now_unix_ms()).next() {
            return json(StatusCode::OK, &entry);
        }
    }
    if let Some(shard) = silent {
        let message = format!("No answer from shard {shard}, which may have it.");
        return refused(StatusCode::SERVICE_UNAVAILABLE, "shard_silent", &message);
    }
    refused(StatusCode::NOT_FOUND, "stream_not_found", "There is no such stream, or none any more.")
}

fn refused(status: StatusCode, code: &str, message: &str) -> Response {
    json(status, &json!({ "error": { "code": code, "message": message } }))
}

fn now_unix_ms() -> u64 {
    u64::try_from(crate::clock::since_1970().as_millis()).unwrap_or(u64::MAX)
}

fn entries<'a>(
    page: &'a Page,
    shard: usize,
    routes: &'a [Route],
    now_unix_ms: u64,
) -> impl Iterator<Item = Value> + 'a {
    let kept = page.kept.iter().map(move |stream| kept(stream, shard, routes));
    kept.chain(page.durable.iter().map(move |stream| durable(stream, shard, now_unix_ms)))
}

fn kept(stream: &KeptStream, shard: usize, routes: &[Route]) -> Value {
    json!({
        "kind": "kept",
        "id": stream.id,
        "shard": shard,
        "route": routes.get(stream.route).map(|route| &route.name),
        "phase": stream.phase,
        "end": stream.end.map(|end| end.name()),
        "dialect": stream.dialect,
        "model": stream.model,
        "on_leave": stream.on_leave.to_string(),
        "background": stream.background,
        "readers": stream.readers,
        "earliest_event_id": stream.earliest_event_id,
        "last_event_id": stream.last_event_id,
        "bytes": stream.bytes,
        "held_bytes": stream.held_bytes,
        "pending_bytes": stream.pending_bytes,
        "age_ms": stream.age_ms,
        "quiet_ms": stream.quiet_ms,
    })
}

fn durable(stream: &StreamLine, shard: usize, now_unix_ms: u64) -> Value {
    json!({
        "kind": "durable",
        "path": stream.path,
        "shard": shard,
        "state": match (stream.deleted, stream.closed) {
            (true, _) => "deleted",
            (_, true) => "closed",
            _ => "open",
        },
        "content_type": stream.content_type,
        "readers": stream.readers,
        "earliest": stream.earliest.to_string(),
        "tail": stream.tail.to_string(),
        "messages": stream.messages,
        "held_bytes": stream.held_bytes,
        "memory_bytes": stream.memory_bytes,
        "age_ms": now_unix_ms.saturating_sub(stream.created_unix_ms),
        "idle_ms": stream.idle_ms,
        "forked_from": stream.source,
        "forks": stream.forks,
        "ttl_s": stream.ttl_s,
        "expires_at": stream.expires_at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_are_read_as_they_are_written() {
        for (shard, durable, slot) in [(0, false, 0), (3, true, 256), (1023, false, u32::MAX)] {
            let cursor = Cursor { shard, place: Place { durable, slot } };
            assert_eq!(cursor.to_string().parse(), Ok(cursor));
        }
        for none in ["", "1", "1-k", "1-x-1", "1-k-1-1", "-k-1", "1-k--1", "a-k-1"] {
            assert_eq!(none.parse::<Cursor>(), Err(()), "{none}");
        }
    }
}
