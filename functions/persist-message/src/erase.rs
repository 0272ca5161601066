//! Texts that were deleted for good, in the log.

use futures::future::try_join_all;

use crate::batch::Key;
use base::seq::Seq;
use jetstream::stream::{StreamError, StreamReader};
use protocol::message::{Incoming, Limits};
use timeline::message::parse;

/// Erased together. The log overwrites and flushes one after the other, some milliseconds each: more at once would only wait there, and let
/// others wait.
pub const TOGETHER: usize = 8;

/// One place in the log, and what is to be erased there.
#[derive(Debug, Clone)]
pub struct Erasure {
    seq: Seq,
    key: Key,
}

impl Erasure {
    /// The message `key` names, at `seq`.
    pub fn new(seq: Seq, key: Key) -> Erasure {
        Erasure { seq, key }
    }

    /// Whether `message`, read from its place in the log or from a letter, is the one that was deleted.
    pub fn is(&self, message: &Incoming) -> bool {
        let Key {
            sender,
            id,
            derived,
        } = &self.key;
        let same_id = if *derived {
            message.id.is_none() && message.shown_id() == *id
        } else {
            message.id.as_ref() == Some(id)
        };
        message.user == *sender && same_id
    }
}

/// Erases them, [`TOGETHER`] at most; what is gone already, or is another message by now, is left alone.
///
/// # Errors
/// The log does not answer. Doing it again is harmless.
pub async fn erase(
    log: &StreamReader,
    erasures: &[Erasure],
    limits: Limits,
) -> Result<(), StreamError> {
    try_join_all(
        erasures
            .iter()
            .map(|erasure| erase_one(log, erasure, limits)),
    )
    .await
    .map(|_| ())
}

async fn erase_one(
    log: &StreamReader,
    erasure: &Erasure,
    limits: Limits,
) -> Result<bool, StreamError> {
    log.erase(erasure.seq, |found| {
        parse(found, limits).is_ok_and(|message| erasure.is(&message))
    })
    .await
}
