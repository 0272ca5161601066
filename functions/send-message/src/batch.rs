//! The stage that appends: as one batch with one flush, or singly.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use crate::append::{AppendError, Appended};
use crate::outgoing::Outgoing;
use crate::pending::{Pending, Sent, by_queue, in_time, split_repeated};
use crate::pipeline::Pipeline;
use crate::query::Stored;
use crate::sequencer::{Key, Sequencer};
use base::error::Result;
use jetstream::batch::MAX_MESSAGES;

/// The most bytes of one batch, so that a few long texts do not delay many short ones.
const MAX_BYTES: usize = 4 << 20;
/// After a batch we wait this long for each further message, while fewer than three quarters of
/// that batch are there: its senders were just answered and are about to send again.
const LINGER: Duration = Duration::from_millis(1);
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// A batch that takes longer continues beside the next one, so that a batch that is stuck delays
/// only the later messages of the same senders to the same rooms.
const PATIENCE: Duration = Duration::from_millis(250);
/// A message that has to wait for the one before it takes about as long as so many that are
/// published at the same time.
const SEQUENTIAL_COST: usize = 3;

impl Pipeline {
    /// Appends one batch after the other. Two at once would be smaller, and the server takes them
    /// one by one all the same.
    pub async fn append_all(self: Arc<Self>, queues: mpsc::UnboundedReceiver<Key>) {
        let mut ready = Ready {
            queues,
            left_over: None,
        };
        let mut expected = 0;
        while let Some(batch) = ready.gather(&self.sequencer, expected).await {
            expected = if batch.len() < self.min_batch {
                0
            } else {
                batch.len() * 3 / 4
            };
            self.sequencer.expect(expected);
            // A task of its own, so that a panic costs only this batch: its senders get an error.
            let appending = tokio::spawn(self.clone().append(in_time(batch)));
            let _ = timeout(PATIENCE, appending).await;
        }
    }

    /// Appends messages, with one flush if that is faster.
    async fn append(self: Arc<Self>, batch: Vec<Pending>) {
        let (mut batch, repeated) = split_repeated(batch);
        if self.is_worth_a_batch(&batch) {
            batch = self.append_batch(batch).await;
        }
        // Published singly, each message gets its own error. What the batch stored after all is
        // found to be a duplicate.
        batch.extend(repeated);
        let runs = by_queue(batch)
            .into_iter()
            .map(|run| self.clone().append_run(run));
        futures::future::join_all(runs).await;
    }

    /// Whether publishing these singly, each queue in order, takes longer than a batch.
    fn is_worth_a_batch(&self, batch: &[Pending]) -> bool {
        let mut in_queue: HashMap<&Key, usize> = HashMap::new();
        for pending in batch {
            *in_queue.entry(pending.slot.key()).or_default() += 1;
        }
        let longest_run = in_queue.into_values().max().unwrap_or_default();
        batch.len() >= self.min_batch
            || (longest_run > 1 && longest_run * SEQUENTIAL_COST >= self.min_batch)
    }

    /// Appends all or nothing; returns the messages that are not answered.
    async fn append_batch(&self, batch: Vec<Pending>) -> Vec<Pending> {
        match self.try_batch(batch).await {
            Ok(()) => Vec::new(),
            // JetStream remembers an id of the batch, but not which one; asking costs no flush.
            Err((batch, AppendError::DuplicateInBatch)) => {
                let new = self.resolve_remembered(batch).await;
                if !self.is_worth_a_batch(&new) {
                    return new;
                }
                match self.try_batch(new).await {
                    Ok(()) => Vec::new(),
                    Err((batch, _)) => batch,
                }
            }
            Err((batch, _)) => batch,
        }
    }

    /// One attempt to append all or nothing; returns the messages if that failed.
    async fn try_batch(&self, batch: Vec<Pending>) -> Result<(), (Vec<Pending>, AppendError)> {
        // Of the message that has longest: one whose time is nearly over must not end the attempt
        // for all.
        let until = batch.iter().map(|pending| pending.until).max();
        let until = until.unwrap_or_else(Instant::now);
        let messages: Vec<&Outgoing> = batch.iter().map(|pending| &pending.message).collect();
        match self.appender.batch(&messages, until).await {
            Ok(first) => {
                let mut seq = first;
                for pending in batch {
                    pending.answer(Ok(Sent {
                        seq,
                        duplicate: false,
                    }));
                    seq = seq.next();
                }
                Ok(())
            }
            Err(error) => {
                tracing::debug!(
                    ?error,
                    messages = batch.len(),
                    "a batch was not stored; its messages are published singly"
                );
                Err((batch, error))
            }
        }
    }

    /// Publishes messages of one queue, each after the one before it has its outcome. From the
    /// first that has to be tried again, they continue in a task of their own, and the caller does
    /// not wait for them.
    async fn append_run(self: Arc<Self>, mut run: VecDeque<Pending>) {
        while let Some(pending) = run.pop_front() {
            let wanted = || pending.is_wanted();
            match self.try_one(&pending.message, pending.until, wanted).await {
                Some(outcome) => pending.answer(outcome),
                None => {
                    run.push_front(pending);
                    tokio::spawn(self.retry_run(run));
                    return;
                }
            }
        }
    }

    async fn retry_run(self: Arc<Self>, run: VecDeque<Pending>) {
        tokio::time::sleep(RETRY_PAUSE).await;
        for pending in run {
            let wanted = || pending.is_wanted();
            let outcome = self
                .append_one(&pending.message, pending.until, wanted)
                .await;
            pending.answer(outcome);
        }
    }

    /// Publishes one message, as often as its time allows and its sender waits.
    pub async fn append_one(
        &self,
        message: &Outgoing,
        until: Instant,
        wanted: impl Fn() -> bool,
    ) -> Result<Sent> {
        loop {
            if let Some(outcome) = self.try_one(message, until, &wanted).await {
                return outcome;
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    /// One attempt to publish one message; `None` when another one makes sense.
    async fn try_one(
        &self,
        message: &Outgoing,
        until: Instant,
        wanted: impl Fn() -> bool,
    ) -> Option<Result<Sent>> {
        match self.appender.one(message, until).await {
            Ok(Appended {
                seq,
                duplicate: true,
            }) => Some(self.resolve(message, Stored::at(seq)).await),
            Ok(Appended {
                seq,
                duplicate: false,
            }) => Some(Ok(Sent {
                seq,
                duplicate: false,
            })),
            Err(AppendError::Transient(_)) if Instant::now() + RETRY_PAUSE < until && wanted() => {
                None
            }
            Err(error) => Some(Err(error.into_error())),
        }
    }
}

/// Queues whose first message is ready, in order.
struct Ready {
    queues: mpsc::UnboundedReceiver<Key>,
    /// A queue whose first message did not fit into the last batch.
    left_over: Option<Key>,
}

impl Ready {
    /// Everything that is ready, up to one batch. While fewer than `expected` messages are there,
    /// it also waits for those that follow closely. `None` when no sender is left.
    async fn gather(
        &mut self,
        sequencer: &Sequencer<Pending>,
        expected: usize,
    ) -> Option<Vec<Pending>> {
        let mut next = match self.left_over.take() {
            Some(left_over) => left_over,
            None => self.queues.recv().await?,
        };
        let mut batch: Vec<Pending> = Vec::new();
        let mut bytes = 0;
        loop {
            let before = batch.len();
            let mut count = before;
            let mut full = false;
            batch.extend(sequencer.take(&next, |pending| {
                let size = pending.message.max_wire_size();
                full = count == MAX_MESSAGES || (count > 0 && bytes + size > MAX_BYTES);
                if !full {
                    count += 1;
                    bytes += size;
                }
                !full
            }));
            if full {
                // A queue of which something was taken is announced again when that is answered.
                if batch.len() == before {
                    self.left_over = Some(next);
                }
                return Some(batch);
            }
            next = match self.queues.try_recv() {
                Ok(next) => next,
                Err(_) if batch.is_empty() => self.queues.recv().await?,
                Err(_) if batch.len() >= expected => return Some(batch),
                Err(_) => match timeout(LINGER, self.queues.recv()).await {
                    Ok(Some(next)) => next,
                    Ok(None) | Err(_) => return Some(batch),
                },
            };
        }
    }
}
