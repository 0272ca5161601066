//! Erasing texts of hard-deleted messages from the stream.

use futures::future::try_join_all;

use crate::row::Key;
use base::seq::Seq;
use jetstream::stream::{StreamError, StreamReader};
use protocol::message::{Incoming, Limits};
use timeline::message::parse;

/// Erased at the same time. The stream overwrites and flushes them one after the other, some
/// milliseconds each: more at once would only wait there, and delay others.
pub const CONCURRENCY: usize = 8;

/// A sequence in the stream, and which message is to be erased there.
#[derive(Debug, Clone)]
pub struct Erasure {
    seq: Seq,
    key: Key,
}

impl Erasure {
    /// The message `key` under `seq`.
    pub fn new(seq: Seq, key: Key) -> Erasure {
        Erasure { seq, key }
    }

    /// Whether `message`, as found in the stream, is the deleted one.
    fn is(&self, message: &Incoming) -> bool {
        Key::of(message) == self.key
    }
}

/// Erases them, at most [`CONCURRENCY`]. What is gone already, or is another message by now, is
/// left alone.
///
/// # Errors
/// The stream does not answer. Doing it again does no harm.
pub async fn erase_in_stream(
    stream: &StreamReader,
    erasures: &[Erasure],
    limits: Limits,
) -> Result<(), StreamError> {
    let erasing = erasures.iter().map(|erasure| {
        stream.erase(erasure.seq, move |found| {
            parse(found, limits).is_ok_and(|message| erasure.is(&message))
        })
    });
    try_join_all(erasing).await.map(|_| ())
}
