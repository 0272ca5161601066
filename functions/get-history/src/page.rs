//! The union of log and index.
//!
//! The order of the three reads carries the promises. First the ack floor: everything up to it is
//! committed, and the floor only grows. Then the tail above the floor. Last the index: what was stored, and
//! perhaps trimmed from the log, between the first two reads is in it. What the index has beyond the end of
//! the tail is left out: copies commit in any order, so there may be holes in it.

use std::collections::{BTreeMap, HashMap, HashSet};

use runtime::{Error, Log, Result};
use wire::{Code, Cursor, HistoryRequest, Limits, Message, Page, Seq, Source};

use crate::index::{Index, Rows, Side, Wanted};
use crate::tail::{self, Tail};

/// Reads the page; it may hold more bytes than a reply, and is cut when it is encoded.
///
/// # Errors
/// 503 when the log does not answer, or PostgreSQL is away and the log does not reach back far enough.
pub async fn read(log: &Log, index: &Index, ask: &HistoryRequest, limits: Limits, max_bytes: usize) -> Result<Page> {
    let floor = log.floor().await?;
    let sides = sides(ask.cursor);
    // One more than asked for tells whether there is more.
    let need = ask.limit as usize + 1;
    let mut tails = Vec::with_capacity(sides.len());
    for side in &sides {
        tails.push(match *side {
            Side::Older(before) => tail::newest(log, &ask.conversation, floor.next(), before, need, limits).await?,
            Side::Newer(after) => tail::oldest(log, &ask.conversation, floor.max(after).next(), need, max_bytes, limits).await?,
        });
    }
    let ids: Vec<(String, String)> = tails.iter().flat_map(|tail| tail.ids.iter().cloned()).collect();
    let wanted = Wanted { room: &ask.conversation.name(), sides: &sides, rows: ask.limit + 1, bytes: max_bytes, ids: &ids };
    let Some((rows, known)) = index.read(&wanted).await? else {
        return from_the_log_alone(log, ask, &sides, limits, max_bytes).await;
    };
    let known: HashMap<(String, String), Seq> = known.into_iter().collect();
    let mut source = Source::Index;
    let parts = sides.iter().zip(tails).zip(rows).map(|((side, tail), rows)| {
        let part = union(*side, floor, tail, rows, &known);
        if part.from_log {
            source = Source::Both;
        }
        part
    });
    let parts: Vec<Part> = parts.collect();
    Ok(assemble(ask, parts, source))
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

fn union(side: Side, floor: Seq, tail: Tail, rows: Rows, known: &HashMap<(String, String), Seq>) -> Part {
    let end = tail.last.map_or(floor, |last| last.max(floor));
    // How far each source reaches without a hole; beyond the nearer of the two ends nothing is used.
    let index_reach = rows.messages.last().filter(|_| rows.more).map(|last| last.seq);
    let (lowest, highest, cut) = match side {
        Side::Older(_) => {
            let tail_reach = (!tail.complete).then_some(tail.from);
            let reach = index_reach.max(tail_reach);
            (reach.unwrap_or(Seq::ZERO), end, reach.is_some())
        }
        Side::Newer(_) => {
            let tail_reach = (!tail.complete).then_some(end);
            let reach = index_reach.into_iter().chain(tail_reach).min();
            (Seq::ZERO, reach.map_or(end, |reach| reach.min(end)), reach.is_some_and(|reach| reach < end) || !tail.complete)
        }
    };
    let within = |seq: Seq| (lowest..=highest).contains(&seq);
    let first_of = |message: &Message| (message.user.clone(), message.id.clone());
    let in_tail: HashMap<(String, String), Seq> = tail.messages.iter().map(|message| (first_of(message), message.seq)).collect();
    let mut merged = BTreeMap::new();
    let mut stored = HashSet::new();
    for message in rows.messages {
        stored.insert(message.seq);
        // A copy stored the later of two messages with one id first; the earlier one takes its place soon.
        let displaced = in_tail.get(&first_of(&message)).is_some_and(|&earlier| earlier < message.seq);
        if within(message.seq) && !displaced {
            merged.insert(message.seq, message);
        }
    }
    let mut from_log = false;
    for message in tail.messages {
        let repeated = known.get(&first_of(&message)).is_some_and(|&earlier| earlier < message.seq);
        if within(message.seq) && !repeated {
            from_log |= !stored.contains(&message.seq) && known.get(&first_of(&message)) != Some(&message.seq);
            merged.insert(message.seq, message);
        }
    }
    Part { messages: merged.into_values().collect(), more: cut, through: highest, from_log }
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

/// While PostgreSQL is away: what the log still holds, or an error when that may leave a hole.
async fn from_the_log_alone(log: &Log, ask: &HistoryRequest, sides: &[Side], limits: Limits, max_bytes: usize) -> Result<Page> {
    const TOO_OLD: &str = "the database is away and the log no longer holds that part of the room; try again";
    let (first, last) = log.range().await?;
    let trimmed = first > Seq::ZERO.next();
    let need = ask.limit as usize + 1;
    let mut parts = Vec::with_capacity(sides.len());
    for side in sides {
        let mut tail = match *side {
            Side::Older(before) => tail::newest(log, &ask.conversation, Seq::ZERO.next(), before, need, limits).await?,
            Side::Newer(after) if trimmed && after.next() < first => return Err(Error::new(Code::Unavailable, TOO_OLD)),
            Side::Newer(after) => tail::oldest(log, &ask.conversation, after.next(), need, max_bytes, limits).await?,
        };
        let older = matches!(side, Side::Older(_));
        if older && trimmed && tail.messages.is_empty() {
            return Err(Error::new(Code::Unavailable, TOO_OLD));
        }
        let more = !tail.complete || (older && trimmed);
        let read_to = tail.last.unwrap_or(Seq::ZERO);
        let through = if tail.complete || older { last.max(read_to) } else { read_to };
        parts.push(Part { messages: std::mem::take(&mut tail.messages), more, through, from_log: true });
    }
    Ok(assemble(ask, parts, Source::Log))
}
