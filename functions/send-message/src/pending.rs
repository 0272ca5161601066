//! Messages that wait to be appended.

use std::collections::{HashMap, HashSet, VecDeque};

use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::Span;

use crate::outgoing::Outgoing;
use crate::sequencer::Slot;
use base::error::{Code, Error, Result};
use base::seq::Seq;

/// The outcome of a message.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    /// Its sequence.
    pub seq: Seq,
    /// It was in the stream before.
    pub duplicate: bool,
}

/// A message and the sender that waits for its outcome.
#[derive(Debug)]
pub struct Pending {
    pub message: Outgoing,
    /// When its sender gets an error.
    pub until: Instant,
    /// Of the request.
    pub span: Span,
    /// Where its outcome goes.
    pub reply: oneshot::Sender<Result<Sent>>,
    /// The last field: it is dropped after the reply is sent, and then later messages pass.
    pub slot: Slot<Pending>,
}

impl Pending {
    /// Replies to the sender.
    pub fn answer(self, outcome: Result<Sent>) {
        // A sender that gave up no longer wants it.
        let _ = self.reply.send(outcome);
    }

    /// Whether the sender still waits.
    pub fn is_wanted(&self) -> bool {
        !self.reply.is_closed()
    }
}

/// Those whose senders still wait and have time left. A sender whose time is over gets an error.
pub fn in_time(batch: Vec<Pending>) -> Vec<Pending> {
    let now = Instant::now();
    let wanted = batch.into_iter().filter(Pending::is_wanted);
    let (in_time, late): (Vec<_>, Vec<_>) = wanted.partition(|pending| pending.until > now);
    for pending in late {
        pending.answer(Err(Error::new(
            Code::Unavailable,
            "there was no time left to append this; it was not stored, try again",
        )));
    }
    in_time
}

/// Splits off messages that repeat sender and id of an earlier one, and everything after them in
/// their queues: JetStream refuses a batch that contains an id twice.
pub fn split_repeated(batch: Vec<Pending>) -> (Vec<Pending>, Vec<Pending>) {
    let mut ids = HashSet::new();
    let mut held_back = HashSet::new();
    batch.into_iter().partition(|pending| {
        let queue = pending.slot.key();
        let first = !held_back.contains(queue) && ids.insert(pending.message.key());
        if !first {
            held_back.insert(queue.clone());
        }
        first
    })
}

/// The messages of each queue, in their order.
pub fn by_queue(batch: Vec<Pending>) -> Vec<VecDeque<Pending>> {
    let mut index = HashMap::new();
    let mut runs: Vec<VecDeque<Pending>> = Vec::new();
    for pending in batch {
        let run = *index
            .entry(pending.slot.key().clone())
            .or_insert(runs.len());
        match runs.get_mut(run) {
            Some(run) => run.push_back(pending),
            None => runs.push(VecDeque::from([pending])),
        }
    }
    runs
}
