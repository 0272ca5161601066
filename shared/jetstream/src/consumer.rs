//! A pull consumer whose processing is shared by any number of processes.
//!
//! Every process that runs a [`PullConsumer`] on the same durable consumer gets a part of the
//! messages, in batches. A batch is acknowledged after the application says that it is processed; a
//! message may be delivered more than once.
//!
//! Deliveries have a connection of their own, because a stored message with malformed headers ends
//! the connection of every client that receives it (see [`crate::stream`]). When that connection
//! breaks, what was on its way is read from the stream instead (`recover.rs`): malformed messages
//! are handed to the application marked as such, and removed from the stream once they are
//! processed. Other processes' deliveries are left alone.

mod extension;
mod pull;
mod pulling;
mod recover;
mod watchdog;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_nats::Subject;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

use crate::info::ConsumerInfo;
use crate::stream::{StreamMessage, StreamReader};
use base::error::Fatal;

pub use extension::AckExtension;

/// Acknowledges a message.
const ACK: &str = "+ACK";
/// How long the last acknowledgements may take to leave the process.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// The consumer's `ack_wait`, until its configuration is known.
const DEFAULT_ACK_WAIT: Duration = Duration::from_secs(30);

/// One message, as delivered.
#[derive(Debug)]
pub struct Delivery {
    /// The message.
    pub message: StreamMessage,
    /// How often it was delivered, this time included; 0 when it was read from the stream instead.
    pub attempt: u64,
    /// The header block no client can parse, or the empty block under a subject that is not UTF-8.
    pub malformed: Option<Vec<u8>>,
    /// Where to acknowledge it; `None` when it was read from the stream.
    pub(crate) ack: Option<Subject>,
}

/// What the application did with a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Every message is processed: acknowledge the batch.
    Processed,
    /// The process was asked to stop first: leave the batch, so that it is delivered again.
    Abandoned,
}

/// How a [`PullConsumer`] works.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The most messages in one batch.
    pub max_batch: usize,
    /// Batches processed at the same time: while one waits for its commit, another is parsed.
    pub slots: usize,
    /// How long a batch may gather while another one is being processed.
    pub linger: Duration,
    /// The consumer ends with an error when messages are pending and nothing moves for so long.
    pub stuck_after: Duration,
}

impl Options {
    /// Two slots, and a linger of 10 ms.
    pub const fn new(max_batch: usize, stuck_after: Duration) -> Options {
        Options {
            max_batch,
            slots: 2,
            linger: Duration::from_millis(10),
            stuck_after,
        }
    }
}

/// One process's part in a durable consumer.
#[derive(Clone)]
pub struct PullConsumer(Arc<Shared>);

struct Shared {
    stream: Arc<StreamReader>,
    options: Options,
    /// Messages acknowledged since the start.
    acknowledged: AtomicU64,
    /// How often a batch extended its ack deadline.
    extensions: AtomicU64,
    /// Batches handed to the application.
    handed_over: AtomicU64,
    ack_wait_ms: AtomicU64,
    watchdog_paused: AtomicBool,
    slots: Arc<Semaphore>,
}

/// Deliveries on their way to the application, and the slot they occupy.
struct Batch {
    deliveries: Arc<[Delivery]>,
    slot: OwnedSemaphorePermit,
}

impl fmt::Debug for PullConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullConsumer")
            .field("name", &self.0.stream.client_name())
            .finish_non_exhaustive()
    }
}

impl PullConsumer {
    /// A part in the durable consumer that `stream` names.
    pub fn new(stream: Arc<StreamReader>, options: Options) -> PullConsumer {
        PullConsumer(Arc::new(Shared {
            stream,
            options,
            acknowledged: AtomicU64::new(0),
            extensions: AtomicU64::new(0),
            handed_over: AtomicU64::new(0),
            ack_wait_ms: AtomicU64::new(DEFAULT_ACK_WAIT.as_millis() as u64),
            watchdog_paused: AtomicBool::new(false),
            slots: Arc::new(Semaphore::new(options.slots)),
        }))
    }

    /// Pauses the watchdog while the application knows why nothing moves, for example because its
    /// database is away.
    pub fn pause_watchdog(&self, paused: bool) {
        self.0.watchdog_paused.store(paused, Ordering::Relaxed);
    }

    /// Messages acknowledged since the start.
    pub fn acknowledged(&self) -> u64 {
        self.0.acknowledged.load(Ordering::Relaxed)
    }

    /// Pulls batches and passes each to `process`, until the process is asked to stop; acknowledges
    /// a batch that was [`Outcome::Processed`]. [`Options::slots`] batches are processed at the
    /// same time, and the next one is pulled meanwhile.
    ///
    /// # Errors
    /// The consumer is stuck: messages are pending, and nothing moved for [`Options::stuck_after`].
    pub async fn run<P, F>(&self, process: P) -> Result<(), Fatal>
    where
        P: Fn(Arc<[Delivery]>) -> F,
        F: Future<Output = Outcome>,
    {
        let (sender, mut batches) = mpsc::channel::<Batch>(self.0.options.slots);
        let puller = tokio::spawn(self.clone().pull_until_stopped(sender));
        let consume = async {
            let mut in_progress = FuturesUnordered::new();
            loop {
                tokio::select! {
                    batch = batches.recv() => match batch {
                        Some(batch) => in_progress.push(self.handle(&process, batch)),
                        None => break,
                    },
                    Some(()) = in_progress.next() => {}
                }
            }
            while in_progress.next().await.is_some() {}
        };
        let mut outcome = tokio::select! {
            () = consume => Ok(()),
            stuck = self.watch() => Err(stuck),
        };
        puller.abort();
        if let Err(error) = puller.await
            && error.is_panic()
        {
            outcome = Err(Fatal::new(format!(
                "the task that pulls messages is gone: {error}; leaving so that a fresh start can"
            )));
        }
        self.flush().await;
        outcome
    }

    /// An acknowledgement that is only queued is lost when the process ends.
    async fn flush(&self) {
        let flushed = timeout(FLUSH_TIMEOUT, self.0.stream.control().client().flush()).await;
        if !matches!(flushed, Ok(Ok(()))) {
            tracing::warn!(
                "the last acknowledgements may not have reached the server; if so, those messages \
                 are delivered again, which does no harm"
            );
        }
    }

    async fn handle<F: Future<Output = Outcome>>(
        &self,
        process: &impl Fn(Arc<[Delivery]>) -> F,
        batch: Batch,
    ) {
        if process(batch.deliveries.clone()).await == Outcome::Processed {
            self.acknowledge(&batch.deliveries).await;
        }
        drop(batch.slot);
    }

    async fn acknowledge(&self, batch: &[Delivery]) {
        let client = self.0.stream.control().client();
        let mut acknowledged = 0;
        for delivery in batch {
            let seq = delivery.message.seq;
            if let Some(ack) = &delivery.ack {
                match client.publish(ack.clone(), ACK.into()).await {
                    Ok(()) => acknowledged += 1,
                    Err(error) => tracing::warn!(
                        %seq, %error,
                        "an acknowledgement could not be sent; the message is delivered again"
                    ),
                }
            }
            if delivery.malformed.is_some()
                && let Err(error) = self.0.stream.delete(seq).await
            {
                tracing::warn!(
                    %seq, %error,
                    "a malformed message could not be removed from the stream; it is processed \
                     again and removed then"
                );
            }
        }
        self.0
            .acknowledged
            .fetch_add(acknowledged, Ordering::Relaxed);
    }

    fn note_ack_wait(&self, info: &ConsumerInfo) {
        let ack_wait = Duration::from_nanos(info.config.ack_wait);
        if !ack_wait.is_zero() {
            let ms = u64::try_from(ack_wait.as_millis()).unwrap_or(u64::MAX);
            self.0.ack_wait_ms.store(ms, Ordering::Relaxed);
        }
    }
}
