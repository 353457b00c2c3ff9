//! The control loop: one task on the main thread that talks to the shards, answers the admin pages, follows the upstreams'
//! addresses and leads the process through its end.
//!
//! ```text
//!  Serving ──TERM/INT──► Draining ──TERM/INT, or the deadline and some grace──► Stopping ──► exit
//!     │                     └──────────── every shard has left ───────────────────────────────►
//!     └──── QUIT (after the dump), a failed shard ──────────────────────────────► Stopping
//! ```

mod access;
pub(crate) mod keeper;
pub(crate) mod resolve;
mod round;

use crate::admin::view::{Fixed, ShardState, Stage, View};
use crate::admin::{Question, status};
use crate::clock;
use crate::exit::{Exit, Fatal};
use crate::logs::Logs;
use keeper::Keeper;
use resolve::Answer;
use round::Round;
use shard::listing::Page;
use shard::mesh::{Command, ControlPort, Report};
use shard::settings::UpstreamSet;
use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

/// How long shards may take beyond the drain deadline to deliver what the deadline made them say.
const DRAIN_GRACE: Duration = Duration::from_secs(5);
/// How long shards may take to end every stream at once.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// How long shards may take to start.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Pause before commands that found a full mailbox are sent again.
const RESEND: Duration = Duration::from_millis(50);

/// A shard as the control loop knows it.
struct Link {
    port: ControlPort,
    wake: AsyncFd<OwnedFd>,
    /// Commands that found its mailbox full.
    owed: VecDeque<Command>,
    state: LinkState,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum LinkState {
    Starting,
    Running,
    Gone,
}

/// Everything the loop owns.
pub(crate) struct Control {
    links: Vec<Link>,
    fixed: Arc<Fixed>,
    upstreams: Arc<UpstreamSet>,
    resolve_failures: Vec<u64>,
    keeper: Keeper,
    logs: Logs,
    stage: Stage,
    /// When the stage is given up.
    until: Option<Instant>,
    round: Option<Round>,
    /// Who waits for some streams of a shard, by ticket; as many as there are admin connections, and few that have gone.
    inquiries: HashMap<u64, oneshot::Sender<Page>>,
    tickets: u64,
    /// Streams that did not end in peace.
    forced: u64,
    failures: Vec<String>,
}

impl Control {
    pub(crate) fn new(
        ports: Vec<ControlPort>,
        fixed: Arc<Fixed>,
        upstreams: Arc<UpstreamSet>,
        keeper: Keeper,
        logs: Logs,
    ) -> std::io::Result<Self> {
        let links = ports
            .into_iter()
            .map(|port| {
                let wake = watch(port.wake_fd().try_clone_to_owned()?)?;
                Ok(Link { port, wake, owed: VecDeque::new(), state: LinkState::Starting })
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        let resolve_failures = vec![0; upstreams.upstreams.len()];
        Ok(Control {
            links,
            fixed,
            upstreams,
            resolve_failures,
            keeper,
            logs,
            stage: Stage::Serving,
            until: None,
            round: None,
            inquiries: HashMap::new(),
            tickets: 0,
            forced: 0,
            failures: Vec::new(),
        })
    }

    /// Counts look-ups that failed before the loop ran.
    pub(crate) fn count_failures(&mut self, upstreams: &[usize]) {
        for &upstream in upstreams {
            self.resolve_failures[upstream] += 1;
        }
    }

    /// Waits until every shard accepts clients.
    pub(crate) async fn started(&mut self) -> Result<(), Fatal> {
        let until = clock::now() + START_LIMIT;
        while self.links.iter().any(|link| link.state == LinkState::Starting) {
            tokio::select! {
                () = woken(&mut self.links) => self.take_reports(),
                () = tokio::time::sleep_until(until.into()) => {
                    return Err(Fatal::internal("the shards did not start in time"));
                }
            }
            if let Some(failure) = self.failures.first() {
                return Err(Fatal::unavailable(failure.clone()));
            }
        }
        Ok(())
    }

    /// Runs until the process is to end, and says how.
    pub(crate) async fn run(
        &mut self,
        mut signals: Signals,
        mut questions: mpsc::Receiver<Question>,
        mut answers: mpsc::Receiver<Answer>,
    ) -> Exit {
        loop {
            let deadline = self.next_deadline();
            tokio::select! {
                () = woken(&mut self.links) => self.take_reports(),
                Some(question) = questions.recv() => self.question(question),
                Some(answer) = answers.recv() => self.answer(&answer),
                signal = signals.next() => {
                    if self.signal(signal) {
                        return self.exit();
                    }
                }
                () = tokio::time::sleep_until(deadline.into()) => {}
            }
            if self.keeper.tick(clock::now(), clock::since_1970().as_secs()) {
                self.tell_tls();
            }
            self.resend();
            self.finish_round();
            if self.links.iter().all(|link| link.state == LinkState::Gone) {
                return self.exit();
            }
            if self.until.is_some_and(|until| clock::now() >= until) {
                if self.stage == Stage::Stopping {
                    let left: Vec<_> = self.present().map(|shard| shard.to_string()).collect();
                    log::error!("shard {} did not leave in time; ending without it", left.join(", "));
                    return Exit::Internal;
                }
                log::error!("shards are still not drained; stopping them");
                self.stop(STOP_GRACE);
            }
        }
    }

    fn exit(&self) -> Exit {
        if !self.failures.is_empty() {
            return Exit::Internal;
        }
        if self.forced > 0 {
            log::warn!(streams = self.forced; "streams were ended before they were complete");
            return Exit::Forced;
        }
        log::info!("all streams ended in peace");
        Exit::Success
    }

    fn present(&self) -> impl Iterator<Item = usize> {
        (0..self.links.len()).filter(|&shard| self.links[shard].state != LinkState::Gone)
    }

    fn next_deadline(&self) -> Instant {
        let now = clock::now();
        let resend = self.links.iter().any(|link| !link.owed.is_empty()).then(|| now + RESEND);
        let round = self.round.as_ref().map(|round| round.until);
        // An hour stands for never.
        [self.until, resend, round, self.keeper.next()]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(now + Duration::from_secs(3600))
    }

    fn take_reports(&mut self) {
        for shard in 0..self.links.len() {
            // Looked at first: what a shard reported before its thread ended is still to be taken.
            let abandoned = self.links[shard].port.is_abandoned();
            // Bounded: what comes in meanwhile wakes the loop again.
            for _ in 0..shard::mesh::REPORTS_MAX {
                let Some(report) = self.links[shard].port.receive() else { break };
                self.report(shard, report);
            }
            if abandoned && self.links[shard].state != LinkState::Gone {
                self.report(shard, Report::Failed("its thread ended without a word".to_owned()));
            }
        }
    }

    fn report(&mut self, shard: usize, report: Report) {
        match report {
            Report::Started => self.links[shard].state = LinkState::Running,
            Report::Snapshot { ticket, snapshot } => {
                if let Some(round) = &mut self.round {
                    round.answer(shard, ticket, snapshot);
                }
            }
            Report::Streams { ticket, page } => {
                if let Some(answer) = self.inquiries.remove(&ticket) {
                    answer.send(*page).unwrap_or(());
                }
            }
            Report::Ended(record) => access::log(shard, &record, &self.fixed.plan.settings, &self.upstreams),
            Report::TlsFailed(failure) => {
                let upstream = failure.upstream.and_then(|index| self.upstreams.upstreams.get(index));
                let url = upstream.map(|upstream| upstream.url.as_str());
                self.keeper.peer_failed(&failure, url, clock::since_1970().as_secs());
            }
            Report::Left { forced } => {
                self.links[shard].state = LinkState::Gone;
                self.forced += forced;
            }
            Report::Failed(why) => {
                log::error!("shard {shard} failed: {why}");
                self.links[shard].state = LinkState::Gone;
                self.failures.push(format!("shard {shard} failed: {why}"));
                if self.stage == Stage::Serving {
                    self.stop(STOP_GRACE);
                }
            }
        }
    }

    fn question(&mut self, question: Question) {
        match question {
            Question::View { ask_shards: true, answer } => self.begin_round().wait(answer),
            Question::View { ask_shards: false, answer } => {
                let view = self.view(Vec::new());
                // The asker may have gone.
                answer.send(Arc::new(view)).unwrap_or(());
            }
            Question::Streams { shard, inquiry, answer } => {
                // Who waited for what never came has gone.
                self.inquiries.retain(|_, answer| !answer.is_closed());
                let link = self.links.get_mut(shard);
                let Some(link) = link.filter(|link| link.state != LinkState::Gone && link.owed.is_empty())
                else {
                    return;
                };
                self.tickets += 1;
                if link.port.send(Command::Streams { ticket: self.tickets, inquiry }).is_ok() {
                    self.inquiries.insert(self.tickets, answer);
                }
            }
        }
    }

    fn begin_round(&mut self) -> &mut Round {
        if self.round.is_none() {
            self.tickets += 1;
            let ticket = self.tickets;
            for link in &mut self.links {
                // A shard whose mailbox is full is silent: its question is not owed.
                if link.state != LinkState::Gone && link.owed.is_empty() {
                    link.port.send(Command::Snapshot { ticket }).unwrap_or(());
                }
            }
        }
        let (ticket, shards) = (self.tickets, self.links.len());
        self.round.get_or_insert_with(|| Round::new(ticket, shards, clock::now()))
    }

    fn finish_round(&mut self) {
        let gone = |shard: usize| self.links[shard].state == LinkState::Gone;
        let over =
            self.round.as_ref().is_some_and(|round| round.is_complete(gone) || clock::now() >= round.until);
        let Some(round) = self.round.take_if(|_| over) else {
            return;
        };
        let dump = round.dump;
        let (states, waiters) = round.finish(gone);
        let view = Arc::new(self.view(states));
        for waiter in waiters {
            waiter.send(Arc::clone(&view)).unwrap_or(());
        }
        if dump {
            let page = status::page(&view, clock::since_1970().as_secs());
            // Past the log: its lines have a limit, and this is the last word.
            self.logs.flush(Duration::from_millis(200));
            std::io::stderr().write_all(format!("{page:#}\n").as_bytes()).ok();
            self.stop(STOP_GRACE / 2);
        }
    }

    fn view(&self, shards: Vec<ShardState>) -> View {
        View {
            stage: self.stage,
            shards,
            upstreams: Arc::clone(&self.upstreams),
            resolve_failures: self.resolve_failures.clone(),
            log_lines_dropped: self.logs.dropped(),
            tls: self.keeper.view(),
            fixed: Arc::clone(&self.fixed),
        }
    }

    fn answer(&mut self, answer: &Answer) {
        if answer.result.is_err() {
            self.resolve_failures[answer.upstream] += 1;
        }
        if let Some(next) = resolve::apply(&self.upstreams, answer) {
            let upstream = &next.upstreams[answer.upstream];
            let addresses: Vec<_> = upstream.addresses.iter().map(ToString::to_string).collect();
            log::info!("upstream {} is now at {}", upstream.url, addresses.join(" "));
            self.upstreams = Arc::new(next);
            self.tell(&Command::Upstreams(Arc::clone(&self.upstreams)));
        }
    }

    /// True when the process is to end now.
    fn signal(&mut self, signal: SignalKind) -> bool {
        if signal == SignalKind::terminate() || signal == SignalKind::interrupt() {
            match self.stage {
                Stage::Serving => self.drain(),
                Stage::Draining => {
                    log::info!("second signal: ending all streams now");
                    self.stop(STOP_GRACE);
                }
                Stage::Stopping => {
                    log::warn!("further signal: leaving without the shards");
                    self.forced += 1;
                    return true;
                }
            }
        } else if signal == SignalKind::quit() {
            log::info!("SIGQUIT: state dump, then stop");
            self.begin_round().dump = true;
        } else if signal == SignalKind::hangup() {
            if self.keeper.reload(clock::since_1970().as_secs()) {
                self.tell_tls();
            }
        } else {
            log::info!("signal {} is reserved and ignored", signal.as_raw_value());
        }
        false
    }

    fn tell_tls(&mut self) {
        self.tell(&Command::Tls(Arc::new(self.keeper.set())));
    }

    fn drain(&mut self) {
        let deadline_ms = self.fixed.plan.drain_deadline_ms;
        log::info!(deadline_ms = deadline_ms; "draining: no new clients, streams may finish");
        self.stage = Stage::Draining;
        self.until = Some(clock::now() + Duration::from_millis(deadline_ms) + DRAIN_GRACE);
        self.tell(&Command::Drain { deadline_ms });
    }

    fn stop(&mut self, grace: Duration) {
        self.stage = Stage::Stopping;
        self.until = Some(clock::now() + grace);
        self.tell(&Command::Stop);
    }

    /// Sends to every shard; to one whose mailbox is full, as soon as there is room.
    fn tell(&mut self, command: &Command) {
        for link in self.links.iter_mut().filter(|link| link.state != LinkState::Gone) {
            if matches!(command, Command::Upstreams(_) | Command::Tls(_)) {
                // Only the newest set is of use.
                let kind = std::mem::discriminant(command);
                link.owed.retain(|owed| std::mem::discriminant(owed) != kind);
            }
            link.owed.push_back(command.clone());
        }
        self.resend();
    }

    fn resend(&mut self) {
        for link in &mut self.links {
            while let Some(command) = link.owed.pop_front() {
                if let Err(command) = link.port.send(command) {
                    link.owed.push_front(command);
                    break;
                }
            }
            if link.state == LinkState::Gone {
                link.owed.clear();
            }
        }
    }
}

/// Registers a descriptor with the runtime.
#[allow(
    deprecated,
    reason = "its successor is unsafe, which this crate forbids; what that demands (open, and the same, for as long as it is \
              owned) is what OwnedFd guarantees"
)]
fn watch(descriptor: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(descriptor, Interest::READABLE)
}

/// Waits until at least one shard has rung, and clears its bell. What it reported is still to be taken.
async fn woken(links: &mut [Link]) {
    std::future::poll_fn(|cx| {
        let mut any = false;
        for link in links.iter_mut() {
            // Once more after clearing, so that this task is registered for the next ring.
            while let Poll::Ready(result) = link.wake.poll_read_ready(cx) {
                match result {
                    Ok(mut guard) => guard.clear_ready(),
                    // Only a runtime that is shutting down fails here.
                    Err(_) => break,
                }
                link.port.clear();
                any = true;
            }
        }
        if any { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// The signals this process answers to, from the moment this exists.
pub(crate) struct Signals(Vec<(SignalKind, Signal)>);

impl Signals {
    pub(crate) fn new() -> std::io::Result<Self> {
        let kinds = [
            SignalKind::terminate(),
            SignalKind::interrupt(),
            SignalKind::quit(),
            SignalKind::hangup(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
        ];
        kinds.into_iter().map(|kind| Ok((kind, signal(kind)?))).collect::<std::io::Result<_>>().map(Signals)
    }

    async fn next(&mut self) -> SignalKind {
        std::future::poll_fn(|cx| {
            for (kind, signal) in &mut self.0 {
                if signal.poll_recv(cx).is_ready() {
                    return Poll::Ready(*kind);
                }
            }
            Poll::Pending
        })
        .await
    }
}
