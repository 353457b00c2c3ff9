//! A whole run as a value: what a seed draws, what is made smaller when it fails, and what is committed in `scripts/`.
//! Whatever a script does not name is as on a calm day.

use crate::backend::BackendHost;
use crate::client::{Client, ClientPlan};
use crate::control::Order;
use crate::plan::{Answer, Request};
use crate::rng::Rng;
use crate::run::{Finished, Sim, settings};
use crate::world::{Faults, Identity, Planted, Tongues};
use protocol::phase::Deadlines;
use protocol::planted::{Bug, plant};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shard::settings::{HalfClose, Listener, Settings};

/// One request of a client, and how it is answered.
#[derive(Clone, PartialEq, Default, Debug, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Ask {
    pub(crate) request: Request,
    pub(crate) answer: Answer,
}

#[derive(Clone, PartialEq, Default, Debug, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ClientScript {
    pub(crate) plan: ClientPlan,
    pub(crate) asks: Vec<Ask>,
}

/// The deadlines of both routes, ms.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Times {
    pub(crate) head_ms: u32,
    pub(crate) body_ms: u32,
    pub(crate) connect_ms: u32,
    pub(crate) upstream_head_ms: u32,
    pub(crate) first_token_ms: u32,
    pub(crate) between_tokens_ms: u32,
    pub(crate) total_ms: u32,
    pub(crate) write_stall_ms: u32,
    pub(crate) keep_alive_ms: u32,
    pub(crate) finish_ms: u32,
}

impl Default for Times {
    fn default() -> Self {
        let usual = Deadlines::default();
        Times {
            head_ms: usual.head_ms,
            body_ms: usual.body_ms,
            connect_ms: usual.connect_ms,
            upstream_head_ms: usual.upstream_head_ms,
            first_token_ms: usual.first_token_ms,
            between_tokens_ms: usual.between_tokens_ms,
            total_ms: usual.total_ms,
            write_stall_ms: usual.write_stall_ms,
            keep_alive_ms: usual.keep_alive_ms,
            finish_ms: usual.finish_ms,
        }
    }
}

impl Times {
    fn deadlines(&self) -> Deadlines {
        Deadlines {
            head_ms: self.head_ms,
            body_ms: self.body_ms,
            connect_ms: self.connect_ms,
            upstream_head_ms: self.upstream_head_ms,
            first_token_ms: self.first_token_ms,
            between_tokens_ms: self.between_tokens_ms,
            total_ms: self.total_ms,
            write_stall_ms: self.write_stall_ms,
            keep_alive_ms: self.keep_alive_ms,
            finish_ms: self.finish_ms,
        }
    }
}

/// What of the shard's settings a run varies.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Tuning {
    pub(crate) connections_max: usize,
    pub(crate) backlog: u32,
    pub(crate) buffers: u16,
    pub(crate) buffer_bytes: u32,
    pub(crate) lag_high_bytes: u64,
    pub(crate) pool_idle_max: usize,
    pub(crate) pool_idle_ms: u32,
    pub(crate) pool_age_ms: u32,
    pub(crate) serves_half_closed: bool,
    pub(crate) heartbeat_ms: u32,
    pub(crate) commit_ms: u32,
    pub(crate) times: Times,
}

impl Default for Tuning {
    fn default() -> Self {
        let usual = settings();
        Tuning {
            connections_max: usual.connections_max,
            backlog: usual.backlog,
            buffers: usual.buffers,
            buffer_bytes: usual.buffer_bytes,
            lag_high_bytes: usual.lag_high_bytes,
            pool_idle_max: usual.pool_idle_max,
            pool_idle_ms: usual.pool_idle_ms,
            pool_age_ms: usual.pool_age_ms,
            serves_half_closed: false,
            heartbeat_ms: usual.routes[0].heartbeat_ms,
            commit_ms: usual.routes[0].commit_ms,
            times: Times::default(),
        }
    }
}

impl Tuning {
    fn settings(&self) -> Settings {
        let mut settings = settings();
        settings.connections_max = self.connections_max;
        settings.backlog = self.backlog;
        settings.buffers = self.buffers;
        settings.buffer_bytes = self.buffer_bytes;
        settings.lag_high_bytes = self.lag_high_bytes;
        settings.lag_low_bytes = self.lag_high_bytes / 4;
        settings.pool_idle_max = self.pool_idle_max;
        settings.pool_idle_ms = self.pool_idle_ms;
        settings.pool_age_ms = self.pool_age_ms;
        for route in &mut settings.routes {
            route.deadlines = self.times.deadlines();
            route.half_close = if self.serves_half_closed { HalfClose::Serve } else { HalfClose::Leave };
            route.heartbeat_ms = self.heartbeat_ms;
            route.commit_ms = self.commit_ms;
        }
        settings
    }
}

/// One run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Script {
    /// Of the machine's own chances.
    pub(crate) seed: u64,
    pub(crate) listeners: usize,
    pub(crate) pipe_bytes: usize,
    pub(crate) faults: Faults,
    pub(crate) tuning: Tuning,
    pub(crate) hosts: Vec<BackendHost>,
    pub(crate) clients: Vec<ClientScript>,
    /// What the control thread does, and when, µs.
    pub(crate) orders: Vec<(u64, Order)>,
    pub(crate) commands_max: usize,
    pub(crate) reports_max: usize,
}

impl Default for Script {
    fn default() -> Self {
        Script {
            seed: 0,
            listeners: 1,
            pipe_bytes: 64 << 10,
            faults: Faults::default(),
            tuning: Tuning::default(),
            hosts: vec![BackendHost::default()],
            clients: Vec::new(),
            orders: Vec::new(),
            commands_max: shard::mesh::COMMANDS_MAX,
            reports_max: shard::mesh::REPORTS_MAX,
        }
    }
}

/// Turns that any run may take: for timers, heartbeats, connections that come and go.
const TURNS_OF_ANY_RUN: u64 = 50_000;
/// Turns for each piece of what a run carries: about half of one is usual, where a turn is given only two completions.
const TURNS_PER_PIECE: u64 = 2;
/// Bytes of a request's head, and what TLS takes of a connection and of each write.
const HEAD_BYTES: u64 = 500;
const TLS_HANDSHAKE_BYTES: u64 = 4_000;
const TLS_RECORD_BYTES: u64 = 30;

/// A bug to run a script with: one of the machine's, or one of the core's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum With {
    NoBug,
    Machine(Planted),
    Core(Bug),
}

impl With {
    /// Every bug there is.
    pub(crate) fn all() -> impl Iterator<Item = With> {
        let machine = Planted::ALL.iter().map(|&bug| With::Machine(bug));
        machine.chain(Bug::ALL.iter().map(|&bug| With::Core(bug)))
    }
}

/// Takes a planted bug out again, however the run ends.
struct Planting;

impl Planting {
    fn new(with: With) -> Self {
        if let With::Core(bug) = with {
            plant(Some(bug));
        }
        Planting
    }
}

impl Drop for Planting {
    fn drop(&mut self) {
        plant(None);
    }
}

impl Script {
    /// Runs to the end and asks the oracle; panics with what it finds.
    pub(crate) fn run(&self, with: With) -> Finished {
        self.run_with(with, |tuning, hosts| {
            Sim::with_listeners(self.seed, tuning, hosts, self.listeners.max(1))
        })
    }

    /// The same over TLS.
    pub(crate) fn run_secure(&self, tongues: Tongues, identity: &Identity) -> Finished {
        self.run_with(With::NoBug, |mut tuning, hosts| {
            tuning.listeners = vec![Listener { tls: Some(0) }; self.listeners.max(1)];
            Sim::secure(self.seed, tuning, hosts, tongues, identity)
        })
    }

    fn run_with(&self, with: With, sim: impl FnOnce(Settings, Vec<BackendHost>) -> Sim) -> Finished {
        let _planting = Planting::new(with);
        let mut hosts = self.hosts.clone();
        for (nth, host) in hosts.iter_mut().enumerate() {
            host.address = BackendHost::new(nth as u16).address;
        }
        let mut tuning = self.tuning.settings();
        let upstreams = hosts.iter().map(|host| host.upstream + 1).max().unwrap_or(1);
        tuning.routes[1].upstreams = (0..upstreams).collect();
        let mut sim = sim(tuning, hosts);
        if self.seed.is_multiple_of(5) {
            sim = sim.beside_a_mirror();
        }
        sim.lenience.impatient = self.tuning.times != Times::default();
        {
            let mut world = sim.world();
            world.faults = self.faults.clone();
            world.pipe_bytes = self.pipe_bytes.max(1);
            world.control.commands_max = self.commands_max.max(1);
            world.control.reports_max = self.reports_max;
            if let With::Machine(planted) = with {
                world.planted = Some(planted);
            }
            world.hosts_live();
            for (after_us, order) in &self.orders {
                world.add_order(*after_us, order.clone());
            }
        }
        for ClientScript { plan, asks } in &self.clients {
            let ids: Vec<usize> =
                asks.iter().map(|ask| sim.exchange(ask.request.clone(), ask.answer.clone())).collect();
            sim.client(ClientPlan { exchanges: ids, ..plan.clone() });
        }
        sim.world().break_later();
        sim.turns_max = self.turns_max(&sim);
        sim.finish()
    }

    /// A run in which everything goes on comes to its end within this. What there is to carry is received in pieces, of
    /// which a turn may be given as few as two and each may be a few bytes: a run of megabytes takes a million turns then.
    fn turns_max(&self, sim: &Sim) -> u64 {
        let world = sim.world();
        let secure = world.tongues.clients.is_some();
        let piece_bytes = self.faults.piece_bytes(world.buffer_bytes) as u64;
        let pieces = |bytes: u64, write_bytes: usize| {
            let writes = bytes / (Rng::skewed_mean(write_bytes as u64) + 1) + 1;
            let more = if secure { TLS_HANDSHAKE_BYTES + TLS_RECORD_BYTES * writes } else { 0 };
            (bytes + more) / piece_bytes + writes
        };
        let of_client = |client: &Client| {
            let of_exchange = |&id: &usize| {
                let exchange = &world.exchanges[id];
                pieces(exchange.body.len() as u64 + HEAD_BYTES, client.plan.write_bytes)
                    + pieces(exchange.wire.bytes.len() as u64, exchange.answer.piece_bytes)
            };
            client.plan.exchanges.iter().map(of_exchange).sum::<u64>()
        };
        TURNS_OF_ANY_RUN + TURNS_PER_PIECE * world.clients.iter().map(of_client).sum::<u64>()
    }

    /// Only what differs from a calm day.
    pub(crate) fn to_value(&self) -> Value {
        let mut value = json(self);
        for (key, calm) in
            [("hosts", json(&BackendHost::default())), ("clients", json(&ClientScript::default()))]
        {
            for element in elements(&mut value, key) {
                prune(element, &calm);
                for ask in elements(element, "asks") {
                    prune(ask, &json(&Ask::default()));
                }
            }
        }
        let mut calm = json(&Script::default());
        if let Some(calm) = calm.as_object_mut() {
            // One host of the usual kind, as it looks after the pruning.
            calm.insert("hosts".to_owned(), serde_json::json!([{}]));
        }
        prune(&mut value, &calm);
        value
    }

    pub(crate) fn of_value(value: &Value) -> Option<Script> {
        serde_json::from_value(value.clone()).ok()
    }
}

fn json(of: &impl Serialize) -> Value {
    serde_json::to_value(of).unwrap_or_default()
}

fn elements<'a>(value: &'a mut Value, key: &str) -> impl Iterator<Item = &'a mut Value> {
    value.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten()
}

/// Removes what is as in `calm`.
fn prune(value: &mut Value, calm: &Value) {
    let (Some(fields), Some(calm)) = (value.as_object_mut(), calm.as_object()) else { return };
    fields.retain(|key, field| {
        let Some(calm) = calm.get(key) else { return true };
        prune(field, calm);
        field != calm && !(calm.is_object() && field.as_object().is_some_and(|fields| fields.is_empty()))
    });
}

/// One line per field, client, host and order.
pub(crate) fn render(value: &Value) -> String {
    let mut text = "{\n".to_owned();
    let fields = value.as_object().into_iter().flatten();
    let lines: Vec<String> = fields
        .map(|(key, field)| match field.as_array() {
            Some(elements) => {
                let elements: Vec<String> = elements.iter().map(|element| format!("    {element}")).collect();
                format!("  \"{key}\": [\n{}\n  ]", elements.join(",\n"))
            }
            None => format!("  \"{key}\": {field}"),
        })
        .collect();
    text += &lines.join(",\n");
    text + "\n}\n"
}
