//! Messages in `CHAT_EVENTS` that are not events.
//!
//! JetStream sends its publish acknowledgement to whatever reply subject the publisher named, which
//! may be one of the events' subjects. Readers of events skip messages without `ce-type`, and so
//! does `relay-outbox`. But each of them uses space, and a search for the last event has to pass
//! over them. So they are removed.

use std::sync::{Mutex, PoisonError};

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};

use nats::connection::{ApiError, Connection};
use protocol::bootstrap::Difference;
use protocol::subject::EVENTS_STREAM;
use timeline::published::foreign_events;

/// Messages inspected together, starting with the newest. Older ones are harmless, and leave the
/// stream when they reach its maximum age.
const CHUNK: usize = 5_000;
const MAX_ROUNDS: usize = 10;
/// Requests in flight.
const CONCURRENCY: usize = 16;
/// The `err_code` of `MSG.DELETE` for a message that another replica has removed.
const NOT_FOUND: u64 = 10_057;

/// Finds messages that are not events.
#[derive(Debug, Default)]
pub struct ForeignEvents {
    /// The stream holds only events up to this sequence.
    clean_through: Mutex<u64>,
}

impl ForeignEvents {
    /// One difference if there are any.
    ///
    /// # Errors
    /// JetStream does not answer.
    pub async fn check(&self, nats: &Connection) -> Result<Option<Difference>, ApiError> {
        let found = self.find(nats).await?;
        Ok((!found.is_empty()).then(|| Difference {
            object: format!("stream {EVENTS_STREAM}"),
            field: "(messages that are no events)".to_owned(),
            wanted: 0.into(),
            actual: found.len().into(),
        }))
    }

    /// Removes them; returns a message with their number.
    ///
    /// # Errors
    /// JetStream does not answer.
    pub async fn remove(&self, nats: &Connection) -> Result<Option<String>, ApiError> {
        let mut removed = 0;
        // A publisher may keep adding more; the next run continues.
        for _ in 0..MAX_ROUNDS {
            let found = self.find(nats).await?;
            if found.is_empty() {
                break;
            }
            removed += found.len();
            let deletions: Vec<BoxFuture<'_, _>> = found
                .into_iter()
                .map(|seq| delete(nats, seq).boxed())
                .collect();
            stream::iter(deletions)
                .buffer_unordered(CONCURRENCY)
                .try_collect::<Vec<()>>()
                .await?;
        }
        Ok((removed > 0).then(|| {
            format!("stream {EVENTS_STREAM}: {removed} messages that are no events were removed")
        }))
    }

    async fn find(&self, nats: &Connection) -> Result<Vec<u64>, ApiError> {
        let clean_through = *self
            .clean_through
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (found, last) = foreign_events(nats, clean_through, CHUNK).await?;
        if found.is_empty() {
            *self
                .clean_through
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = last;
        }
        Ok(found)
    }
}

async fn delete(nats: &Connection, seq: u64) -> Result<(), ApiError> {
    // These messages contain nothing that has to be overwritten on the disk.
    let request = json!({ "seq": seq, "no_erase": true });
    match nats
        .api::<Value>(
            &jetstream::api::stream("MSG.DELETE", EVENTS_STREAM),
            &request,
        )
        .await
    {
        Ok(_) => Ok(()),
        Err(error) if error.is(ApiError::NO_MESSAGE) || error.is(NOT_FOUND) => Ok(()),
        Err(error) => Err(error),
    }
}
