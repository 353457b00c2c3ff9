//! /status and the dump of SIGQUIT: a view as JSON for people and scripts.

use super::view::{ShardState, TlsView, View};
use crate::tls::certificate::date;
use crate::tls::status::{Authorities, CertificateStatus};
use protocol::durable::journal::JournalState;
use protocol::phase::{End, Phase};
use serde_json::{Map, Value, json};
use shard::stats::{SlowConnection, Snapshot};

/// Connections listed as the slowest of all shards.
const SLOWEST_MAX: usize = 10;

/// The state as one JSON object.
pub(crate) fn page(view: &View, unix_time_s: u64) -> Value {
    let plan = &view.fixed.plan;
    let started = plan.settings.unix_time_at_start_s;
    let snapshots: Vec<&Snapshot> = view.snapshots().collect();
    let shards: Vec<Value> =
        view.shards.iter().enumerate().map(|(index, state)| shard(view, index, state)).collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "state": view.stage.name(),
        "ready": view.unready().is_none(),
        "unready": view.unready().map(|(reason, message)| json!({ "reason": reason, "message": message })),
        "started_unix_s": started,
        "uptime_s": unix_time_s.saturating_sub(started),
        "listen": view.fixed.listening.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "tls": tls(view, &snapshots),
        "connections": snapshots.iter().map(|snapshot| snapshot.connections).sum::<usize>(),
        "streams": phases(&snapshots),
        "ends": ends(&snapshots),
        "pending_bytes": snapshots.iter().map(|snapshot| snapshot.pending_bytes).sum::<u64>(),
        "in_flight_bytes": snapshots.iter().map(|snapshot| snapshot.in_flight_bytes).sum::<u64>(),
        "slowest": slowest(&snapshots),
        "upstreams": upstreams(view, &snapshots),
        "routes": plan.settings.routes.iter().map(|route| json!({
            "name": route.name,
            "path": route.path_prefix,
            "upstreams": route.upstreams.iter().filter_map(|&index| plan.upstreams.get(index)).map(|url| &url.url).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
        "shards": shards,
        "memory_worst_case_bytes": plan.worst_case().total(),
        "log_lines_dropped": view.log_lines_dropped,
    })
}

fn journal(journal: &JournalState) -> Value {
    json!({
        "segments": journal.segments,
        "bytes": journal.bytes,
        "backlog_bytes": journal.backlog_bytes,
        "failing": journal.failing,
    })
}

fn shard(view: &View, index: usize, state: &ShardState) -> Value {
    let plan = &view.fixed.plan;
    let cpu = plan.cpus.get(index).copied().flatten();
    let ShardState::Answered(snapshot) = state else {
        let state = if matches!(state, ShardState::Gone) { "gone" } else { "silent" };
        return json!({ "shard": index, "cpu": cpu, "state": state });
    };
    let counters: Map<String, Value> = snapshot
        .stats
        .counters
        .all()
        .into_iter()
        .map(|(name, _, value)| {
            let short = name.trim_start_matches("tokenring_").trim_end_matches("_total");
            (short.to_owned(), value.into())
        })
        .collect();
    json!({
        "shard": index,
        "cpu": cpu,
        "state": if snapshot.draining { "draining" } else { "serving" },
        "connections": snapshot.connections,
        "tls_handshakes": snapshot.handshakes,
        "parked": snapshot.parked,
        "connections_max": plan.settings.connections_max,
        "upstream_connections": snapshot.upstream_connections,
        "streams": phases(&[snapshot]),
        "in_flight_bytes": snapshot.in_flight_bytes,
        "pending_bytes": snapshot.pending_bytes,
        "log_bytes": snapshot.log_bytes,
        "tls_bytes": snapshot.tls_bytes,
        "overdraft_bytes": snapshot.overdraft_bytes,
        "overdraft_bytes_max": plan.settings.overdraft_bytes_max,
        "kept": {
            "live": snapshot.kept.live,
            "over": snapshot.kept.over,
            "detached": snapshot.kept.detached,
            "readers": snapshot.kept.readers,
            "readers_waiting": snapshot.kept.waiting,
            "mirrors": snapshot.kept.mirrors,
            "bytes": snapshot.kept.bytes,
            "bytes_max": plan.settings.resume_bytes_max,
            "stored": snapshot.kept.stored,
            "unstored": snapshot.kept.unstored,
        },
        "durable": {
            "streams": snapshot.durable.streams,
            "bytes": snapshot.durable.bytes,
            "bytes_max": plan.settings.durable.store_bytes_max,
            "readers": snapshot.durable.readers,
        },
        "journal": snapshot.journal.as_ref().map(journal),
        "stream_journal": snapshot.stream_journal.as_ref().map(journal),
        "buffers_free": snapshot.buffers_free,
        "buffers": plan.settings.buffers,
        "ring_refusals": snapshot.ring_refusals.iter().sum::<u64>(),
        "timers": snapshot.timers,
        "counters": counters,
        "slowest": slowest(&[snapshot]),
    })
}

/// Certificates and how backends' are checked; `null` where nothing speaks TLS.
fn tls(view: &View, snapshots: &[&Snapshot]) -> Value {
    let plan = &view.fixed.plan;
    let TlsView { status, reloads, reload_failures, last_reload_unix_s, last_error, upstream_errors } =
        &*view.tls;
    if status.servers.is_empty() && status.clients.is_empty() {
        return Value::Null;
    }
    let listeners: Vec<Value> = view
        .tls_listeners()
        .map(|(address, server)| {
            json!({
                "address": address.to_string(),
                "versions": server.versions,
                "certificates": server.certificates.iter().map(certificate).collect::<Vec<_>>(),
                "client_auth": server.client_auth,
                "client_authorities": server.client_authorities.as_ref().map(authorities),
            })
        })
        .collect();
    let error = |(unix_s, error): &(u64, String)| json!({ "unix_s": unix_s, "error": error });
    let upstreams = plan.upstreams.iter().zip(&plan.upstream_tls).enumerate();
    let upstreams: Vec<Value> = upstreams
        .filter_map(|(index, (url, tls))| {
            let tls = tls.as_ref()?;
            let client = status.clients.get(tls.config)?;
            Some(json!({
                "url": url.url,
                "server_name": tls.name.to_str(),
                "tls_verification": if client.authorities.is_some() { "on" } else { "off" },
                "authorities": client.authorities.as_ref().map(authorities),
                "certificate": client.certificate.as_ref().map(certificate),
                "last_error": upstream_errors.get(index).and_then(Option::as_ref).map(error),
            }))
        })
        .collect();
    json!({
        "epoch": status.epoch,
        "handshakes": snapshots.iter().map(|snapshot| snapshot.handshakes).sum::<usize>(),
        "listeners": listeners,
        "upstreams": upstreams,
        "reloads": reloads,
        "reload_failures": reload_failures,
        "last_reload_unix_s": last_reload_unix_s,
        "last_error": last_error.as_ref().map(error),
        // What is wrong with the files as they are now; what was read before is in use.
        "refused": status.errors,
    })
}

fn certificate(certificate: &CertificateStatus) -> Value {
    let CertificateStatus { files, facts, remarks } = certificate;
    json!({
        "file": files.certificate.display().to_string(),
        "names": facts.names,
        "subject": facts.subject,
        "issuer": facts.issuer,
        "serial": facts.serial,
        "not_before_unix_s": facts.not_before_s,
        "not_after_unix_s": facts.not_after_s,
        "not_after": date(facts.not_after_s),
        "sha256": facts.fingerprint,
        "remarks": remarks,
    })
}

fn authorities(authorities: &Authorities) -> Value {
    json!({ "number": authorities.number, "source": authorities.source })
}

fn phases(snapshots: &[&Snapshot]) -> Value {
    let sum = |index: usize| snapshots.iter().map(|snapshot| snapshot.phases[index]).sum::<u64>();
    Phase::ALL
        .iter()
        .enumerate()
        .map(|(index, phase)| (phase.name().to_owned(), sum(index).into()))
        .collect::<Map<_, _>>()
        .into()
}

fn ends(snapshots: &[&Snapshot]) -> Value {
    let sum = |index: usize| snapshots.iter().map(|snapshot| snapshot.stats.ends[index]).sum::<u64>();
    End::ALL
        .iter()
        .enumerate()
        .map(|(index, end)| (end.name().to_owned(), sum(index).into()))
        .collect::<Map<_, _>>()
        .into()
}

fn slowest(snapshots: &[&Snapshot]) -> Vec<Value> {
    let mut all: Vec<(usize, &SlowConnection)> = snapshots
        .iter()
        .flat_map(|snapshot| snapshot.slowest.iter().map(|connection| (snapshot.shard, connection)))
        .collect();
    all.sort_by_key(|(_, connection)| std::cmp::Reverse(connection.pending_bytes));
    all.iter()
        .take(SLOWEST_MAX)
        .map(|(shard, connection)| {
            json!({
                "shard": shard,
                "peer": connection.peer.map(|peer| peer.to_string()),
                "pending_bytes": connection.pending_bytes,
                "in_flight_bytes": connection.in_flight_bytes,
                "phase": connection.phase.name(),
                "age_ms": connection.age_ms,
            })
        })
        .collect()
}

fn upstreams(view: &View, snapshots: &[&Snapshot]) -> Vec<Value> {
    let sum = |index: usize, of: fn(&shard::stats::UpstreamSnapshot) -> u64| -> u64 {
        snapshots.iter().filter_map(|snapshot| snapshot.upstreams.get(index)).map(of).sum()
    };
    view.upstreams
        .upstreams
        .iter()
        .enumerate()
        .map(|(index, upstream)| {
            json!({
                "url": upstream.url,
                "addresses": upstream.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "streams": sum(index, |upstream| upstream.active),
                "idle": sum(index, |upstream| upstream.idle),
                "failures": sum(index, |upstream| upstream.failures),
                "resolve_failures": view.resolve_failures.get(index),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::view::tests::{tls_view, view};
    use super::*;

    #[test]
    fn the_state_is_summed_and_the_slowest_come_first() {
        let mut view = view();
        view.shards.push(ShardState::Silent);
        let page = page(&view, 1_700_000_060);
        assert_eq!(page["state"], "serving");
        assert_eq!(page["ready"], false);
        assert_eq!(page["unready"]["reason"], "shard_silent");
        assert_eq!(page["uptime_s"], 60);
        assert_eq!(page["streams"]["head"], 2);
        assert_eq!(page["ends"]["done"], 10);
        assert_eq!(page["slowest"][0]["pending_bytes"], 200);
        assert_eq!(page["slowest"][0]["phase"], "paused");
        assert_eq!(page["upstreams"][0]["idle"], 4);
        assert_eq!(page["shards"][0]["counters"]["accepts"], 7);
        assert_eq!(page["shards"][2]["state"], "silent");
        assert_eq!(page["routes"][0]["upstreams"][0], "http://ab:1");
    }

    #[test]
    fn certificates_and_what_was_wrong_with_them_are_told() {
        assert_eq!(page(&view(), 1_700_000_060)["tls"], Value::Null);
        let page = page(&tls_view(), 1_700_000_060);
        let tls = &page["tls"];
        assert_eq!(
            (&tls["epoch"], &tls["reloads"], &tls["reload_failures"]),
            (&json!(1), &json!(3), &json!(2))
        );
        let listener = &tls["listeners"][0];
        assert_eq!(tls["listeners"].as_array().unwrap().len(), 1);
        assert_eq!(
            (&listener["address"], &listener["client_auth"]),
            (&json!("127.0.0.1:443"), &json!("required"))
        );
        assert_eq!(listener["client_authorities"]["number"], 1);
        assert_eq!(listener["certificates"][1]["names"], json!(["b.example"]));
        assert_eq!(listener["certificates"][1]["not_after"], "2100-01-01 00:00 UTC");
        assert_eq!(listener["certificates"][1]["sha256"].as_str().unwrap().len(), 64);
        let (model, open) = (&tls["upstreams"][0], &tls["upstreams"][1]);
        assert_eq!((&model["tls_verification"], &model["server_name"]), (&json!("on"), &json!("model")));
        assert_eq!(model["certificate"]["names"], json!(["client.example"]));
        assert_eq!(model["last_error"], json!({ "unix_s": 1_700_000_030, "error": "it has expired" }));
        assert_eq!((&open["tls_verification"], &open["authorities"]), (&json!("off"), &Value::Null));
        assert_eq!(tls["last_error"]["unix_s"], 1_700_000_040);
        assert_eq!(tls["refused"], json!(["a.pem: there is no such file"]));
    }
}
