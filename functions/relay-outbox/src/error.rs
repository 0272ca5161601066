//! Why a round failed.

use jetstream::stream::StreamError;
use nats::connection::ApiError;
use postgres::error::DatabaseError;
use protocol::subject::EVENTS_STREAM;

/// Why a round failed. Nothing is lost: the next round finds what this one published, and publishes
/// the rest. It never contains anything from a message.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The chat stream, which says what is stored, does not answer.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The stream of events does not answer.
    #[error("stream {stream}: {0} (is stream-bootstrap running?)", stream = EVENTS_STREAM)]
    Events(#[from] ApiError),
    /// PostgreSQL failed.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// The stream has events that we did not know of: another replica took the lock while we were
    /// paused.
    #[error("another replica has published since")]
    Superseded,
    /// JetStream did not accept an event, or we do not know whether it did.
    #[error("stream {stream}: {0}", stream = EVENTS_STREAM)]
    Publish(String),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Error {
        Error::Database(error.into())
    }
}
