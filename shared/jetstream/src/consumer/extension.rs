//! Processing that takes longer than the consumer's `ack_wait`.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::{Delivery, PullConsumer};

/// Reports to the server that a message is being worked on: its `ack_wait` begins again.
pub(super) const IN_PROGRESS: &str = "+WPI";
/// A deadline is extended every `ack_wait` divided by this, so that a late report still arrives in
/// time.
const EXTENSIONS_PER_ACK_WAIT: u32 = 4;

/// Extends the ack deadline of a batch while parts of its processing run. Without it, processing
/// that takes longer than `ack_wait` has the batch delivered to another process.
#[derive(Debug)]
pub struct AckExtension<'a> {
    consumer: &'a PullConsumer,
    deliveries: &'a [Delivery],
    extended: Instant,
}

impl PullConsumer {
    /// For `deliveries`, whose processing begins now.
    pub fn extend_acks<'a>(&'a self, deliveries: &'a [Delivery]) -> AckExtension<'a> {
        AckExtension {
            consumer: self,
            deliveries,
            extended: Instant::now(),
        }
    }

    /// How often deadlines are extended.
    pub(super) fn extension_interval(&self) -> Duration {
        let ack_wait = Duration::from_millis(self.0.ack_wait_ms.load(Ordering::Relaxed));
        ack_wait / EXTENSIONS_PER_ACK_WAIT
    }
}

impl AckExtension<'_> {
    /// Awaits `work`, which must have a deadline of its own. Meanwhile neither this batch nor those
    /// that wait for a slot behind it are delivered again, and the watchdog sees progress. Outside
    /// of this call nothing is extended: a batch that stands still there for `ack_wait` goes to
    /// another process.
    pub async fn during<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = sleep_until(self.extended + self.consumer.extension_interval()) => {
                    self.extend().await;
                }
            }
        }
    }

    async fn extend(&mut self) {
        self.extended = Instant::now();
        let shared = &self.consumer.0;
        shared.extensions.fetch_add(1, Ordering::Relaxed);
        let client = shared.stream.control().client();
        for ack in self
            .deliveries
            .iter()
            .filter_map(|delivery| delivery.ack.clone())
        {
            if let Err(error) = client.publish(ack, IN_PROGRESS.into()).await {
                tracing::debug!(
                    %error,
                    "an ack deadline could not be extended; the message may be delivered again, \
                     which does no harm"
                );
            }
        }
    }
}
