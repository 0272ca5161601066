//! What stands in `CHAT_EVENTS` and is no event.
//!
//! JetStream acknowledges a message to whatever reply subject its publisher named, also to one of the events' subjects.
//! Readers of events skip what has no `ce-type`, and so does `relay-outbox`. But each of them takes room from events, and
//! whoever looks for the last event has to pass them over: so they are removed.

use std::sync::{Mutex, PoisonError};

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};

use nats::connection::{ApiError, Connection};
use protocol::bootstrap::Difference;
use protocol::subject::EVENTS_STREAM;
use timeline::published::foreign_events;

/// Messages looked at in one go, the newest first. What lies further behind is harmless, and leaves the stream with its age.
const LOOKED_AT: usize = 5_000;
const ROUNDS: usize = 10;
/// Requests in flight.
const CONCURRENCY: usize = 16;

/// Looks for messages that are no events.
#[derive(Debug, Default)]
pub struct Foreign {
    /// Up to here the stream was looked at, and nothing was found.
    clean: Mutex<u64>,
}

impl Foreign {
    /// One difference when there are some.
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

    /// Removes them; says how many.
    ///
    /// # Errors
    /// JetStream does not answer.
    pub async fn remove(&self, nats: &Connection) -> Result<Option<String>, ApiError> {
        let mut removed = 0;
        // Somebody may be adding to them all the time; the next look is in half a minute.
        for _ in 0..ROUNDS {
            let found = self.find(nats).await?;
            if found.is_empty() {
                break;
            }
            removed += found.len();
            let deletions: Vec<BoxFuture<'_, _>> = found
                .into_iter()
                .map(|position| delete(nats, position).boxed())
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
        let clean = *self.clean.lock().unwrap_or_else(PoisonError::into_inner);
        let (found, last) = foreign_events(nats, clean, LOOKED_AT).await?;
        if found.is_empty() {
            *self.clean.lock().unwrap_or_else(PoisonError::into_inner) = last;
        }
        Ok(found)
    }
}

async fn delete(nats: &Connection, position: u64) -> Result<(), ApiError> {
    // It holds nothing that has to be erased.
    let request = json!({ "seq": position, "no_erase": true });
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

/// What `MSG.DELETE` says of a message that another copy has removed.
const NOT_FOUND: u64 = 10_057;
