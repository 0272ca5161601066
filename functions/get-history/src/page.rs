//! The union of stream and projection: one page.
//!
//! The order of the reads carries the promises; `timeline::union::Union` says why. The floor and the stream's
//! last sequence, the tail above the floor, the deletions above the floor, and last the projection up to
//! the stream's last sequence.

use std::collections::HashMap;

use crate::index::{Indexed, Wanted};
use crate::{Shared, changes_above};
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::stream::Limit;
use protocol::change::Change;
use protocol::history::{Cursor, HistoryRequest, Page, Source};
use protocol::receipt::Cursors;
use service::ctx::Ctx;
use timeline::tail::{Tails, own_changes};
use timeline::union::{Cutoffs, Key, Part, Rows, Side, Union, assemble};

/// How often the projection is asked for more rows, when none of those it gave may be shown.
const ATTEMPTS: u32 = 4;

/// Reads the page; it may hold more bytes than a reply, and is cut when it is encoded.
///
/// # Errors
/// 503 when the log does not answer, or PostgreSQL is away and the log does not reach back far enough.
pub async fn read(ctx: &Ctx<Shared>, ask: &HistoryRequest, max_bytes: usize) -> Result<Page> {
    let (log, limits, room) = (
        ctx.chat.stream(),
        ctx.chat.limits(),
        ask.conversation.name(),
    );
    // One more than asked for tells whether there is more.
    let need = Limit::within(
        ask.limit as usize + 1,
        max_bytes,
        ctx.settings().request_deadline(),
    );
    let (floor, (_, end)) = tokio::try_join!(log.stored_through(), log.range())?;
    let end = end.max(floor);
    let sides = sides(ask.cursor);
    let tails = Tails::read(
        log,
        &ask.conversation.stream_subjects(),
        (floor, end),
        &sides,
        need,
        limits,
    )
    .await?;
    let changes = changes_above(ctx, &ask.conversation, floor, end, need.until).await?;
    let changes: Vec<&Change> = changes
        .iter()
        .filter(|change| change.room == room)
        .collect();
    let ids: Vec<Key> = Union::keys(tails.all(), &changes);
    let mut wanted = Wanted {
        room: &room,
        sides: &sides,
        end,
        // Of what stands in the tail twice, a worker may have stored the second one.
        rows: need.messages + tails.repeated(),
        bytes: max_bytes,
        text_bytes: limits.text_bytes,
        ids: &ids,
        people: &ask.conversation.participants(),
        cutoff: !changes.is_empty() || !tails.is_empty(),
    };
    for attempt in 1.. {
        let Some(indexed) = ctx.index.read(&wanted).await? else {
            return from_the_log_alone(ctx, ask, &sides, need).await;
        };
        let Indexed {
            sides: rows,
            known,
            marks,
            cutoff_ms,
        } = indexed;
        let cutoffs = Cutoffs::of_one(&room, cutoff_ms);
        let union = Union::new(
            known.into_iter().collect(),
            changes.clone(),
            cutoffs,
            tails.all(),
        );
        let parts = sides.iter().zip(rows).enumerate();
        let parts = parts
            .map(|(number, (side, rows))| union.part(*side, floor, end, tails.of(number), rows));
        let part = put_together(ask, &sides, parts.collect());
        if part.messages.is_empty() && part.more && attempt < ATTEMPTS {
            (wanted.rows, wanted.bytes) = (wanted.rows * 2, wanted.bytes * 2);
            continue;
        }
        let source = if part.from_log {
            Source::Both
        } else {
            Source::Index
        };
        let mut page = page(part, source);
        for message in &mut page.messages {
            Cursors::set_status(message, |to| marks.get(to).copied().unwrap_or_default());
        }
        if ask.receipts {
            ctx.index.time(&room, &mut page.messages).await?;
        }
        return Ok(page);
    }
    Err(Error::internal("a page was asked for no more"))
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

fn put_together(ask: &HistoryRequest, sides: &[Side], parts: Vec<Part>) -> Part {
    let (mut older, mut newer) = (None, None);
    for (side, part) in sides.iter().zip(parts) {
        match side {
            Side::Older(_) => older = Some(part),
            Side::Newer(_) => newer = Some(part),
        }
    }
    assemble(ask.limit as usize, older, newer)
}

fn page(part: Part, source: Source) -> Page {
    Page {
        messages: part.messages,
        more: part.more,
        through: part.through,
        source,
    }
}

/// While PostgreSQL is away: what the log still holds, or an error when that may leave a hole. A deletion stands behind its
/// message, so as long as the log has the message, it has the deletion.
async fn from_the_log_alone(
    ctx: &Ctx<Shared>,
    ask: &HistoryRequest,
    sides: &[Side],
    need: Limit,
) -> Result<Page> {
    const TOO_OLD: &str =
        "the database is away and the log no longer holds that part of the room; try again";
    let (log, limits, conversation) = (ctx.chat.stream(), ctx.chat.limits(), &ask.conversation);
    let (first, end) = log.range().await?;
    let below = first.previous();
    let tails = Tails::read(
        log,
        &conversation.stream_subjects(),
        (below, end),
        sides,
        need,
        limits,
    )
    .await?;
    // After the messages, so that no text is read after its deletion was not seen.
    let changes = own_changes(log, &[conversation.change_subject()], first, need.until).await?;
    // Trimmed meanwhile: what was read below is not all there was.
    let (first, _) = log.range().await?;
    let trimmed = first > Seq::ZERO.next();
    let cutoffs = Cutoffs::of_one(&conversation.name(), ctx.chat.cutoff_ms());
    let union = Union::new(
        HashMap::new(),
        changes.iter().collect(),
        cutoffs.clone(),
        tails.all(),
    );
    let mut parts = Vec::with_capacity(sides.len());
    for (number, side) in sides.iter().enumerate() {
        let tail = tails.of(number);
        let unreached = match *side {
            // What lies before something that has expired has expired, too.
            Side::Older(_) => trimmed && !tail.expired(&cutoffs),
            Side::Newer(after) if trimmed && after.next() < first => {
                return Err(Error::new(Code::Unavailable, TOO_OLD));
            }
            Side::Newer(_) => false,
        };
        let rows = Rows {
            messages: Vec::new(),
            reach: unreached.then_some(first),
        };
        let part = union.part(*side, below, end, tail, rows);
        if unreached && part.messages.is_empty() {
            return Err(Error::new(Code::Unavailable, TOO_OLD));
        }
        parts.push(part);
    }
    Ok(page(put_together(ask, sides, parts), Source::Log))
}
