//! Which message is meant: from the index, and what the index does not have yet, from the log.

use crate::Shared;
use crate::found::{Found, State};
use crate::index::{self, Rows};
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::stream::{Limit, StreamMessage};
use protocol::change::{Change, Deletion};
use protocol::conversation::Conversation;
use protocol::delete::{DeleteRequest, MessageKey};
use protocol::message::derived_id;
use service::ctx::Ctx;
use timeline::message::parse;
use timeline::tail::changes;

/// Messages looked at together in the log.
const CHUNK: usize = 1_000;
const CHUNK_BYTES: usize = 4 << 20;
/// Deletions of one conversation that may wait to be stored; with more of them it is a 503.
const DELETIONS: usize = 10_000;
const DELETIONS_BYTES: usize = 8 << 20;

fn limit(ctx: &Ctx<Shared>, messages: usize, bytes: usize) -> Limit {
    Limit::within(messages, bytes, ctx.settings().request_deadline())
}

/// Finds the message.
///
/// # Errors
/// 404, 409 when a moderator's id is not enough, 503 when it cannot be told.
pub async fn find(ctx: &Ctx<Shared>, ask: &DeleteRequest, moderates: bool) -> Result<Found> {
    // The floor first: what it says is stored, the index has when it is read.
    let floor = ctx.chat.stream().stored_through().await?;
    let indexed = index::find(ctx.chat.database(), ask, moderates).await?;
    let from_index = match &indexed {
        Some(Rows::Several) => {
            return Err(Error::new(
                Code::Conflict,
                "several people have used this id here: name the message by its seq",
            ));
        }
        Some(Rows::One(found)) => Some((**found).clone()),
        Some(Rows::None) | None => None,
    };
    let found = match from_index {
        Some(found) => Some(found),
        None => in_log(ctx, ask, moderates, indexed.is_some().then_some(floor)).await?,
    };
    // What the log has above the floor may be a deletion, also of a message that nobody stored and that is erased.
    let deletions = changes(
        ctx.chat.stream(),
        &ask.conversation.change_subject(),
        floor.next(),
        limit(ctx, DELETIONS, DELETIONS_BYTES),
    )
    .await?;
    let Some(mut found) = found.or_else(|| erased(ask, &deletions)) else {
        return Err(match indexed {
            Some(_) => Error::new(Code::NotFound, "there is no such message here"),
            None => Error::new(
                Code::Unavailable,
                "the database is away, and the log does not hold this message; try again",
            ),
        });
    };
    for change in deletions
        .iter()
        .filter(|change| change.covers(&found.message))
    {
        found.state = found.state.max(State::of(change.deletion.mode));
    }
    Ok(found)
}

/// What a deletion says of the message it erased.
fn erased(ask: &DeleteRequest, deletions: &[Change]) -> Option<Found> {
    let is = |change: &&Change| match &ask.key {
        MessageKey::Seq(seq) => change.deletion.target == *seq,
        MessageKey::Id(id) => {
            change.deletion.id == *id
                && (change.deletion.user == ask.user.as_str() || change.deletion.derived)
        }
    };
    let change = deletions.iter().find(is)?;
    let Deletion {
        derived, received, ..
    } = change.deletion;
    Some(Found {
        message: change.tombstone(),
        derived,
        received_ms: received,
        state: State::There,
    })
}

/// Looks for the message where the index may not reach yet: above `floor`, or, while the database is away, anywhere.
async fn in_log(
    ctx: &Ctx<Shared>,
    ask: &DeleteRequest,
    moderates: bool,
    floor: Option<Seq>,
) -> Result<Option<Found>> {
    let by_seq = match &ask.key {
        MessageKey::Seq(seq) => Some(*seq),
        MessageKey::Id(id) => id
            .strip_prefix("seq:")
            .and_then(|seq| seq.parse().ok())
            .and_then(Seq::new)
            .filter(|seq| derived_id(*seq) == *id),
    };
    if let Some(seq) = by_seq
        && let Some(found) = at(ctx, &ask.conversation, seq).await?
        && (matches!(ask.key, MessageKey::Seq(_)) || found.derived)
    {
        // Its id may stand under another sequence already; then that one is shown, and is meant.
        return match index::first_of(ctx.chat.database(), &found).await? {
            Some(first) if first.message.room == found.message.room => Ok(Some(first)),
            // Up to the floor the index has whatever can be read; a dead letter cannot be deleted here.
            Some(_) => Ok(None),
            None => {
                Ok(Some(found).filter(|found| floor.is_none_or(|floor| found.message.seq > floor)))
            }
        };
    }
    match &ask.key {
        MessageKey::Seq(_) => Ok(None),
        MessageKey::Id(id) => by_id(ctx, ask, id, moderates, floor).await,
    }
}

/// The message at `seq`, if it is one of the conversation's.
async fn at(ctx: &Ctx<Shared>, conversation: &Conversation, seq: Seq) -> Result<Option<Found>> {
    let found = ctx.chat.stream().at(seq).await?;
    let message = found
        .filter(|raw| !raw.malformed)
        .and_then(|raw| read(ctx, &raw.message));
    Ok(message.filter(|found| found.message.room == conversation.name()))
}

/// The first message with `id`, the asker's own before anybody else's.
async fn by_id(
    ctx: &Ctx<Shared>,
    ask: &DeleteRequest,
    id: &str,
    moderates: bool,
    floor: Option<Seq>,
) -> Result<Option<Found>> {
    let mut others: Option<Found> = None;
    let limit = limit(ctx, CHUNK, CHUNK_BYTES);
    for subject in ask.conversation.stream_subjects() {
        let mut next = floor.unwrap_or(Seq::ZERO).next();
        loop {
            let window = ctx.chat.stream().first(&subject, next, limit).await?;
            for found in window
                .messages
                .iter()
                .filter_map(|message| read(ctx, message))
                .filter(|found| !found.derived)
            {
                if found.message.id != id {
                    continue;
                }
                if found.message.user == ask.user.as_str() {
                    return Ok(Some(found));
                }
                if others
                    .as_ref()
                    .is_some_and(|other| other.message.user != found.message.user)
                    && moderates
                {
                    return Err(Error::new(
                        Code::Conflict,
                        "several people have used this id here: name the message by its seq",
                    ));
                }
                others.get_or_insert(found);
            }
            match window.messages.last() {
                Some(last) if !window.complete => next = last.seq.next(),
                Some(_) | None => break,
            }
        }
    }
    Ok(others)
}

fn read(ctx: &Ctx<Shared>, message: &StreamMessage) -> Option<Found> {
    let limits = ctx.chat.limits();
    let read = parse(message, limits).ok()?;
    let (derived, received_ms) = (read.id.is_none(), message.received_ms);
    Some(Found {
        message: read.into_message(),
        derived,
        received_ms,
        state: State::There,
    })
}
