//! Atomic batches: JetStream stores all messages of a batch consecutively and with one flush, or
//! none.
//!
//! The stream has to allow them (`allow_atomic`). All messages but the last are published without a
//! reply; the last one commits the batch and is acknowledged. A batch that contains an id the
//! stream remembers is refused as a whole ([`err_code::DUPLICATE_IN_BATCH`]).
//!
//! [`err_code::DUPLICATE_IN_BATCH`]: crate::publish::err_code::DUPLICATE_IN_BATCH

use std::time::Duration;

use async_nats::Client;
use async_nats::header::{HeaderMap, HeaderValue};

use crate::publish::{Message, PublishAck, PublishError, publish};

/// The most messages JetStream accepts in one batch.
pub const MAX_MESSAGES: usize = 1_000;

const BATCH_ID: &str = "Nats-Batch-Id";
const BATCH_SEQUENCE: &str = "Nats-Batch-Sequence";
const BATCH_COMMIT: &str = "Nats-Batch-Commit";

/// Numbers the messages of one batch.
#[derive(Debug)]
pub struct BatchHeaders {
    id: HeaderValue,
    sequence: usize,
}

impl BatchHeaders {
    /// A batch with an id nobody else uses.
    pub fn new(client: &Client) -> BatchHeaders {
        // The last token of an inbox is unique.
        let inbox = client.new_inbox();
        let id = inbox.rsplit('.').next().unwrap_or_default();
        BatchHeaders {
            id: id.parse().unwrap_or_default(),
            sequence: 0,
        }
    }

    /// Makes a message with these headers the next one of the batch.
    pub fn add(&mut self, headers: &mut HeaderMap) {
        self.sequence += 1;
        headers.insert(BATCH_ID, self.id.clone());
        headers.insert(BATCH_SEQUENCE, HeaderValue::from(self.sequence));
    }

    /// Makes a message with these headers the next and last one: it commits the batch.
    pub fn commit(&mut self, headers: &mut HeaderMap) {
        self.add(headers);
        headers.insert(BATCH_COMMIT, HeaderValue::from(1));
    }
}

/// Publishes `messages` as one batch, in their order, and waits at most `limit` for the
/// acknowledgement, whose sequence is that of the last message.
///
/// # Errors
/// [`PublishError`]. After [`PublishError::Unanswered`] the stream holds all of them or none.
pub async fn publish_batch(
    client: &Client,
    messages: Vec<Message>,
    limit: Duration,
) -> Result<PublishAck, PublishError> {
    let count = messages.len();
    let mut headers = BatchHeaders::new(client);
    for (index, mut message) in messages.into_iter().enumerate() {
        if index + 1 < count {
            headers.add(&mut message.headers);
            client
                .publish_with_headers(message.subject, message.headers, message.payload)
                .await
                .map_err(|error| PublishError::Unanswered(error.to_string()))?;
            continue;
        }
        headers.commit(&mut message.headers);
        let ack = publish(client, message, limit).await?;
        if ack.count == count {
            return Ok(ack);
        }
        let acknowledged = ack.count;
        return Err(PublishError::Unanswered(format!(
            "a batch of {count} was acknowledged as {acknowledged}"
        )));
    }
    Err(PublishError::Unanswered("an empty batch".to_owned()))
}
