//! The union of stream and projection after a cursor.
//!
//! The order of the reads carries the promises; `timeline::union::Union` says why. The floor and the stream's
//! last sequence, the tail above the floor, the deletions above the floor, and last the projection up to
//! the stream's last sequence. What is told ends there, so that messages and changes, which are read one
//! after the other, end at the same place.

use crate::index::{self, Rows};
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::stream::Limit;
use protocol::change::{Change, ChangeEntry};
use protocol::history::Source;
use protocol::message::Message;
use protocol::receipt::Cursors;
use protocol::sync::SyncRequest;
use service::ctx::Ctx;
use timeline::chat::Chat;
use timeline::tail::{Tails, own_changes};
use timeline::union::{Cutoffs, Key, Side, Union};

/// What was found: no holes up to `through`.
#[derive(Debug)]
pub struct Found {
    /// By `seq`; perhaps more than were asked for.
    pub messages: Vec<Message>,
    /// By `seq`; perhaps more than were asked for.
    pub changes: Vec<ChangeEntry>,
    /// Everything up to here was found.
    pub through: Seq,
    /// There is more beyond.
    pub more: bool,
    /// Where it came from.
    pub source: Source,
}

/// Reads what happened after the cursor.
///
/// # Errors
/// 503 when the log does not answer, or PostgreSQL is away and the log does not reach back far enough.
pub async fn read(ctx: &Ctx<Chat>, ask: &SyncRequest, max_bytes: usize) -> Result<Found> {
    let (log, conversation) = (ctx.stream(), &ask.conversation);
    // One more than asked for tells whether there is more.
    let need = Limit::within(
        ask.limit as usize + 1,
        max_bytes,
        ctx.settings().request_deadline(),
    );
    let (floor, (_, end)) = tokio::try_join!(log.stored_through(), log.range())?;
    let end = end.max(floor);
    let (subjects, changes) = (
        conversation.stream_subjects(),
        [conversation.change_subject()],
    );
    let (tails, above) =
        read_log(ctx, (&subjects, &changes), (floor, end), ask.after, need).await?;
    let above: Vec<&Change> = above.iter().collect();
    let keys: Vec<Key> = Union::keys(tails.all(), &above);
    let (people, cutoff) = (
        conversation.participants(),
        !above.is_empty() || !tails.is_empty(),
    );
    let room = conversation.name();
    let rows = need.messages + tails.repeated();
    let wanted = index::Wanted {
        room: &room,
        after: ask.after,
        end,
        rows,
        bytes: max_bytes,
        keys: &keys,
        people: &people,
        cutoff,
    };
    let Some(mut rows) = index::read(ctx.database(), &wanted).await? else {
        return from_the_log_alone(ctx, ask, need).await;
    };
    let marks = std::mem::take(&mut rows.marks);
    let cutoffs = Cutoffs::of_one(&room, rows.cutoff_ms);
    let mut found = join(Parts {
        after: ask.after,
        floor,
        end,
        tails,
        above,
        rows,
        cutoffs,
    });
    for message in &mut found.messages {
        Cursors::set_status(message, |to| marks.get(to).copied().unwrap_or_default());
    }
    Ok(found)
}

/// What the log has above the floor: messages for what comes after the cursor, and then every change, for it may
/// concern any message.
pub async fn read_log(
    ctx: &Ctx<Chat>,
    (subjects, changes): (&[String], &[String]),
    (floor, end): (Seq, Seq),
    after: Seq,
    need: Limit,
) -> Result<(Tails, Vec<Change>)> {
    let log = ctx.stream();
    let tails = Tails::read(
        log,
        subjects,
        (floor, end),
        &[Side::Newer(after)],
        need,
        ctx.limits(),
    )
    .await?;
    let above = if end > floor {
        own_changes(log, changes, floor.next(), need.until).await?
    } else {
        Vec::new()
    };
    Ok((tails, above))
}

/// What was read, of a conversation or of an inbox.
pub struct Parts<'a> {
    /// The cursor.
    pub after: Seq,
    /// Up to here everything was stored before the rest was read.
    pub floor: Seq,
    /// The stream's last sequence, from before the tail was read.
    pub end: Seq,
    /// Messages above the floor.
    pub tails: Tails,
    /// Changes above the floor.
    pub above: Vec<&'a Change>,
    /// What the index has after the cursor, and up to the end.
    pub rows: Rows,
    /// Since when messages of the log count.
    pub cutoffs: Cutoffs,
}

/// Stream and projection as one, as far as both reach without a hole.
pub fn join(parts: Parts<'_>) -> Found {
    let Parts {
        after,
        floor,
        end,
        tails,
        above,
        rows,
        cutoffs,
    } = parts;
    let union = Union::new(rows.known, above, cutoffs, tails.all());
    let part = union.part(Side::Newer(after), floor, end, tails.of(0), rows.messages);
    // What lies beyond the nearest of the ends is for the next page.
    let through = rows
        .changes_reach
        .map_or(part.through, |reach| reach.min(part.through));
    let (changes, told_by_log) = union.entries(rows.changes, &(after.next()..=through));
    let mut messages = part.messages;
    messages.retain(|message| message.seq <= through);
    let source = if part.from_log || told_by_log {
        Source::Both
    } else {
        Source::Index
    };
    Found {
        messages,
        changes,
        through,
        more: through < end,
        source,
    }
}

/// While PostgreSQL is away: what the log still holds, or an error when that may leave a hole.
async fn from_the_log_alone(ctx: &Ctx<Chat>, ask: &SyncRequest, need: Limit) -> Result<Found> {
    const TOO_OLD: &str = "the database is away and the log no longer holds what came right after this cursor; try again";
    let (log, conversation) = (ctx.stream(), &ask.conversation);
    let (first, end) = log.range().await?;
    let below = first.previous();
    let (subjects, changes) = (
        conversation.stream_subjects(),
        [conversation.change_subject()],
    );
    let (tails, above) =
        read_log(ctx, (&subjects, &changes), (below, end), ask.after, need).await?;
    // Trimmed meanwhile: what was read is not all there was.
    let (first, _) = log.range().await?;
    if first > Seq::ZERO.next() && ask.after.next() < first {
        return Err(Error::new(Code::Unavailable, TOO_OLD));
    }
    let cutoffs = Cutoffs::of_one(&conversation.name(), ctx.cutoff_ms());
    let parts = Parts {
        after: ask.after,
        floor: below,
        end,
        tails,
        above: above.iter().collect(),
        rows: Rows::default(),
        cutoffs,
    };
    Ok(Found {
        source: Source::Log,
        ..join(parts)
    })
}
