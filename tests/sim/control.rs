//! The control thread as one more peer of the shard: it gives orders at their time through a bounded mailbox, and reads
//! reports when it is not busy elsewhere.

use crate::world::{Event, World, name};
use serde::{Deserialize, Serialize};
use shard::mesh::Command;
use shard::settings::{Upstream, UpstreamSet, UpstreamTls};
use std::collections::VecDeque;
use std::sync::Arc;

/// What the control thread does.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    Drain {
        deadline_ms: u64,
    },
    Stop,
    /// From now on names resolve to these of the hosts, in this order.
    Hosts(Vec<usize>),
    /// Asks for so many snapshots at once.
    Snapshots(u64),
    /// Reads no report for so long.
    Deaf {
        for_us: u64,
    },
}

#[derive(Debug)]
pub(crate) struct Control {
    orders: Vec<Order>,
    commands: VecDeque<Command>,
    pub(crate) commands_max: usize,
    /// Orders that found the mailbox full.
    pub(crate) refused: u64,
    pub(crate) reports_max: usize,
    /// Reports that nobody has read yet.
    reports: usize,
    deaf_until_us: u64,
    /// The bell, until the shard's ring has heard it.
    pub(crate) rung: bool,
    pub(crate) tickets: u64,
    epoch: u64,
    /// When it was told to drain or stop for the first time.
    pub(crate) leaving_us: Option<u64>,
    pub(crate) stopped: bool,
    /// Names resolved to nothing for a while.
    pub(crate) unresolved: bool,
    /// The shard has left: its mailbox is gone.
    gone: bool,
}

impl Default for Control {
    fn default() -> Self {
        Control {
            orders: Vec::new(),
            commands: VecDeque::new(),
            commands_max: shard::mesh::COMMANDS_MAX,
            refused: 0,
            reports_max: shard::mesh::REPORTS_MAX,
            reports: 0,
            deaf_until_us: 0,
            rung: false,
            tickets: 0,
            epoch: 1,
            leaving_us: None,
            stopped: false,
            unresolved: false,
            gone: false,
        }
    }
}

impl World {
    pub(crate) fn add_order(&mut self, after_us: u64, order: Order) {
        let index = self.control.orders.len();
        self.control.orders.push(order);
        self.after(after_us, Event::Order(index));
    }

    pub(crate) fn gives_order(&mut self, index: usize) {
        let order = self.control.orders[index].clone();
        self.say(|| format!("control: {order:?}"));
        match &order {
            Order::Deaf { for_us } => self.control.deaf_until_us = self.now + for_us,
            Order::Snapshots(count) => {
                for _ in 0..*count {
                    let ticket = self.control.tickets;
                    self.control.tickets += u64::from(self.command(Command::Snapshot { ticket }));
                }
            }
            Order::Hosts(hosts) => {
                self.control.epoch += 1;
                let set = self.upstream_set(self.control.epoch, hosts);
                self.control.unresolved |= set.upstreams.iter().any(|upstream| upstream.addresses.is_empty());
                self.command(Command::Upstreams(Arc::new(set)));
            }
            Order::Drain { .. } | Order::Stop => {
                let command = match order {
                    Order::Drain { deadline_ms } => Command::Drain { deadline_ms },
                    _ => Command::Stop,
                };
                if self.command(command) {
                    self.control.leaving_us.get_or_insert(self.now);
                    self.control.stopped |= order == Order::Stop;
                } else if !self.control.gone {
                    // It must be heard some time.
                    self.after(1_000, Event::Order(index));
                }
            }
        }
    }

    /// Into the mailbox; false when it is full.
    fn command(&mut self, command: Command) -> bool {
        let room = self.control.commands.len() < self.control.commands_max && !self.control.gone;
        if room {
            self.control.commands.push_back(command);
        } else {
            self.control.refused += 1;
        }
        self.control.rung = true;
        room
    }

    pub(crate) fn next_command(&mut self) -> Option<Command> {
        self.control.commands.pop_front()
    }

    /// The shard has left; nobody answers what it has not.
    pub(crate) fn shard_left(&mut self) {
        self.control.gone = true;
        for command in self.control.commands.drain(..) {
            self.control.tickets -= u64::from(matches!(command, Command::Snapshot { .. }));
        }
    }

    /// Whether a report found room. Those that waited are read as soon as the control thread hears again.
    pub(crate) fn takes_report(&mut self) -> bool {
        if self.now >= self.control.deaf_until_us {
            self.control.reports = 0;
            return true;
        }
        self.control.reports += 1;
        self.control.reports <= self.control.reports_max
    }

    /// The backends as names resolve to these hosts.
    pub(crate) fn upstream_set(&self, epoch: u64, hosts: &[usize]) -> UpstreamSet {
        let count = self.hosts.iter().map(|host| host.upstream + 1).max().unwrap_or(1);
        let addresses = |upstream: usize| {
            hosts
                .iter()
                .filter_map(|&host| self.hosts.get(host))
                .filter(move |host| host.upstream == upstream)
        };
        let upstreams = (0..count).map(|upstream| Upstream {
            url: format!("http://{}", authority(upstream)),
            authority: authority(upstream),
            base_path: base_path(upstream),
            addresses: addresses(upstream).map(|host| host.address).collect(),
            tls: self.tongues.backends.is_some().then(|| UpstreamTls { config: 0, name: name() }),
        });
        UpstreamSet { epoch, upstreams: upstreams.collect() }
    }
}

pub(crate) fn authority(upstream: usize) -> String {
    format!("backend-{upstream}")
}

/// The first has none.
pub(crate) fn base_path(upstream: usize) -> String {
    if upstream == 0 { String::new() } else { format!("/base-{upstream}") }
}
