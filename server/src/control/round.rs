//! One round of questions to all shards: everybody who asks while it runs gets its result. No clock, no I/O.

use crate::admin::view::{ShardState, View};
use shard::stats::Snapshot;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How long shards have to answer.
pub(super) const TIMEOUT: Duration = Duration::from_secs(1);
/// Questions that share one round; one more waits in the admin queue.
const WAITERS_MAX: usize = 256;

/// A round under way.
pub(super) struct Round {
    pub(super) ticket: u64,
    pub(super) until: Instant,
    answers: Vec<Option<Box<Snapshot>>>,
    waiters: Vec<oneshot::Sender<Arc<View>>>,
    /// End with a dump of the state to stderr.
    pub(super) dump: bool,
}

impl Round {
    pub(super) fn new(ticket: u64, shards: usize, now: Instant) -> Self {
        Round { ticket, until: now + TIMEOUT, answers: vec![None; shards], waiters: Vec::new(), dump: false }
    }

    /// Adds somebody who waits for the result. Beyond the limit the question is dropped, and its asker is told so.
    pub(super) fn wait(&mut self, waiter: oneshot::Sender<Arc<View>>) {
        if self.waiters.len() < WAITERS_MAX {
            self.waiters.push(waiter);
        }
    }

    /// Takes a shard's answer; one to an earlier round is late and ignored.
    pub(super) fn answer(&mut self, shard: usize, ticket: u64, snapshot: Box<Snapshot>) {
        if ticket == self.ticket {
            self.answers[shard] = Some(snapshot);
        }
    }

    /// Whether every shard has answered that is still there.
    pub(super) fn is_complete(&self, gone: impl Fn(usize) -> bool) -> bool {
        self.answers.iter().enumerate().all(|(shard, answer)| answer.is_some() || gone(shard))
    }

    /// What is known of each shard, and who wants to know.
    pub(super) fn finish(
        self,
        gone: impl Fn(usize) -> bool,
    ) -> (Vec<ShardState>, Vec<oneshot::Sender<Arc<View>>>) {
        let states = self
            .answers
            .into_iter()
            .enumerate()
            .map(|(shard, answer)| match answer {
                Some(snapshot) => ShardState::Answered(snapshot),
                None if gone(shard) => ShardState::Gone,
                None => ShardState::Silent,
            })
            .collect();
        (states, self.waiters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::view::tests::snapshot;

    #[test]
    fn a_round_ends_when_all_have_answered_or_gone() {
        let mut round = Round::new(7, 3, crate::clock::now());
        round.answer(0, 7, Box::new(snapshot(0)));
        round.answer(1, 6, Box::new(snapshot(1)));
        assert!(!round.is_complete(|shard| shard == 2));
        round.answer(1, 7, Box::new(snapshot(1)));
        assert!(round.is_complete(|shard| shard == 2));
        assert!(!round.is_complete(|_| false));
        let (states, _) = round.finish(|_| false);
        assert!(matches!(states[..], [ShardState::Answered(_), ShardState::Answered(_), ShardState::Silent]));
    }
}
