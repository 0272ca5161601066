//! The union of log and index.
//!
//! The order of the three reads carries the promises. First the ack floor: everything up to it is
//! committed, and the floor only grows. Then the tail above the floor, messages and deletions. Last the index: what
//! was stored, and perhaps trimmed from the log, between the first two reads is in it. What the index has beyond the end
//! of the tail is left out: copies commit in any order, so there may be holes in it.
//!
//! What has expired is left out of both by the same cutoff, at its time, whatever is swept from the index or trimmed from the log.
//!
//! A deletion up to the floor has been applied in the index; one above it is applied here.

use std::collections::HashMap;

use runtime::{Ctx, Error, Key, Limit, Result, Tail, Union};
use wire::{Change, Code, Cursor, HistoryRequest, Marks, Message, Page, Seq, Source};

use crate::index::{Rows, Side, Wanted};
use crate::{Shared, changes_above};

/// Reads the page; it may hold more bytes than a reply, and is cut when it is encoded.
///
/// # Errors
/// 503 when the log does not answer, or PostgreSQL is away and the log does not reach back far enough.
pub async fn read(ctx: &Ctx<Shared>, ask: &HistoryRequest, max_bytes: usize) -> Result<Page> {
    let (log, limits, room) = (ctx.log(), ctx.settings().limits(), ask.conversation.name());
    let subjects = ask.conversation.log_subjects();
    let floor = log.floor().await?;
    let sides = sides(ask.cursor);
    // One more than asked for tells whether there is more.
    let need = Limit::within(ask.limit as usize + 1, max_bytes, ctx.settings().request_deadline());
    let read_tails = async || {
        let mut tails = Vec::with_capacity(sides.len());
        for side in &sides {
            tails.push(match *side {
                Side::Older(before) => Tail::newest(log, &subjects, floor.next(), before, need, limits).await?,
                Side::Newer(after) => Tail::oldest(log, &subjects, floor.max(after).next(), need, limits).await?,
            });
        }
        Ok::<_, Error>(tails)
    };
    let (mut tails, changes) = tokio::try_join!(read_tails(), changes_above(ctx, floor))?;
    let changes: Vec<&Change> = changes.iter().filter(|change| change.room == room).collect();
    let end = tails.iter().filter_map(|tail| tail.last).max().unwrap_or(floor).max(floor);
    if changes.iter().any(|change| change.deletion.target > end) {
        // A tombstone beyond what was read: there may be messages before it that came while we were reading.
        tails = read_tails().await?;
    }
    let ids: Vec<Key> = Union::keys(tails.iter().flat_map(|tail| tail.ids.iter().cloned()), &changes);
    let (people, cutoff) = (ask.conversation.people(), !changes.is_empty() || tails.iter().any(|tail| !tail.messages.is_empty()));
    let wanted = Wanted { room: &room, sides: &sides, rows: ask.limit + 1, bytes: max_bytes, ids: &ids, people: &people, cutoff };
    let Some(indexed) = ctx.index.read(&wanted).await? else {
        return from_the_log_alone(ctx, ask, &sides, max_bytes).await;
    };
    let cutoff_ms = indexed.cutoff_ms;
    tails.iter_mut().for_each(|tail| tail.expire(cutoff_ms));
    let above = Union { known: indexed.known.into_iter().collect(), changes, cutoff_ms };
    let mut source = Source::Index;
    let parts = sides.iter().zip(tails).zip(indexed.sides).map(|((side, tail), rows)| {
        let part = read_part(*side, floor, tail, rows, &above);
        if part.from_log {
            source = Source::Both;
        }
        part
    });
    let parts: Vec<Part> = parts.collect();
    let mut page = assemble(ask, parts, source);
    for message in &mut page.messages {
        Marks::show(message, |to| indexed.marks.get(to).copied().unwrap_or_default());
    }
    if ask.receipts {
        ctx.index.time(&room, &mut page.messages).await?;
    }
    Ok(page)
}

/// Which sides of the cursor a page reads. The newest page is what lies before the end of all sequences.
fn sides(cursor: Cursor) -> Vec<Side> {
    match cursor {
        Cursor::Latest => vec![Side::Older(Seq::MAX)],
        Cursor::Before(seq) => vec![Side::Older(seq)],
        Cursor::After(seq) => vec![Side::Newer(seq)],
        Cursor::Around(seq) => vec![Side::Older(seq), Side::Newer(seq.previous())],
    }
}

/// What was read on one side of a cursor: no holes, oldest first.
#[derive(Debug)]
struct Part {
    messages: Vec<Message>,
    /// There is more beyond.
    more: bool,
    /// Everything of the room up to here was read.
    through: Seq,
    /// The index did not have all of it.
    from_log: bool,
}

fn read_part(side: Side, floor: Seq, tail: Tail, rows: Rows, above: &Union<'_>) -> Part {
    let end = tail.last.map_or(floor, |last| last.max(floor));
    // How far each source reaches without a hole; beyond the nearer of the two ends nothing is used.
    let index_reach = rows.messages.last().filter(|_| rows.more).map(|last| last.seq);
    let (lowest, highest, cut) = match side {
        Side::Older(_) => {
            // Below what has expired nothing is left, read or not.
            let tail_reach = (!tail.complete && !tail.expired).then_some(tail.from);
            let reach = index_reach.max(tail_reach);
            (reach.unwrap_or(Seq::ZERO), end, reach.is_some())
        }
        Side::Newer(_) => {
            let tail_reach = (!tail.complete).then_some(end);
            let reach = index_reach.into_iter().chain(tail_reach).min();
            (Seq::ZERO, reach.map_or(end, |reach| reach.min(end)), reach.is_some_and(|reach| reach < end) || !tail.complete)
        }
    };
    // Where nothing was cut, whatever the log has was read: a tombstone may stand beyond the last message.
    let graves = match side {
        Side::Older(before) => lowest..=before.previous(),
        Side::Newer(after) => after.next()..=if cut { highest } else { Seq::MAX },
    };
    let merged = above.merge(rows.messages, tail.messages, &(lowest..=highest), &graves);
    let through = merged.messages.keys().last().map_or(highest, |last| highest.max(*last));
    Part { messages: merged.messages.into_values().collect(), more: cut, through, from_log: merged.from_log }
}

/// Puts the sides together and cuts them to the limit.
fn assemble(ask: &HistoryRequest, parts: Vec<Part>, source: Source) -> Page {
    let limit = ask.limit as usize;
    let (mut older, mut newer) = (None, None);
    for (side, part) in sides(ask.cursor).into_iter().zip(parts) {
        match side {
            Side::Older(before) => older = Some((before, part)),
            Side::Newer(_) => newer = Some(part),
        }
    }
    let after = newer.as_ref().map_or(0, |part| part.messages.len());
    let before = older.as_ref().map_or(0, |(_, part)| part.messages.len());
    // Around: half a page each side, and what one side lacks goes to the other.
    let take_after = if older.is_some() { after.min((limit.div_ceil(2)).max(limit.saturating_sub(before))) } else { after.min(limit) };
    let take_before = before.min(limit - take_after);
    let mut page = Page { messages: Vec::with_capacity(limit), more: false, through: Seq::ZERO, source };
    if let Some((before, mut part)) = older {
        let surplus = part.messages.len() - take_before;
        page.more |= part.more || surplus > 0;
        page.through = part.through.min(before.previous());
        page.messages.extend(part.messages.drain(surplus..));
    }
    if let Some(mut part) = newer {
        let more = part.more || part.messages.len() > take_after;
        part.messages.truncate(take_after);
        page.through = match part.messages.last() {
            Some(last) if more => last.seq,
            _ => part.through,
        };
        page.more |= more;
        page.messages.extend(part.messages);
    }
    page
}

/// While PostgreSQL is away: what the log still holds, or an error when that may leave a hole. A deletion stands behind its
/// message, so as long as the log has the message, it has the deletion.
async fn from_the_log_alone(ctx: &Ctx<Shared>, ask: &HistoryRequest, sides: &[Side], max_bytes: usize) -> Result<Page> {
    const TOO_OLD: &str = "the database is away and the log no longer holds that part of the room; try again";
    let (log, limits, conversation) = (ctx.log(), ctx.settings().limits(), &ask.conversation);
    let (first, last) = log.range().await?;
    let trimmed = first > Seq::ZERO.next();
    let subjects = conversation.log_subjects();
    let need = Limit::within(ask.limit as usize + 1, max_bytes, ctx.settings().request_deadline());
    let mut tails = Vec::with_capacity(sides.len());
    for side in sides {
        let tail = match *side {
            Side::Older(before) => Tail::newest(log, &subjects, Seq::ZERO.next(), before, need, limits).await?,
            Side::Newer(after) if trimmed && after.next() < first => return Err(Error::new(Code::Unavailable, TOO_OLD)),
            Side::Newer(after) => Tail::oldest(log, &subjects, after.next(), need, limits).await?,
        };
        tails.push(tail);
    }
    // Last, so that no text is read after its deletion was not seen.
    let changes =
        runtime::changes(log, &conversation.change_subject(), Seq::ZERO.next(), Limit { messages: 10_000, bytes: 8 << 20, ..need }).await?;
    let cutoff_ms = ctx.cutoff_ms();
    tails.iter_mut().for_each(|tail| tail.expire(cutoff_ms));
    let above = Union { known: HashMap::new(), changes: changes.iter().collect(), cutoff_ms };
    let mut parts = Vec::with_capacity(sides.len());
    for (side, tail) in sides.iter().zip(tails) {
        let older = matches!(side, Side::Older(_));
        let read_to = tail.last.unwrap_or(Seq::ZERO);
        let through = if tail.complete || older { last.max(read_to) } else { read_to };
        let lowest = if tail.complete { first } else { tail.from };
        // What lies before something that has expired has expired, too.
        let more = if older { !tail.expired && (trimmed || !tail.complete) } else { !tail.complete };
        let graves = match *side {
            Side::Older(before) => lowest..=before.previous(),
            Side::Newer(after) => after.next()..=through,
        };
        let unreached = older && trimmed && !tail.expired;
        let merged = above.merge(Vec::new(), tail.messages, &(Seq::ZERO..=Seq::MAX), &graves).messages;
        if unreached && merged.is_empty() {
            return Err(Error::new(Code::Unavailable, TOO_OLD));
        }
        parts.push(Part { messages: merged.into_values().collect(), more, through, from_log: true });
    }
    Ok(assemble(ask, parts, Source::Log))
}
