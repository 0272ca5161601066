//! Where the stream stands when a read begins.

use base::seq::Seq;
use jetstream::stream::{StreamError, StreamReader};

/// Where the stream stood when a read began. It is the first thing that a read loads:
/// [`merge`](crate::merge) says why.
#[derive(Debug, Clone, Copy)]
pub struct Frontier {
    /// Everything up to here is committed to PostgreSQL. It may be an old value, because it only
    /// grows.
    pub stored_through: Seq,
    /// The stream's last sequence.
    pub end: Seq,
}

impl Frontier {
    /// Asks the stream.
    ///
    /// # Errors
    /// The stream does not answer.
    pub async fn load(stream: &StreamReader) -> Result<Frontier, StreamError> {
        let (stored_through, (_, last)) =
            tokio::try_join!(stream.stored_through(), stream.range())?;
        Ok(Frontier {
            stored_through,
            end: last.max(stored_through),
        })
    }

    /// For a read without PostgreSQL: everything that the stream holds counts as not stored.
    ///
    /// # Errors
    /// The stream does not answer.
    pub async fn of_stream_alone(stream: &StreamReader) -> Result<Frontier, StreamError> {
        let (first, last) = stream.range().await?;
        Ok(Frontier {
            stored_through: first.previous(),
            end: last,
        })
    }

    /// Everything is stored.
    pub fn is_all_stored(self) -> bool {
        self.end <= self.stored_through
    }

    /// The first position that may not be stored.
    pub fn first_unstored(self) -> Seq {
        self.stored_through.next()
    }
}
