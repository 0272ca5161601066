//! Deletions that may not be stored yet, read from the stream.

use futures::future::try_join_all;
use tokio::time::Instant;

use base::seq::Seq;
use jetstream::stream::{Limit, StreamError, StreamMessage, StreamReader};
use protocol::change::Change;
use protocol::subject::CHANGES;

/// Up to so many deletions of all conversations together are read for a page; with more of them
/// only those of its own conversation are.
const FEW: usize = 200;
const FEW_BYTES: usize = 256 << 10;
/// So many deletions of one conversation may wait to be stored; with more of them its pages are a
/// 503.
const MOST_OF_ONE: usize = 10_000;
const MOST_OF_ONE_BYTES: usize = 8 << 20;

/// The changes of all conversations from `from` on; `None` when there are more than a few.
///
/// # Errors
/// The stream does not answer.
pub async fn few_changes(
    stream: &StreamReader,
    from: Seq,
    until: Instant,
) -> Result<Option<Vec<Change>>, StreamError> {
    let few = Limit {
        messages: FEW,
        bytes: FEW_BYTES,
        until,
    };
    let window = stream.first(CHANGES, from, few).await?;
    Ok(window.complete.then(|| parse_all(&window.messages)))
}

/// Every change on some subjects, such as that of one conversation, from `from` on; oldest first on
/// each subject.
///
/// # Errors
/// The stream does not answer, or a subject has more than 10,000 changes. Without all of them a
/// reader might be shown a text that was deleted.
pub async fn changes_on(
    stream: &StreamReader,
    subjects: &[String],
    from: Seq,
    until: Instant,
) -> Result<Vec<Change>, StreamError> {
    let all = Limit {
        messages: MOST_OF_ONE,
        bytes: MOST_OF_ONE_BYTES,
        until,
    };
    let read = subjects
        .iter()
        .map(|subject| changes_on_one(stream, subject, from, all));
    let changes = try_join_all(read).await?;
    Ok(changes.into_iter().flatten().collect())
}

async fn changes_on_one(
    stream: &StreamReader,
    subject: &str,
    from: Seq,
    all: Limit,
) -> Result<Vec<Change>, StreamError> {
    let window = stream.first(subject, from, all).await?;
    if !window.complete {
        return Err(StreamError::TooMuch("deletions"));
    }
    Ok(parse_all(&window.messages))
}

fn parse_all(messages: &[StreamMessage]) -> Vec<Change> {
    messages.iter().filter_map(parse).collect()
}

/// `None` for what becomes a dead letter.
fn parse(message: &StreamMessage) -> Option<Change> {
    Change::parse(
        &message.subject,
        &message.payload,
        message.seq,
        message.received_ms,
    )
    .ok()
}
