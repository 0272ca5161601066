//! The loop that connects, pulls, and starts again when pulling fails.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;

use super::pull::{Lost, PullError, PullRequests};
use super::{Batch, Delivery, PullConsumer};
use base::backoff::Backoff;
use base::log_once::LogOnce;
use base::seq::Seq;
use nats::connection::{Connection, connect};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Why pulling on one connection ended, and what was lost with the connection.
pub(super) struct Ended {
    error: PullError,
    lost: Lost,
}

/// Nobody processes batches any more.
pub(super) struct Closed;

impl PullConsumer {
    /// Pulls, and after every failure pulls again, until the process is asked to stop.
    pub(super) async fn pull_until_stopped(self, batches: mpsc::Sender<Batch>) {
        let stop = self.0.stream.stop().clone();
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut log = LogOnce::default();
        let mut previous = None;
        while !stop.is_cancelled() {
            let begun = Instant::now();
            let handed_over = self.0.handed_over.load(Ordering::Relaxed);
            let ended = match self.pull_until_error(&batches, previous).await {
                Ok(()) => return,
                Err(ended) => ended,
            };
            let error = ended.error;
            previous = Some(ended);
            let lasted = begun.elapsed() > LONGEST_PAUSE;
            // Messages that break one connection after another do not delay those between them.
            if lasted || self.0.handed_over.load(Ordering::Relaxed) != handed_over {
                backoff.reset();
            }
            if lasted {
                log.recovered();
            }
            if log.is_news(&error.to_string()) {
                tracing::warn!(%error, "pulling messages failed; connecting and pulling again");
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next_pause()) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    async fn pull_until_error(
        &self,
        batches: &mpsc::Sender<Batch>,
        previous: Option<Ended>,
    ) -> Result<(), Ended> {
        let Some(connection) = self.connect().await else {
            return Err(Ended {
                error: PullError::Broken,
                lost: previous.map(|previous| previous.lost).unwrap_or_default(),
            });
        };
        let mut delivered = Seq::ZERO;
        if let Ok(info) = self.0.stream.consumer().await {
            self.note_ack_wait(&info);
            delivered = info.delivered_through();
        }
        if let Some(previous) = previous
            && matches!(previous.error, PullError::Broken | PullError::Silent)
            && let Err(error) = self.recover(batches, previous.lost).await
        {
            tracing::debug!(
                %error,
                "messages that were on their way could not be read; they are delivered again after \
                 the consumer's ack_wait"
            );
        }
        let max_batch = self.0.options.max_batch;
        let names = self.0.stream.names();
        let mut pulls = PullRequests::start(connection, names, max_batch, delivered)
            .await
            .map_err(|error| Ended {
                error,
                lost: Lost {
                    after: delivered,
                    messages: max_batch,
                    ..Lost::default()
                },
            })?;
        match self.pull_batches(&mut pulls, batches).await {
            Ok(()) => {
                pulls.nak_unprocessed().await;
                Ok(())
            }
            Err(error) => {
                let lost = pulls.lost();
                pulls.close().await;
                Err(Ended { error, lost })
            }
        }
    }

    async fn connect(&self) -> Option<Connection> {
        let stream = &self.0.stream;
        let name = format!("{} (deliveries)", stream.client_name());
        connect(stream.settings(), &name, stream.stop()).await.ok()
    }

    async fn pull_batches(
        &self,
        pulls: &mut PullRequests,
        batches: &mpsc::Sender<Batch>,
    ) -> Result<(), PullError> {
        let slots = self.0.options.slots;
        loop {
            // A slot first, then messages: what arrives while all slots are occupied makes the next
            // batch larger, and while the application waits for its database we pull no more.
            let Some(slot) = self.slot_for(pulls).await? else {
                return Ok(());
            };
            // While another batch is being processed, a small batch gains nothing by hurrying. With
            // nothing in progress, a single message never waits.
            let busy = self.0.slots.available_permits() + 1 < slots;
            let linger = if busy {
                self.0.options.linger
            } else {
                Duration::ZERO
            };
            let deliveries = tokio::select! {
                deliveries = pulls.next(linger) => deliveries?.into(),
                () = self.0.stream.stop().cancelled() => return Ok(()),
            };
            if self.hand_over(batches, deliveries, slot).await.is_err() {
                return Ok(());
            }
        }
    }

    /// Waits for a slot. The semaphore is never closed, so this is never `None`.
    pub(super) async fn slot(&self) -> Option<OwnedSemaphorePermit> {
        self.0.slots.clone().acquire_owned().await.ok()
    }

    /// Waits for a slot; `None` when asked to stop. While batches that extend their ack deadlines
    /// occupy all slots, the deadlines of the messages that wait here are extended, too.
    async fn slot_for(
        &self,
        pulls: &mut PullRequests,
    ) -> Result<Option<OwnedSemaphorePermit>, PullError> {
        let mut before = self.0.extensions.load(Ordering::Relaxed);
        loop {
            tokio::select! {
                slot = self.slot() => return Ok(slot),
                () = self.0.stream.stop().cancelled() => return Ok(None),
                () = tokio::time::sleep(self.extension_interval()) => {}
            }
            let now = self.0.extensions.load(Ordering::Relaxed);
            if now != before {
                pulls.extend_acks().await?;
            }
            before = now;
        }
    }

    pub(super) async fn hand_over(
        &self,
        batches: &mpsc::Sender<Batch>,
        deliveries: Arc<[Delivery]>,
        slot: OwnedSemaphorePermit,
    ) -> Result<(), Closed> {
        self.0.handed_over.fetch_add(1, Ordering::Relaxed);
        batches
            .send(Batch { deliveries, slot })
            .await
            .map_err(|_| Closed)
    }
}
