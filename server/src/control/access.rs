//! The access log: one line for every finished stream.

use crate::logs::ACCESS;
use crate::tls::certificate::Facts;
use shard::settings::{Settings, UpstreamSet};
use shard::stats::StreamRecord;

/// Logs a record of `shard`.
pub(super) fn log(shard: usize, record: &StreamRecord, settings: &Settings, upstreams: &UpstreamSet) {
    let route = settings.routes.get(usize::from(record.route)).map(|route| route.name.as_str());
    let upstream = record.upstream.and_then(|index| upstreams.upstreams.get(usize::from(index)));
    let upstream = upstream.map(|upstream| upstream.url.as_str());
    // A certificate that got through the handshake reads well; what no library of ours can read names nobody.
    let tenant = record.client_certificate.as_deref().and_then(|der| Facts::of(der).ok());
    let tenant = tenant.map(|facts| facts.subject);
    let first_token_ms = record.first_token_us.map(|us| us / 1000);
    log::info!(
        target: ACCESS,
        status = record.status,
        end = record.end.name(),
        refusal = record.refusal,
        route = route,
        upstream = upstream,
        tenant = tenant.as_deref(),
        dialect = record.dialect,
        model = record.model.as_deref(),
        events = record.events,
        sent_bytes = record.sent_bytes,
        first_token_ms = first_token_ms,
        duration_ms = record.duration_us / 1000,
        shard = shard;
        "{}",
        record.request
    );
}
