//! Why a round failed. Holds nothing a message said.

use jetstream::stream::StreamError;
use nats::connection::ApiError;
use postgres::error::DatabaseError;
use protocol::subject::EVENTS_STREAM;

/// Why a round failed; nothing was relayed by it that the next one would not find out.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// How far the index is.
    #[error(transparent)]
    Log(#[from] StreamError),
    /// How far the events are.
    #[error("stream {stream}: {0} (is stream-bootstrap running?)", stream = EVENTS_STREAM)]
    Events(#[from] ApiError),
    /// PostgreSQL.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// The stream has events we did not know of: another copy took our place while we stood still.
    #[error("another copy has published since")]
    Superseded,
    /// JetStream did not take an event, or nobody knows whether it did.
    #[error("stream {stream}: {0}", stream = EVENTS_STREAM)]
    Publish(String),
}

impl From<sqlx::Error> for Trouble {
    fn from(error: sqlx::Error) -> Trouble {
        Trouble::Database(error.into())
    }
}
