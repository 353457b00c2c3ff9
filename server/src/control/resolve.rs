//! Turns upstream names into addresses: once at start, then whenever a name's time to live is over. Address literals and
//! `localhost` never ask anybody.

use crate::settings::address::{Host, UpstreamUrl};
use hickory_resolver::Resolver;
use hickory_resolver::config::{LookupIpStrategy, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::name_server::TokioConnectionProvider;
use shard::settings::{Upstream, UpstreamSet, UpstreamTls};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Answers waiting for the control loop.
pub(crate) const ANSWERS_MAX: usize = 64;
/// The shortest time between two look-ups of a name: a time to live of 0 does not mean a flood.
const TTL_MIN: Duration = Duration::from_secs(1);
/// The longest: names out of /etc/hosts live for ever, and files change.
const TTL_MAX: Duration = Duration::from_secs(3600);
/// Pause after a failed look-up, doubling up to the second figure.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// One query to one name server, and how often it is repeated.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);
const QUERY_ATTEMPTS: usize = 2;
/// Addresses of one upstream; a shard tries them in turn within one connect deadline.
const ADDRESSES_MAX: usize = 64;

/// What a look-up of an upstream's name found.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Index of the upstream.
    pub(crate) upstream: usize,
    pub(crate) result: Result<Vec<SocketAddr>, String>,
}

/// The upstreams with the addresses that need no look-up.
pub(crate) fn initial(urls: &[UpstreamUrl], tls: &[Option<UpstreamTls>]) -> UpstreamSet {
    let upstreams = urls
        .iter()
        .zip(tls)
        .map(|(url, tls)| Upstream {
            url: url.url.clone(),
            authority: url.authority.clone(),
            base_path: url.base_path.clone(),
            addresses: literal(&url.host).into_iter().map(|ip| SocketAddr::new(ip, url.port)).collect(),
            tls: tls.clone(),
        })
        .collect();
    UpstreamSet { epoch: 1, upstreams }
}

/// The addresses of a host that is no name for DNS. `localhost` is the loopback (RFC 6761 section 6.3), IPv4 first since
/// local backends mostly listen on it alone.
fn literal(host: &Host) -> Vec<IpAddr> {
    match host {
        Host::Address(address) => vec![*address],
        Host::Name(name) if name == "localhost" || name.ends_with(".localhost") => {
            vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
        }
        Host::Name(_) => Vec::new(),
    }
}

/// Takes an answer into the set. Only a change of the addresses, not of their order, makes a new epoch: name servers
/// rotate. A name that no longer resolves keeps the addresses it had.
pub(crate) fn apply(set: &UpstreamSet, answer: &Answer) -> Option<UpstreamSet> {
    let Ok(addresses) = &answer.result else {
        return None;
    };
    let mut addresses = addresses.clone();
    let mut seen = std::collections::HashSet::new();
    addresses.retain(|address| seen.insert(*address));
    addresses.truncate(ADDRESSES_MAX);
    let known = &set.upstreams.get(answer.upstream)?.addresses;
    let sorted = |addresses: &[SocketAddr]| {
        let mut sorted = addresses.to_vec();
        sorted.sort_unstable();
        sorted
    };
    if addresses.is_empty() || sorted(known) == sorted(&addresses) {
        return None;
    }
    let mut next = set.clone();
    next.epoch += 1;
    next.upstreams[answer.upstream].addresses = addresses;
    Some(next)
}

/// Starts one task per name that asks for as long as the process lives. Returns how many names are asked for.
pub(crate) fn start(urls: &[UpstreamUrl], answers: &mpsc::Sender<Answer>) -> usize {
    let names: Vec<(usize, String, u16)> = urls
        .iter()
        .enumerate()
        .filter_map(|(index, url)| match &url.host {
            Host::Name(name) if literal(&url.host).is_empty() => Some((index, name.clone(), url.port)),
            _ => None,
        })
        .collect();
    if names.is_empty() {
        return 0;
    }
    let resolver = Arc::new(resolver());
    let started = names.len();
    for (upstream, name, port) in names {
        tokio::spawn(ask_for_ever(Arc::clone(&resolver), upstream, name, port, answers.clone()));
    }
    started
}

type TokioResolver = Resolver<TokioConnectionProvider>;

fn resolver() -> TokioResolver {
    let mut builder = Resolver::builder_tokio().unwrap_or_else(|error| {
        log::warn!("cannot read /etc/resolv.conf ({error}): only names in /etc/hosts can be resolved");
        Resolver::builder_with_config(ResolverConfig::new(), TokioConnectionProvider::default())
    });
    set_options(builder.options_mut());
    builder.build()
}

fn set_options(options: &mut ResolverOpts) {
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options.use_hosts_file = ResolveHosts::Always;
    options.timeout = QUERY_TIMEOUT;
    options.attempts = QUERY_ATTEMPTS;
    // The time to live is kept here; a cache would only keep failures longer.
    options.cache_size = 0;
}

async fn ask_for_ever(
    resolver: Arc<TokioResolver>,
    upstream: usize,
    name: String,
    port: u16,
    answers: mpsc::Sender<Answer>,
) {
    let mut retry = RETRY_MIN;
    loop {
        let (result, pause) = match resolver.lookup_ip(name.as_str()).await {
            Ok(found) => {
                retry = RETRY_MIN;
                let ttl = found.valid_until().saturating_duration_since(crate::clock::now());
                let addresses = found.iter().map(|ip| SocketAddr::new(ip, port)).collect();
                (Ok(addresses), ttl.clamp(TTL_MIN, TTL_MAX))
            }
            Err(error) => {
                let pause = retry;
                retry = (retry * 2).min(RETRY_MAX);
                log::warn!(
                    "upstream name {name} cannot be resolved: {error}; asking again in {} s",
                    pause.as_secs()
                );
                (Err(error.to_string()), pause)
            }
        };
        if answers.send(Answer { upstream, result }).await.is_err() {
            // The control loop has ended.
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> UpstreamSet {
        initial(
            &["http://10.0.0.1:1", "http://localhost:2", "http://model.internal:3"]
                .map(|url| UpstreamUrl::parse(url).unwrap()),
            &[None, None, None],
        )
    }

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn literals_and_localhost_need_no_look_up() {
        let set = set();
        assert_eq!(set.upstreams[0].addresses, addresses(&["10.0.0.1:1"]));
        assert_eq!(set.upstreams[1].addresses, addresses(&["127.0.0.1:2", "[::1]:2"]));
        assert!(set.upstreams[2].addresses.is_empty());
    }

    #[test]
    fn only_changed_addresses_make_a_new_epoch() {
        let set = set();
        let answer = |texts: &[&str]| Answer { upstream: 2, result: Ok(addresses(texts)) };
        let first = apply(&set, &answer(&["10.1.0.1:3", "10.1.0.2:3", "10.1.0.1:3"])).unwrap();
        assert_eq!(first.epoch, 2);
        assert_eq!(first.upstreams[2].addresses, addresses(&["10.1.0.1:3", "10.1.0.2:3"]));
        assert_eq!(apply(&first, &answer(&["10.1.0.2:3", "10.1.0.1:3"])), None);
        let second = apply(&first, &answer(&["10.1.0.9:3"])).unwrap();
        assert_eq!((second.epoch, second.upstreams[2].addresses.len()), (3, 1));
    }

    #[test]
    fn a_failure_keeps_what_was_known() {
        let set = set();
        assert_eq!(apply(&set, &Answer { upstream: 0, result: Err("gone".to_owned()) }), None);
        assert_eq!(apply(&set, &Answer { upstream: 0, result: Ok(Vec::new()) }), None);
    }

    /// A name server that answers every A query with 10.0.0.1, then 10.0.0.2, and so on, for one second each.
    fn counting_name_server() -> SocketAddr {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut last = 0;
            let mut query = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut query) {
                // The question: a name of labels up to an empty one, then type and class (RFC 1035 section 4.1.2).
                let name = query[12..].iter().position(|&byte| byte == 0).unwrap() + 1;
                let question = &query[12..length.min(12 + name + 4)];
                let is_a = question[name..name + 2] == [0, 1];
                let mut answer = vec![query[0], query[1], 0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0];
                answer.extend(question);
                if is_a {
                    last += 1;
                    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4, 10, 0, 0, last]);
                }
                socket.send_to(&answer, from).unwrap();
            }
        });
        address
    }

    #[tokio::test]
    async fn a_name_is_looked_up_again_when_its_time_to_live_is_over() {
        let servers = hickory_resolver::config::NameServerConfigGroup::from_ips_clear(&[], 53, true);
        let mut config = ResolverConfig::from_parts(None, Vec::new(), servers);
        let protocol = hickory_resolver::proto::xfer::Protocol::Udp;
        config.add_name_server(hickory_resolver::config::NameServerConfig::new(
            counting_name_server(),
            protocol,
        ));
        let mut builder = Resolver::builder_with_config(config, TokioConnectionProvider::default());
        set_options(builder.options_mut());
        let (sender, mut answers) = mpsc::channel(ANSWERS_MAX);
        let asking = ask_for_ever(Arc::new(builder.build()), 2, "model.internal.".to_owned(), 3, sender);
        let asking = tokio::spawn(asking);
        let begin = crate::clock::now();
        let first = answers.recv().await.unwrap();
        assert_eq!((first.upstream, first.result.unwrap()), (2, addresses(&["10.0.0.1:3"])));
        let second = answers.recv().await.unwrap();
        assert_eq!(second.result.unwrap(), addresses(&["10.0.0.2:3"]));
        let took = begin.elapsed();
        assert!(took >= Duration::from_millis(900) && took < Duration::from_secs(10), "{took:?}");
        asking.abort();
    }

    #[tokio::test]
    async fn names_in_etc_hosts_are_found() {
        let Ok(hosts) = std::fs::read_to_string("/etc/hosts") else { return };
        let own = hosts.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
            let mut words = line.split_whitespace();
            let address: Ipv4Addr = words.next()?.parse().ok()?;
            words.find(|name| !name.contains("localhost")).map(|name| (address, name.to_owned()))
        });
        // A machine without a name of its own in /etc/hosts has nothing to look up here.
        let Some((address, name)) = own else { return };
        let found = resolver().lookup_ip(name.as_str()).await.unwrap();
        assert!(found.iter().any(|ip| ip == IpAddr::V4(address)), "{name}");
    }
}
