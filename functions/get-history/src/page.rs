//! One page: what stream and projection have next to the cursor, merged.
//!
//! The order of the reads carries the guarantees; [`timeline::merge`] says why.

use std::collections::HashMap;
use std::sync::Arc;

use sqlx::postgres::PgConnection;
use tokio::time::Instant;

use crate::{Shared, query};
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::stream::Limit;
use postgres::span::query_span;
use protocol::change::Change;
use protocol::conversation::Conversation;
use protocol::history::{Cursor, HistoryRequest, Page, Source};
use protocol::receipt::Cursors;
use service::ctx::Ctx;
use timeline::changes::{changes_on, few_changes};
use timeline::cutoffs::Cutoffs;
use timeline::frontier::Frontier;
use timeline::merge::{Direction, Merge, Part, Rows, assemble};
use timeline::query::{DEADLINE, PageQuery, StoredPage, load_page};
use timeline::tail::Tails;
use timeline::unstored::{Scope, StreamAlone};

/// How often we ask PostgreSQL for twice as many rows when none of those it returned may be shown.
const ATTEMPTS: u32 = 4;

/// Loads the page. It may hold more bytes than a reply, and is cut when it is encoded.
///
/// # Errors
/// 503 when the stream does not answer, or when PostgreSQL is away and the stream does not
/// reach back far enough.
pub async fn load(ctx: &Ctx<Shared>, request: &HistoryRequest, max_bytes: usize) -> Result<Page> {
    let stream = ctx.chat.stream();
    let limits = ctx.chat.limits();
    let room = request.conversation.name();
    let directions = directions(request.cursor);
    // One message more than asked for shows whether there is more.
    let need = Limit::within(
        request.limit as usize + 1,
        max_bytes,
        ctx.settings().request_deadline(),
    );

    let frontier = Frontier::load(stream).await?;
    let subjects = request.conversation.stream_subjects();
    let tails = Tails::read(stream, &subjects, frontier, &directions, need, limits).await?;
    let changes = changes_above(ctx, &request.conversation, frontier, need.until).await?;
    let changes: Vec<&Change> = changes
        .iter()
        .filter(|change| change.room == room)
        .collect();

    let keys = Merge::lookup_keys(tails.all(), &changes);
    let mut wanted = PageQuery {
        room: &room,
        directions: &directions,
        end: frontier.end,
        // Of two duplicates in the tail, a worker may have stored the second one.
        rows: need.messages + tails.duplicates(),
        bytes: max_bytes,
        max_text_bytes: limits.text_bytes,
        keys: &keys,
        participants: &request.conversation.participants(),
        cutoff: !changes.is_empty() || !tails.is_empty(),
    };
    for attempt in 1..=ATTEMPTS {
        let Some(stored) = load_stored(ctx, &wanted).await? else {
            return load_from_stream_alone(ctx, request, &directions, need).await;
        };
        let StoredPage {
            parts: rows,
            stored,
            cursors,
            cutoffs,
        } = stored;
        let merge = Merge::new(stored, changes.clone(), cutoffs, tails.all());
        let parts = directions
            .iter()
            .zip(rows)
            .enumerate()
            .map(|(number, (direction, rows))| {
                merge.part(*direction, frontier, tails.of(number), rows)
            });
        let part = assemble_parts(request, &directions, parts.collect());
        if part.messages.is_empty() && part.more && attempt < ATTEMPTS {
            wanted.rows *= 2;
            wanted.bytes *= 2;
            continue;
        }
        let source = if part.from_stream {
            Source::Both
        } else {
            Source::Projection
        };
        let mut page = page(part, source);
        for message in &mut page.messages {
            Cursors::set_status(message, |to| cursors.get(to).copied().unwrap_or_default());
        }
        if request.receipts {
            query::load_times(ctx.chat.database(), &room, &mut page.messages).await?;
        }
        return Ok(page);
    }
    Err(Error::internal("the last attempt returns a page"))
}

/// `None` while PostgreSQL is away.
async fn load_stored(ctx: &Ctx<Shared>, wanted: &PageQuery<'_>) -> Result<Option<StoredPage>> {
    let query = async |connection: &mut PgConnection| {
        query_span("select", "messages", load_page(connection, wanted)).await
    };
    let stored = ctx.chat.database().run_if_there(DEADLINE, query).await?;
    Ok(stored)
}

/// The directions in which a page reads from its cursor. The newest page is what lies before the
/// end of all sequences.
fn directions(cursor: Cursor) -> Vec<Direction> {
    match cursor {
        Cursor::Latest => vec![Direction::Older(Seq::MAX)],
        Cursor::Before(seq) => vec![Direction::Older(seq)],
        Cursor::After(seq) => vec![Direction::Newer(seq)],
        Cursor::Around(seq) => vec![Direction::Older(seq), Direction::Newer(seq.previous())],
    }
}

fn assemble_parts(request: &HistoryRequest, directions: &[Direction], parts: Vec<Part>) -> Part {
    let mut older = None;
    let mut newer = None;
    for (direction, part) in directions.iter().zip(parts) {
        match direction {
            Direction::Older(_) => older = Some(part),
            Direction::Newer(_) => newer = Some(part),
        }
    }
    assemble(request.limit as usize, older, newer)
}

fn page(part: Part, source: Source) -> Page {
    Page {
        messages: part.messages,
        more: part.more,
        through: part.through,
        source,
    }
}

/// The deletions above the frontier that the page must know, perhaps with others. Requests share
/// the read of all conversations' deletions; only when there are too many of these, a page reads
/// those of its own conversation.
async fn changes_above(
    ctx: &Ctx<Shared>,
    conversation: &Conversation,
    frontier: Frontier,
    until: Instant,
) -> Result<Arc<[Change]>> {
    if frontier.is_all_stored() {
        return Ok(Arc::default());
    }
    let from = frontier.first_unstored();
    let limit = ctx.settings().request_deadline();
    let load = {
        let ctx = ctx.clone();
        move || {
            let ctx = ctx.clone();
            let until = Instant::now() + limit;
            async move {
                let few = few_changes(ctx.chat.stream(), from, until).await?;
                Ok(few.map(Arc::from))
            }
        }
    };
    if let Some(few) = ctx.changes.run(from, limit, load).await?? {
        return Ok(few);
    }
    let subjects = [conversation.change_subject()];
    let own = changes_on(ctx.chat.stream(), &subjects, from, until).await?;
    Ok(own.into())
}

/// While PostgreSQL is away: what the stream still holds, or an error when that may leave a hole.
async fn load_from_stream_alone(
    ctx: &Ctx<Shared>,
    request: &HistoryRequest,
    directions: &[Direction],
    need: Limit,
) -> Result<Page> {
    let conversation = &request.conversation;
    let scope = Scope {
        subjects: &conversation.stream_subjects(),
        change_subjects: &[conversation.change_subject()],
        directions,
        need,
    };
    let read = StreamAlone::read(&ctx.chat, scope).await?;
    let frontier = read.unstored.frontier;
    let tails = &read.unstored.tails;
    let changes = read.unstored.changes.iter().collect();
    let cutoffs = Cutoffs::of_one(&conversation.name(), ctx.chat.cutoff_ms());
    let merge = Merge::new(HashMap::new(), changes, cutoffs.clone(), tails.all());
    let mut parts = Vec::with_capacity(directions.len());
    for (number, direction) in directions.iter().enumerate() {
        let tail = tails.of(number);
        let is_cut = match *direction {
            // Everything before an expired message has expired, too.
            Direction::Older(_) => read.is_trimmed() && !tail.has_expired(&cutoffs),
            Direction::Newer(after) if !read.has_all_after(after) => return Err(too_old()),
            Direction::Newer(_) => false,
        };
        let rows = Rows {
            messages: Vec::new(),
            complete_through: is_cut.then_some(read.first),
        };
        let part = merge.part(*direction, frontier, tail, rows);
        if is_cut && part.messages.is_empty() {
            return Err(too_old());
        }
        parts.push(part);
    }
    let part = assemble_parts(request, directions, parts);
    Ok(page(part, Source::Stream))
}

fn too_old() -> Error {
    Error::new(
        Code::Unavailable,
        "the database is away and the stream no longer holds that part of the room; try again",
    )
}
