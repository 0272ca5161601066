//! Recovering messages that were on their way when the connection for deliveries broke.
//!
//! A message with malformed headers breaks every connection it is sent on, so pulling again would
//! break again, and the messages sent together with it would wait for `ack_wait`. They are read
//! from the stream instead, where malformed headers do no harm.

use std::time::Duration;

use tokio::sync::mpsc;

use super::pull::Lost;
use super::{Batch, Delivery, PullConsumer};
use crate::stream::{Limit, RawMessage, StreamError};

/// What one step of a recovery may read.
const RECOVER_BYTES: usize = 16 << 20;
const RECOVER_TIME: Duration = Duration::from_secs(30);

impl PullConsumer {
    /// Hands over what was on its way to a connection that broke.
    ///
    /// Above the highest sequence we received are the messages that the server sent and we never
    /// saw: at most as many as it was asked for. Below it only malformed messages are looked for.
    /// Such a message that is delivered again may be anywhere below; because nobody can acknowledge
    /// it, the ack floor sooner or later stops right below it, and it is found there.
    pub(super) async fn recover(
        &self,
        batches: &mpsc::Sender<Batch>,
        lost: Lost,
    ) -> Result<(), StreamError> {
        if !self.hand_over_recovered(batches, lost.ready).await {
            return Ok(());
        }
        let info = self.0.stream.consumer().await?;
        let acknowledged = info.acknowledged_through();
        let delivered = info.delivered_through();
        let received = lost.after.max(acknowledged);
        let below = Limit::within(self.0.options.max_batch, RECOVER_BYTES, RECOVER_TIME);
        let above = Limit::within(lost.messages, RECOVER_BYTES, RECOVER_TIME);
        for (from, to, limit) in [
            (acknowledged.next(), received, below),
            (received.next(), delivered, above),
        ] {
            if from > to {
                continue;
            }
            // By number: a direct get takes its time to notice that it met a malformed message.
            let mut found = self.0.stream.scan(from, to, limit).await?.messages;
            found.retain(|raw| raw.malformed || from > received);
            log_malformed(&found);
            let recovered = found.into_iter().map(delivery).collect();
            if !self.hand_over_recovered(batches, recovered).await {
                return Ok(());
            }
        }
        Ok(())
    }

    /// False when nobody processes batches any more.
    async fn hand_over_recovered(
        &self,
        batches: &mpsc::Sender<Batch>,
        mut recovered: Vec<Delivery>,
    ) -> bool {
        while !recovered.is_empty() {
            let rest = recovered.split_off(self.0.options.max_batch.min(recovered.len()));
            let Some(slot) = self.slot().await else {
                return false;
            };
            if self
                .hand_over(batches, recovered.into(), slot)
                .await
                .is_err()
            {
                return false;
            }
            recovered = rest;
        }
        true
    }
}

fn log_malformed(found: &[RawMessage]) {
    let malformed = found.iter().filter(|raw| raw.malformed).count();
    if malformed > 0 {
        tracing::warn!(
            malformed,
            "the stream holds messages whose headers or subject no client can parse; they are \
             handed to the application as malformed, and then removed from the stream"
        );
    }
}

fn delivery(raw: RawMessage) -> Delivery {
    Delivery {
        malformed: raw.malformed.then_some(raw.header_block),
        message: raw.message,
        attempt: 0,
        ack: None,
    }
}
