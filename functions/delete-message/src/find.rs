//! Finds the message that a request means: in PostgreSQL, and what is not stored yet, in the
//! stream.

use tokio::time::Instant;

use crate::Shared;
use crate::query::{self, Lookup};
use crate::target::{DeletionState, Target};
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::stream::{Limit, StreamMessage};
use protocol::change::{Change, Deletion};
use protocol::conversation::Conversation;
use protocol::delete::{DeleteRequest, MessageKey};
use protocol::message::derived_id;
use service::ctx::Ctx;
use timeline::changes::changes_on;
use timeline::message::parse;

/// So much of the stream is read at once.
const CHUNK: usize = 1_000;
const CHUNK_BYTES: usize = 4 << 20;

/// Finds the message.
///
/// # Errors
/// 404; 409 when a moderator's id is not enough; 503 when PostgreSQL or the stream must answer and
/// does not.
pub async fn find(
    ctx: &Ctx<Shared>,
    request: &DeleteRequest,
    is_moderator: bool,
) -> Result<Target> {
    // First: everything up to here is stored, so the lookup below finds it.
    let stored_through = ctx.chat.stream().stored_through().await?;
    let lookup = query::find(ctx.chat.database(), request, is_moderator).await?;
    // While PostgreSQL is away, the message may stand anywhere in the stream.
    let unstored_from = match lookup {
        Some(_) => stored_through,
        None => Seq::ZERO,
    }
    .next();
    let target = match &lookup {
        Some(Lookup::Several) => return Err(ambiguous()),
        Some(Lookup::One(target)) => Some((**target).clone()),
        Some(Lookup::None) | None => {
            find_in_stream(ctx, request, is_moderator, unstored_from).await?
        }
    };
    // A deletion above `stored_through` may concern the message, and it may be all that is left of
    // a message that was erased before anybody stored it.
    let deletions = changes_on(
        ctx.chat.stream(),
        &[request.conversation.change_subject()],
        stored_through.next(),
        Instant::now() + ctx.settings().request_deadline(),
    )
    .await?;
    let Some(mut target) = target.or_else(|| erased(request, &deletions)) else {
        return Err(match lookup {
            Some(_) => Error::new(Code::NotFound, "there is no such message here"),
            None => Error::new(
                Code::Unavailable,
                "the database is away, and the stream does not hold this message; try again",
            ),
        });
    };
    for change in deletions
        .iter()
        .filter(|change| change.covers(&target.message))
    {
        let state = DeletionState::of(change.deletion.mode);
        target.state = target.state.max(state);
    }
    Ok(target)
}

fn ambiguous() -> Error {
    Error::new(
        Code::Conflict,
        "several users have used this id here: name the message by its seq",
    )
}

/// An erased message, as its deletion describes it.
fn erased(request: &DeleteRequest, deletions: &[Change]) -> Option<Target> {
    let is_meant = |change: &&Change| match &request.key {
        MessageKey::Seq(seq) => change.deletion.target == *seq,
        MessageKey::Id(id) => {
            change.deletion.id == *id
                && (change.deletion.user == request.user.as_str() || change.deletion.derived)
        }
    };
    let change = deletions.iter().find(is_meant)?;
    let Deletion {
        derived, received, ..
    } = change.deletion;
    Some(Target {
        message: change.tombstone(),
        derived,
        received_ms: received,
        state: DeletionState::Present,
    })
}

/// Finds the message in the stream, from `unstored_from` on: what lies below is found in
/// PostgreSQL.
async fn find_in_stream(
    ctx: &Ctx<Shared>,
    request: &DeleteRequest,
    is_moderator: bool,
    unstored_from: Seq,
) -> Result<Option<Target>> {
    let seq = match &request.key {
        MessageKey::Seq(seq) => Some(*seq),
        MessageKey::Id(id) => seq_of_derived_id(id),
    };
    if let Some(seq) = seq
        && let Some(target) = find_at(ctx, &request.conversation, seq).await?
        && (matches!(request.key, MessageKey::Seq(_)) || target.derived)
    {
        // It may be a duplicate: then the message that is stored under its id is shown and meant.
        return match query::find_first(ctx.chat.database(), &target).await? {
            Some(first) if first.message.room == target.message.room => Ok(Some(first)),
            // What is stored through and not found in PostgreSQL is a dead letter, which cannot be
            // deleted here.
            Some(_) => Ok(None),
            None => Ok(Some(target).filter(|target| target.message.seq >= unstored_from)),
        };
    }
    match &request.key {
        MessageKey::Seq(_) => Ok(None),
        MessageKey::Id(id) => find_by_id(ctx, request, id, is_moderator, unstored_from).await,
    }
}

fn seq_of_derived_id(id: &str) -> Option<Seq> {
    let seq = Seq::new(id.strip_prefix("seq:")?.parse().ok()?)?;
    (derived_id(seq) == id).then_some(seq)
}

/// The message at `seq`, if it belongs to the conversation.
async fn find_at(
    ctx: &Ctx<Shared>,
    conversation: &Conversation,
    seq: Seq,
) -> Result<Option<Target>> {
    let raw = ctx.chat.stream().at(seq).await?;
    let target = raw
        .filter(|raw| !raw.malformed)
        .and_then(|raw| parse_target(ctx, &raw.message));
    Ok(target.filter(|target| target.message.room == conversation.name()))
}

/// The first message with this id: the requesting user's own before anybody else's.
async fn find_by_id(
    ctx: &Ctx<Shared>,
    request: &DeleteRequest,
    id: &str,
    is_moderator: bool,
    from: Seq,
) -> Result<Option<Target>> {
    let mut others: Option<Target> = None;
    let limit = Limit::within(CHUNK, CHUNK_BYTES, ctx.settings().request_deadline());
    for subject in request.conversation.stream_subjects() {
        let mut next = from;
        loop {
            let window = ctx.chat.stream().first(&subject, next, limit).await?;
            for target in window
                .messages
                .iter()
                .filter_map(|message| parse_target(ctx, message))
                .filter(|target| !target.derived && target.message.id == id)
            {
                if target.message.user == request.user.as_str() {
                    return Ok(Some(target));
                }
                let is_second_user = others
                    .as_ref()
                    .is_some_and(|other| other.message.user != target.message.user);
                if is_second_user && is_moderator {
                    return Err(ambiguous());
                }
                others.get_or_insert(target);
            }
            match window.messages.last() {
                Some(last) if !window.complete => next = last.seq.next(),
                Some(_) | None => break,
            }
        }
    }
    Ok(others)
}

/// `None` for what becomes a dead letter.
fn parse_target(ctx: &Ctx<Shared>, message: &StreamMessage) -> Option<Target> {
    let incoming = parse(message, ctx.chat.limits()).ok()?;
    Some(Target {
        derived: incoming.id.is_none(),
        message: incoming.into_message(),
        received_ms: message.received_ms,
        state: DeletionState::Present,
    })
}
