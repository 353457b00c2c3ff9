//! `tokenring serve`: binds, resolves, starts the shards, prints where it is, runs the control loop, and ends.

use crate::admin::view::Fixed;
use crate::admin::{self, QUESTIONS_MAX};
use crate::clock;
use crate::control::keeper::Keeper;
use crate::control::resolve::{self, ANSWERS_MAX, Answer};
use crate::control::{Control, Signals};
use crate::data_dir::DataDir;
use crate::doctor;
use crate::exit::{Exit, Fatal};
use crate::logs::{Format, Logs};
use crate::settings::address::format_cpus;
use crate::settings::load::Effective;
use crate::settings::plan::Plan;
use crate::settings::table;
use crate::settings::{Machine, descriptors_elsewhere, descriptors_per_client};
use crate::tls::Store;
use shard::host::{self, JournalPlan, ShardPlan, ShardThread, StreamJournalPlan};
use shard::mesh;
use shard::settings::{Settings, UpstreamSet};
use shard::uring;
use socket2::{Domain, Socket, Type};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;
use tokio::sync::mpsc;

/// How long the start waits for the upstreams' names; those not resolved by then are asked for on.
const RESOLVE_AT_START: Duration = Duration::from_secs(3);
/// How long a shard's thread may take to end after its shard has left.
const JOIN_LIMIT: Duration = Duration::from_secs(2);
/// Descriptors reserved at start at most: a table for a million costs 8 MiB of kernel memory, and is all that fs.nr_open allows
/// by default.
const DESCRIPTORS_RESERVED_MAX: u64 = 1 << 20;
/// How long the last log lines are waited for.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Serves until told to end.
pub(crate) fn serve(effective: &Effective, machine: &Machine) -> Result<Exit, Fatal> {
    let values = &effective.values;
    let format = if values.choice(&table::LOG_FORMAT) == "json" { Format::Json } else { Format::Text };
    let logs = Logs::install(values.log_filter(&table::LOG_LEVEL), format).map_err(Fatal::unavailable)?;
    log_panics(logs.clone());
    let result = run(effective, machine, &logs);
    logs.flush(FLUSH_LIMIT);
    result
}

fn run(effective: &Effective, machine: &Machine, logs: &Logs) -> Result<Exit, Fatal> {
    let limit = match uring::raise_nofile() {
        Ok((before, now)) => {
            if before < now {
                log::info!("descriptor limit raised from {before} to {now}");
            }
            now
        }
        Err(error) => {
            log::warn!("cannot raise the descriptor limit: {error}");
            1024
        }
    };
    let mut seed = [0; 8];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Fatal::internal(format!("getrandom: {error}")))?;
    let mut plan = Plan::new(effective, machine, clock::since_1970().as_secs(), u64::from_ne_bytes(seed));
    // Without a data directory, ids of streams are good for the life of the process, as the streams are.
    rustix::rand::getrandom(&mut plan.settings.stream_key, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Fatal::internal(format!("getrandom: {error}")))?;
    let worst = plan.worst_case().total();
    if worst > machine.memory {
        log::info!(
            "hostile clients and backends could make it use {} MiB, and there are {} MiB: `tokenring check` shows what for",
            worst >> 20,
            machine.memory >> 20
        );
    }
    let store =
        Store::load(&plan.tls).map_err(|problems| Fatal::new(Exit::Configuration, problems.join("\n")))?;
    let keeper = Keeper::new(store, &plan, clock::now(), clock::since_1970().as_secs());
    let data_dir = plan.data_dir.as_deref().map(DataDir::open).transpose()?;
    let shards = plan.cpus.len() as u64;
    let connections = shards * plan.settings.connections_max as u64;
    let per_client = descriptors_per_client(!plan.upstreams.is_empty());
    let descriptors = descriptors_elsewhere(shards) + connections * per_client;
    if let Err(error) = uring::reserve_descriptors(descriptors.min(limit).min(DESCRIPTORS_RESERVED_MAX)) {
        log::warn!("cannot reserve {descriptors} descriptors: {error}");
    }
    // Before anything is bound, and before glommio, which panics where the kernel refuses io_uring. Few descriptors are no
    // obstacle: their number was checked against the settings.
    if uring::probe().iter().any(|item| !item.ok && item.name != uring::DESCRIPTORS_ITEM) {
        return Err(refused("this machine lacks what the data plane needs"));
    }
    let (listening, listeners) = bind(&plan.listen, plan.cpus.len(), &plan.settings)?;
    let admin = admin::bind(&plan.admin)?;
    let journals = data_dir.as_ref().map(|data_dir| journals(data_dir, plan.cpus.len())).transpose()?;
    let mut journals = journals.into_iter().flatten();
    let stream_journals =
        data_dir.as_ref().map(|data_dir| stream_journals(data_dir, &mut plan)).transpose()?;
    let mut stream_journals = stream_journals.into_iter().flatten();

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fatal::internal(format!("cannot start the control thread: {error}")))?;
    let (exit, threads) = runtime.block_on(async {
        // From here on signals are kept for the control loop.
        let signals = Signals::new().map_err(|error| Fatal::internal(format!("signals: {error}")))?;
        let (answer_sender, mut answers) = mpsc::channel(ANSWERS_MAX);
        let names = resolve::start(&plan.upstreams, &answer_sender);
        let (upstreams, failed) = first_upstreams(&plan, names, &mut answers).await;

        // The shards count on from here; what the names took is not to put their clocks back.
        let since_1970 = clock::since_1970();
        let settings = Arc::new(Settings {
            unix_time_at_start_s: since_1970.as_secs(),
            unix_time_at_start_ms: since_1970.subsec_millis(),
            ..plan.settings.clone()
        });
        let upstreams = Arc::new(upstreams);
        let tls = Arc::new(keeper.set());
        let name = keeper.name();
        let (mut ports, mut shard_ports) = (Vec::new(), Vec::new());
        for _ in &plan.cpus {
            let (port, shard_port) =
                mesh::mailbox().map_err(|error| Fatal::internal(format!("a shard's mailbox: {error}")))?;
            ports.push(port);
            shard_ports.push(shard_port);
        }
        let mut neighbours = mesh::neighbours(&shard_ports).into_iter();
        let several = shard_ports.len() > 1;
        let mut threads = Vec::new();
        for (index, (listeners, port)) in listeners.into_iter().zip(shard_ports).enumerate() {
            let (journal, forks) = journals.next().unzip();
            let forks = forks.unwrap_or_default();
            let plan = ShardPlan {
                index,
                cpu: plan.cpus[index],
                settings: Arc::clone(&settings),
                upstreams: Arc::clone(&upstreams),
                tls: Arc::clone(&tls),
                listeners,
                port,
                neighbours: neighbours.next().filter(|_| several),
                journal,
                forks,
                stream_journal: stream_journals.next(),
            };
            threads.push(host::spawn(plan).map_err(|error| refused(&format!("shard {index}: {error}")))?);
        }
        let fixed = Arc::new(Fixed { plan, listening });
        let mut control = Control::new(ports, Arc::clone(&fixed), upstreams, keeper, logs.clone())
            .map_err(|error| Fatal::internal(format!("the shards' mailboxes: {error}")))?;
        control.count_failures(&failed);
        control.started().await.map_err(|fatal| match fatal.exit {
            Exit::Unavailable => refused(&fatal.message),
            _ => fatal,
        })?;

        let (question_sender, questions) = mpsc::channel(QUESTIONS_MAX);
        if let Some(admin) = &admin {
            admin.serve(question_sender)?;
        }
        let admin = admin.as_ref().map_or("off", |admin| admin.address.as_str());
        // A closed stdout is no reason not to serve.
        std::io::stdout().write_all(banner(&fixed, admin, name.as_deref()).as_bytes()).ok();
        Ok::<_, Fatal>((control.run(signals, questions, answers).await, threads))
    })?;
    runtime.shutdown_background();
    join(threads);
    Ok(exit)
}

/// Paths at which there are forks on other shards, each with its shard.
type Forks = Vec<(Box<str>, usize)>;

/// What a data directory holds of durable streams, for each shard, which goes on writing it.
fn journals(data_dir: &DataDir, shards: usize) -> Result<Vec<(JournalPlan, Forks)>, Fatal> {
    let recovered = data_dir.recover(shards)?;
    let mut forks: Vec<Forks> = vec![Vec::new(); shards];
    for (own, (_, recovered)) in recovered.iter().enumerate() {
        for (path, home) in recovered.paths_away(shards, own) {
            forks[home].push((path.into(), own));
        }
    }
    let plan = |(directory, recovered)| Ok(JournalPlan { directory, recovered, salt: random_salt()? });
    recovered.into_iter().map(plan).zip(forks).map(|(plan, forks)| Ok((plan?, forks))).collect()
}

/// The same of relayed streams, for each shard; their ids go on.
fn stream_journals(data_dir: &DataDir, plan: &mut Plan) -> Result<Vec<StreamJournalPlan>, Fatal> {
    let (recovered, given) = data_dir.recover_relayed(plan.cpus.len())?;
    let ids = data_dir.ids(given)?;
    (plan.settings.stream_key, plan.settings.stream_number_first) = (ids.key, ids.first);
    let of_shard = |(directory, recovered)| {
        let journal = JournalPlan { directory, recovered, salt: random_salt()? };
        Ok(StreamJournalPlan { journal, reserved: ids.reserved })
    };
    recovered.into_iter().map(of_shard).collect()
}

pub(crate) fn random_salt() -> Result<u32, Fatal> {
    let mut salt = [0; 4];
    rustix::rand::getrandom(&mut salt, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Fatal::internal(format!("getrandom: {error}")))?;
    Ok(u32::from_ne_bytes(salt))
}

/// Every address once per shard. Without a port of its own, an address takes the one its first listener got.
fn bind(
    addresses: &[SocketAddr],
    shards: usize,
    settings: &Settings,
) -> Result<(Vec<SocketAddr>, Vec<Vec<TcpListener>>), Fatal> {
    let mut bound = Vec::new();
    let mut listeners: Vec<Vec<TcpListener>> = (0..shards).map(|_| Vec::new()).collect();
    for &address in addresses {
        let fatal = |error: std::io::Error| {
            Fatal::unavailable(format!(
                "cannot listen on {address}: {error} (--listen takes another address)"
            ))
        };
        let mut target = address;
        if address.port() != 0 {
            is_free(address).map_err(fatal)?;
        }
        for own in &mut listeners {
            let listener =
                uring::listen(target, settings.backlog, settings.notsent_lowat_bytes).map_err(fatal)?;
            target = listener.local_addr().map_err(fatal)?;
            own.push(listener);
        }
        bound.push(target);
    }
    Ok((bound, listeners))
}

/// With SO_REUSEPORT two processes of one user could share a port without noticing, and split the clients between them. So
/// the address is first bound without it, not listening, which nobody else's listener allows.
fn is_free(address: SocketAddr) -> std::io::Result<()> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())
}

/// The upstreams with every address found within [`RESOLVE_AT_START`], and which names failed once.
async fn first_upstreams(
    plan: &Plan,
    names: usize,
    answers: &mut mpsc::Receiver<Answer>,
) -> (UpstreamSet, Vec<usize>) {
    let mut set = resolve::initial(&plan.upstreams, &plan.upstream_tls);
    let mut failed = Vec::new();
    let mut heard = std::collections::HashSet::new();
    let until = clock::now() + RESOLVE_AT_START;
    while heard.len() < names {
        tokio::select! {
            Some(answer) = answers.recv() => {
                heard.insert(answer.upstream);
                if answer.result.is_err() {
                    failed.push(answer.upstream);
                }
                set = resolve::apply(&set, &answer).unwrap_or(set);
            }
            () = tokio::time::sleep_until(until.into()) => {
                log::warn!("{} upstream names are not resolved yet; starting without them", names - heard.len());
                break;
            }
        }
    }
    set.epoch = 1;
    (set, failed)
}

/// A start that the kernel refused: with everything that is missing and its remedy.
fn refused(why: &str) -> Fatal {
    let mut lines = vec![format!("cannot start: {why}")];
    lines.extend(doctor::missing(&uring::probe()));
    lines.push("`tokenring doctor` shows what this machine lacks".to_owned());
    Fatal::unavailable(lines.join("\n"))
}

/// What is printed once everything accepts. `name`: one that a certificate is for.
fn banner(fixed: &Fixed, admin: &str, name: Option<&str>) -> String {
    let plan = &fixed.plan;
    let of = |index: usize| plan.settings.listeners.get(index).and_then(|listener| listener.tls);
    let scheme = |index| if of(index).is_some() { "https" } else { "http" };
    let listening = fixed.listening.iter().enumerate();
    let addresses: Vec<_> =
        listening.map(|(index, address)| format!("{}://{address}", scheme(index))).collect();
    let pinned: Vec<usize> = plan.cpus.iter().copied().flatten().collect();
    let shards = match (plan.cpus.len(), pinned.len()) {
        (1, 0) => "1, on any CPU".to_owned(),
        (1, _) => format!("1, on CPU {}", format_cpus(&pinned)),
        (shards, 0) => format!("{shards}, on any CPU"),
        (shards, _) => format!("{shards}, on CPUs {}", format_cpus(&pinned)),
    };
    let upstreams: Vec<_> = plan.upstreams.iter().map(|url| url.url.as_str()).collect();
    let upstreams = if upstreams.is_empty() {
        "none: the built-in demo model answers".to_owned()
    } else {
        upstreams.join(" ")
    };
    let model = if plan.upstreams.is_empty() { "demo" } else { "MODEL" };
    let plain = (0..fixed.listening.len()).find(|&index| of(index).is_none());
    let address = fixed.listening.get(plain.unwrap_or(0)).copied().map(reachable);
    let address = address.map(|address| address.to_string()).unwrap_or_default();
    let curl = match (plain, name) {
        (Some(_), _) => format!("curl -N http://{address}"),
        // The name that the certificate is for, wherever it leads to.
        (None, Some(name)) => format!("curl -N --connect-to ::{address} https://{name}"),
        (None, None) => format!("curl -N https://{address}"),
    };
    format!(
        "tokenring {version}\n\
         \x20 listening  {addresses}\n\
         \x20 shards     {shards}\n\
         \x20 upstreams  {upstreams}\n\
         \x20 admin      {admin}\n\
         {data}\
         \n\
         \x20 {curl}/v1/chat/completions -H 'Content-Type: application/json' \\\n\
         \x20   -d '{{\"model\":\"{model}\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}]}}'\n\
         \n",
        version = env!("CARGO_PKG_VERSION"),
        addresses = addresses.join(" "),
        data = plan
            .data_dir
            .as_ref()
            .map(|path| format!("  data       {}\n", path.display()))
            .unwrap_or_default(),
    )
}

/// The address a client on this machine would use.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// Waits for the shards' threads, but not for ever: one that hangs is left to the end of the process.
fn join(threads: Vec<ShardThread>) {
    let (done, wait) = sync_channel(1);
    let joiner = std::thread::Builder::new().name("join".to_owned()).spawn(move || {
        for (shard, thread) in threads.into_iter().enumerate() {
            if let Err(error) = thread.join() {
                log::error!("shard {shard}: {error}");
            }
        }
        // Nobody waits any more when this fails.
        done.send(()).unwrap_or(());
    });
    if !matches!(joiner.map(|_| wait.recv_timeout(JOIN_LIMIT)), Ok(Ok(()))) {
        log::warn!("a shard's thread does not end; leaving without it");
    }
}

/// A panic anywhere ends the process with 70, after its message is logged.
fn log_panics(logs: Logs) {
    std::panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        log::error!("thread {} panicked: {panic}", thread.name().unwrap_or("?"));
        logs.flush(FLUSH_LIMIT);
        std::process::exit(i32::from(Exit::Internal as u8));
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::load::tests::{load_with, machine};

    #[test]
    fn the_banner_says_where_and_how_to_try() {
        let plan =
            |flags: &[(&'static str, &str)]| Plan::new(&load_with(flags, &[], "").unwrap(), &machine(), 1, 1);
        let fixed =
            Fixed { plan: plan(&[("cpus", "0-2")]), listening: vec![SocketAddr::from(([0, 0, 0, 0], 8080))] };
        let text = banner(&fixed, "off", None);
        assert!(text.contains("listening  http://0.0.0.0:8080\n  shards     3, on CPUs 0-2\n"), "{text}");
        assert!(
            text.contains("upstreams  none: the built-in demo model answers\n  admin      off\n"),
            "{text}"
        );
        assert!(text.contains("curl -N http://127.0.0.1:8080/v1/chat/completions"), "{text}");
        let tls = [("listen-tls", "0.0.0.0:443"), ("tls-cert", "a"), ("tls-key", "b")];
        let fixed = Fixed { plan: plan(&tls), listening: vec![SocketAddr::from(([0, 0, 0, 0], 443))] };
        let text = banner(&fixed, "off", Some("chat.example"));
        assert!(text.contains("listening  https://0.0.0.0:443\n"), "{text}");
        assert!(
            text.contains("curl -N --connect-to ::127.0.0.1:443 https://chat.example/v1/chat/"),
            "{text}"
        );
    }

    /// This test's own process, started anew, is the child that panics.
    #[test]
    fn a_panic_of_any_thread_ends_the_process_with_its_message() {
        const CHILD: &str = "TOKENRING_TEST_PANICS";
        if std::env::var_os(CHILD).is_some() {
            log_panics(Logs::install("info", Format::Text).unwrap());
            let shard = std::thread::Builder::new().name("shard-7".to_owned());
            shard.spawn(|| panic!("an assertion of this test")).unwrap().join().ok();
            unreachable!("the hook ends the process");
        }
        let own = std::env::current_exe().unwrap();
        let name = "serve::tests::a_panic_of_any_thread_ends_the_process_with_its_message";
        let mut child = std::process::Command::new(own);
        let output = child.args(["--exact", name, "--nocapture"]).env(CHILD, "1").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(Exit::Internal as i32), "{said}");
        assert!(
            said.contains("thread shard-7 panicked") && said.contains("an assertion of this test"),
            "{said}"
        );
    }

    #[test]
    fn a_port_of_zero_is_the_same_for_every_shard() {
        let settings = Plan::new(&load_with(&[], &[], "").unwrap(), &machine(), 1, 1).settings;
        let (bound, listeners) = bind(&[SocketAddr::from(([127, 0, 0, 1], 0))], 3, &settings).unwrap();
        assert!(bound[0].port() > 0);
        assert!(listeners.iter().flatten().all(|listener| listener.local_addr().unwrap() == bound[0]));
        let error = bind(&bound, 1, &settings).unwrap_err();
        assert_eq!(error.exit, Exit::Unavailable, "a port shared with another server is refused");
    }
}
