//! The union of log and index after a cursor.
//!
//! The order of the reads carries the promises. First the log's last sequence: what is told ends there, so that messages and
//! changes, which are read one after the other, end at the same place. Then the ack floor, up to which everything is in
//! the index. Then the log above the floor, and last the index.

use std::collections::HashMap;

use runtime::{Ctx, Error, Key, Limit, LogError, Result, Tail, Union, changes};
use wire::{Change, ChangeEntry, Code, Marks, Message, Seq, Source, SyncRequest};

use crate::index::{self, Rows};

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
pub async fn read(ctx: &Ctx, ask: &SyncRequest, max_bytes: usize) -> Result<Found> {
    let (first, end) = ctx.log().range().await?;
    let floor = ctx.log().floor().await?;
    let conversation = &ask.conversation;
    // One more than asked for tells whether there is more.
    let need = ask.limit as usize + 1;
    let (tail, above) = from_log(ctx, ask, floor, max_bytes).await?;
    let above: Vec<&Change> = above.iter().collect();
    let keys: Vec<Key> = Union::keys(tail.ids.iter().cloned(), &above);
    let (people, cutoff) = (conversation.people(), !above.is_empty() || !tail.messages.is_empty());
    let room = conversation.name();
    let wanted = index::Wanted { room: &room, after: ask.after, rows: need, bytes: max_bytes, keys: &keys, people: &people, cutoff };
    let Some(mut rows) = index::read(ctx.database(), &wanted).await? else {
        return from_the_log_alone(ctx, ask, (first, end), max_bytes).await;
    };
    let marks = std::mem::take(&mut rows.marks);
    let mut found = join(Parts { after: ask.after, floor, end, tail, above, rows });
    for message in &mut found.messages {
        Marks::show(message, |to| marks.get(to).copied().unwrap_or_default());
    }
    Ok(found)
}

/// What was read, of a conversation or of an inbox.
pub struct Parts<'a> {
    /// The cursor.
    pub after: Seq,
    /// The ack floor, from before the rest was read.
    pub floor: Seq,
    /// The log's last sequence, from before the floor was read.
    pub end: Seq,
    /// Messages above the floor and the cursor.
    pub tail: Tail,
    /// Changes above the floor.
    pub above: Vec<&'a Change>,
    /// What the index has after the cursor.
    pub rows: Rows,
}

/// Log and index as one, as far as both reach without a hole.
pub fn join(parts: Parts<'_>) -> Found {
    let Parts { after, floor, end, mut tail, above, rows } = parts;
    // How far each source reaches without a hole; what lies beyond the nearest of these ends is for the next page.
    let reaches = [
        (!tail.complete).then(|| tail.last.unwrap_or(floor)),
        rows.messages.last().filter(|_| rows.more_messages).map(|last| last.seq),
        rows.changes.last().filter(|_| rows.more_changes).map(|last| last.seq),
    ];
    let through = reaches.into_iter().flatten().fold(end, Seq::min);
    tail.expire(rows.cutoff_ms);
    let union = Union { known: rows.known, changes: above, cutoff_ms: rows.cutoff_ms };
    let range = after.next()..=through;
    let merged = union.merge(rows.messages, tail.messages, &range, &range);
    // Above the floor the index may have holes; there the log has all of them.
    let indexed = rows.changes.into_iter().filter(|change| change.seq <= floor);
    let changes: Vec<ChangeEntry> = indexed.chain(entries(&union)).filter(|change| range.contains(&change.seq)).collect();
    let from_log = merged.from_log || changes.iter().any(|change| change.seq > floor);
    Found {
        messages: merged.messages.into_values().collect(),
        changes,
        through,
        more: through < end,
        source: if from_log { Source::Both } else { Source::Index },
    }
}

/// The conversation above the floor: messages after the cursor, and every change, for it may concern any message.
async fn from_log(ctx: &Ctx, ask: &SyncRequest, floor: Seq, max_bytes: usize) -> Result<(Tail, Vec<Change>), LogError> {
    let (log, limits, need) = (ctx.log(), ctx.settings().limits(), ask.limit as usize + 1);
    let deadline = ctx.settings().request_deadline();
    let (subjects, subject) = (ask.conversation.log_subjects(), ask.conversation.change_subject());
    tokio::try_join!(
        Tail::oldest(log, &subjects, floor.max(ask.after).next(), Limit::within(need, max_bytes, deadline), limits),
        changes(log, &subject, floor.next(), Limit::within(10_000, 8 << 20, deadline)),
    )
}

fn entries(union: &Union<'_>) -> impl Iterator<Item = ChangeEntry> {
    union.told().map(Change::entry)
}

/// While PostgreSQL is away: what the log still holds, or an error when that may leave a hole.
async fn from_the_log_alone(ctx: &Ctx, ask: &SyncRequest, (first, end): (Seq, Seq), max_bytes: usize) -> Result<Found> {
    const TOO_OLD: &str = "the database is away and the log no longer holds what came right after this cursor; try again";
    if first > Seq::ZERO.next() && ask.after.next() < first {
        return Err(Error::new(Code::Unavailable, TOO_OLD));
    }
    let below = first.previous();
    let (mut tail, changes) = from_log(ctx, ask, below, max_bytes).await?;
    let cutoff_ms = ctx.cutoff_ms();
    tail.expire(cutoff_ms);
    let through = if tail.complete { end } else { tail.last.unwrap_or(below).min(end) };
    let range = ask.after.next()..=through;
    let union = Union { known: HashMap::new(), changes: changes.iter().collect(), cutoff_ms };
    let merged = union.merge(Vec::new(), tail.messages, &range, &range);
    Ok(Found {
        messages: merged.messages.into_values().collect(),
        changes: entries(&union).filter(|change| range.contains(&change.seq)).collect(),
        through,
        more: through < end,
        source: Source::Log,
    })
}
