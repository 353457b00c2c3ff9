//! The streams of a server that runs: asked on its admin address, and read where its clients read them.
//!
//! One address is enough: an admin address says where clients connect, and what concerns one stream alone a client may ask, too. Which of both
//! an address is, is found out by a question that no server passes on to a backend.

use super::http::{Client, Response};
use super::tail::follow;
use super::{Out, Stopped, What, table};
use crate::exit::{Exit, Fatal};
use crate::settings::address::{Host, ServerAddress, UpstreamUrl};
use protocol::resume::{STREAMS_PREFIX, StreamId};
use serde_json::Value;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What names a stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Which {
    Id(String),
    /// A durable stream's, prefix included.
    Path(String),
}

impl Which {
    fn of(text: &str) -> Result<Which, Fatal> {
        if text.starts_with('/')
            && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'?' && byte != b'#')
        {
            return Ok(Which::Path(text.to_owned()));
        }
        match text.parse::<StreamId>() {
            Ok(_) => Ok(Which::Id(text.to_owned())),
            Err(_) => Err(Fatal::new(
                Exit::Usage,
                format!(
                    "{text} is neither the id of a stream (Tokenring-Stream) nor the path of a durable one"
                ),
            )),
        }
    }

    /// Where its events are read.
    pub(super) fn events_path(&self) -> String {
        match self {
            Which::Id(id) => format!("{STREAMS_PREFIX}/{id}"),
            Which::Path(path) => path.clone(),
        }
    }
}

pub(super) fn answer(client: &Client, what: &What, out: &mut Out<'_>) -> Result<Exit, Stopped> {
    match what {
        What::List { json } => list(client, *json, out),
        What::Show { which, json } => {
            let facts = show(client, &Which::of(which)?)?;
            let text = if *json { format!("{facts:#}\n") } else { lines(&facts) };
            out.put(text.as_bytes()).map(|()| Exit::Success)
        }
        What::Tail(tail) => {
            let which = Which::of(&tail.which)?;
            follow(&Clients::of(client)?.0, &which, tail, out)
        }
        What::Export(which) => {
            let which = Which::of(which)?;
            let clients = Clients::of(client)?.0;
            match &which {
                Which::Path(path) => export_durable(&clients, path, out),
                Which::Id(id) => super::tail::export(&clients, id, out),
            }
        }
        What::Verify => Err(Fatal::new(Exit::Usage, "verify reads a data directory: --data-dir DIR").into()),
    }
}

pub(super) fn unreachable(client: &Client, error: &io::Error) -> Fatal {
    Fatal::unavailable(format!("{}: {error}", client.address))
}

pub(super) fn ask(client: &Client, method: &str, path: &str, fields: &str) -> Result<Response, Fatal> {
    client.ask(method, path, fields).map_err(|error| unreachable(client, &error))
}

/// Whether an address is one that clients use: it knows of streams by id, if only that there is none with this one.
fn is_for_clients(client: &Client) -> Result<bool, Fatal> {
    let (_, said) = get_json(client, &format!("{STREAMS_PREFIX}/-"))?;
    Ok(said.is_some_and(|said| said["error"]["code"] == "stream_not_found"))
}

fn get_json(client: &Client, path: &str) -> Result<(u16, Option<Value>), Fatal> {
    let mut response = ask(client, "GET", path, "")?;
    let body = response.whole().map_err(|error| unreachable(client, &error))?;
    Ok((response.status, serde_json::from_slice(&body).ok()))
}

/// What a server said why not, in its words.
pub(super) fn refusal(client: &Client, which: &Which, status: u16, body: Option<&Value>) -> Fatal {
    let error = body.map(|body| &body["error"]);
    let said = error.and_then(|error| error["message"].as_str()).unwrap_or("no reason was given");
    let exit = if status == 404 || status == 410 || status == 400 { Exit::Usage } else { Exit::Unavailable };
    Fatal::new(exit, format!("{}{}: {status}: {said}", client.address, which.events_path()))
}

// ---- the admin address

fn list(client: &Client, json: bool, out: &mut Out<'_>) -> Result<Exit, Stopped> {
    let elsewhere = || {
        Fatal::new(
            Exit::Usage,
            format!(
                "{} is not an admin address: a server lists its streams on the one of its --admin (http://127.0.0.1:9180 by default)",
                client.address
            ),
        )
    };
    if is_for_clients(client)? {
        return Err(elsewhere().into());
    }
    let mut rows = vec![
        ["STREAM", "STATE", "READERS", "FROM", "TO", "HELD", "AGE", "QUIET", "WHAT"]
            .map(str::to_owned)
            .to_vec(),
    ];
    let (mut after, mut all, mut silent) = (String::new(), Vec::new(), Vec::new());
    loop {
        let (status, page) = get_json(client, &format!("/streams{after}"))?;
        let page = page.filter(|page| status == 200 && page["streams"].is_array()).ok_or_else(elsewhere)?;
        for stream in page["streams"].as_array().into_iter().flatten() {
            if json { all.push(stream.clone()) } else { rows.push(row(stream)) }
        }
        for shard in page["silent_shards"].as_array().into_iter().flatten() {
            if !silent.contains(shard) {
                silent.push(shard.clone());
            }
        }
        match page["next"].as_str() {
            Some(next) => after = format!("?after={next}"),
            None => break,
        }
    }
    let text = match json {
        true => format!("{:#}\n", serde_json::json!({ "streams": all, "silent_shards": silent })),
        false => table(&rows, &[2, 3, 4, 5, 6, 7]),
    };
    out.put(text.as_bytes())?;
    if silent.is_empty() {
        return Ok(Exit::Success);
    }
    let shards: Vec<_> = silent.iter().map(Value::to_string).collect();
    Err(Fatal::unavailable(format!("no answer from shard {}: its streams are missing", shards.join(", ")))
        .into())
}

fn row(stream: &Value) -> Vec<String> {
    let word = |key: &str| match &stream[key] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let age = |key: &str| stream[key].as_u64().map_or(String::new(), duration);
    if stream["kind"] == "durable" {
        let bytes = stream["held_bytes"].as_u64().unwrap_or(0);
        let messages = format!("{} messages, {}", word("messages"), word("content_type"));
        return vec![
            word("path"),
            word("state"),
            word("readers"),
            String::new(),
            String::new(),
            size(bytes),
            age("age_ms"),
            age("idle_ms"),
            messages,
        ];
    }
    let state = match (word("phase"), word("end")) {
        (phase, end) if end.is_empty() => phase,
        (phase, end) => format!("{phase}: {end}"),
    };
    let what = [word("route"), word("dialect"), word("model")].into_iter().filter(|part| !part.is_empty());
    vec![
        word("id"),
        state,
        word("readers"),
        word("earliest_event_id"),
        word("last_event_id"),
        size(stream["held_bytes"].as_u64().unwrap_or(0)),
        age("age_ms"),
        age("quiet_ms"),
        what.collect::<Vec<_>>().join(" "),
    ]
}

fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{} s", ms / 1_000),
        60_000..3_600_000 => format!("{} min", ms / 60_000),
        _ => format!("{} h", ms / 3_600_000),
    }
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_024 => format!("{bytes} B"),
        1_024..1_048_576 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

fn show(client: &Client, which: &Which) -> Result<Value, Fatal> {
    if !is_for_clients(client)? {
        let name = match which {
            Which::Id(id) => format!("/{id}"),
            Which::Path(path) => path.clone(),
        };
        let (status, facts) = get_json(client, &format!("/streams{name}"))?;
        return match facts {
            Some(facts) if status == 200 => Ok(facts),
            facts => Err(refusal(client, which, status, facts.as_ref())),
        };
    }
    match which {
        Which::Id(_) => {
            let (status, facts) = get_json(client, &format!("{}/status", which.events_path()))?;
            match facts {
                Some(facts) if status == 200 => Ok(facts),
                facts => Err(refusal(client, which, status, facts.as_ref())),
            }
        }
        Which::Path(path) => {
            let response = ask(client, "HEAD", path, "")?;
            if response.status != 200 {
                return Err(refusal(client, which, response.status, None));
            }
            let field = |name: &str| response.field(name).map_or(Value::Null, Value::from);
            Ok(serde_json::json!({
                "kind": "durable",
                "path": path,
                "state": if response.field("stream-closed").is_some() { "closed" } else { "open" },
                "content_type": field("content-type"),
                "earliest": field("stream-earliest-offset"),
                "tail": field("stream-next-offset"),
                "ttl_s": field("stream-ttl"),
                "expires_at": field("stream-expires-at"),
            }))
        }
    }
}

/// `name value`, in the order of the object's keys.
fn lines(facts: &Value) -> String {
    let object = facts.as_object().into_iter().flatten();
    let rows: Vec<Vec<String>> = object
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| {
            let value = match value {
                Value::String(text) => text.clone(),
                Value::Array(items) => items.iter().map(Value::to_string).collect::<Vec<_>>().join(" "),
                other => other.to_string(),
            };
            vec![name.replace('_', " "), value]
        })
        .collect();
    table(&rows, &[])
}

// ---- where clients read

/// Where a server's clients connect.
pub(super) struct Clients(pub(super) Client);

impl Clients {
    /// An admin address says where that is.
    fn of(client: &Client) -> Result<Clients, Fatal> {
        if is_for_clients(client)? {
            return Ok(Clients(client.clone()));
        }
        let (_, status) = get_json(client, "/status")?;
        let status = status.filter(|status| status["listen"].is_array()).ok_or_else(|| {
            Fatal::new(Exit::Usage, format!("{} is not the address of a tokenring", client.address))
        })?;
        let secure: Vec<&str> = status["tls"]["listeners"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|one| one["address"].as_str())
            .collect();
        let plain = status["listen"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .find(|address| !secure.contains(address));
        let address: SocketAddr = plain.and_then(|address| address.parse().ok()).ok_or_else(|| {
            Fatal::new(
                Exit::Usage,
                format!(
                    "{} has no plain HTTP listener: name an address that clients use (--server https://…)",
                    client.address
                ),
            )
        })?;
        let here = match &client.address {
            ServerAddress::Url(UpstreamUrl { host, .. }) => host.clone(),
            ServerAddress::Unix(_) => Host::Address(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        };
        Ok(Clients(Client { address: reachable(address, here), authorities: client.authorities.clone() }))
    }
}

/// Where to connect to what listens on an address; on all of a machine's where the machine is known as `here`.
fn reachable(address: SocketAddr, here: Host) -> ServerAddress {
    let host = match address.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) | IpAddr::V6(Ipv6Addr::UNSPECIFIED) => match here {
            Host::Address(IpAddr::V6(address)) => format!("[{address}]"),
            Host::Address(address) => address.to_string(),
            Host::Name(name) => name,
        },
        IpAddr::V6(address) => format!("[{address}]"),
        address @ IpAddr::V4(_) => address.to_string(),
    };
    ServerAddress::parse(&format!("http://{host}:{}", address.port()))
        .unwrap_or_else(|error| unreachable!("an address that a server listens on: {error}"))
}

/// Page by page, as one.
fn export_durable(client: &Client, path: &str, out: &mut Out<'_>) -> Result<Exit, Stopped> {
    let which = Which::Path(path.to_owned());
    let mut offset = "-1".to_owned();
    let mut begun = false;
    let json = loop {
        let mut response = ask(client, "GET", &format!("{path}?offset={offset}"), "")?;
        let earliest = response.field("stream-earliest-offset").map(str::to_owned);
        let body = response.whole().map_err(|error| unreachable(client, &error))?;
        if response.status == 410 && !begun && earliest.as_ref().is_some_and(|earliest| *earliest != offset) {
            // From what there is.
            offset = earliest.unwrap_or_default();
            continue;
        }
        if response.status != 200 {
            let body = serde_json::from_slice(&body).ok();
            return Err(refusal(client, &which, response.status, body.as_ref()).into());
        }
        let json =
            response.field("content-type").is_some_and(|of| of.split(';').next() == Some("application/json"));
        match json {
            true => {
                let inside = body
                    .trim_ascii()
                    .strip_prefix(b"[")
                    .and_then(|body| body.strip_suffix(b"]"))
                    .unwrap_or(&body);
                if !inside.trim_ascii().is_empty() {
                    out.put(if begun { b"," } else { b"[" })?;
                    out.put(inside)?;
                    begun = true;
                }
            }
            false => {
                out.put(&body)?;
                begun = true;
            }
        }
        let next = response.field("stream-next-offset").unwrap_or_default().to_owned();
        if response.field("stream-up-to-date").is_some() || next == offset || next.is_empty() {
            break json;
        }
        offset = next;
    };
    if json {
        out.put(if begun { b"]" } else { b"[]" })?;
    }
    Ok(Exit::Success)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_named_by_id_or_path() {
        let id = "AAAAAQAAAAAAATcpzzuQpC5D3PSDqBJKjNo";
        assert_eq!(Which::of(id).unwrap().events_path(), format!("/v1/streams/{id}"));
        assert_eq!(Which::of("/v1/durable/a").unwrap(), Which::Path("/v1/durable/a".to_owned()));
        for none in ["", "a", "v1/durable/a", "/a?b", "/a b", "/a\r\nX: y"] {
            assert_eq!(Which::of(none).unwrap_err().exit, Exit::Usage, "{none}");
        }
    }

    #[test]
    fn what_listens_everywhere_is_reached_where_it_was_asked() {
        let of = |address: &str, here: &str| {
            let ServerAddress::Url(url) = ServerAddress::parse(here).unwrap() else { unreachable!() };
            reachable(address.parse().unwrap(), url.host).to_string()
        };
        assert_eq!(of("127.0.0.1:8080", "10.0.0.1:9180"), "http://127.0.0.1:8080");
        assert_eq!(of("0.0.0.0:8080", "10.0.0.1:9180"), "http://10.0.0.1:8080");
        assert_eq!(of("[::]:8080", "[::1]:9180"), "http://[::1]:8080");
        assert_eq!(of("0.0.0.0:8080", "host.example:9180"), "http://host.example:8080");
    }
}
