//! What happened in a conversation after a cursor: messages and deletions of stream and projection,
//! merged.
//!
//! The order of the reads carries the guarantees; [`timeline::merge`] says why. Messages and
//! changes are read one after the other, so both are cut at the same place: the end of the stream
//! from before they were read.

use crate::query::{self, StoredChanges};
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
use timeline::cutoffs::Cutoffs;
use timeline::frontier::Frontier;
use timeline::merge::{Direction, Merge, Rows};
use timeline::query::PageQuery;
use timeline::tail::Tails;
use timeline::unstored::{Scope, StreamAlone, Unstored};

/// Messages and changes after a cursor, without holes up to `through`.
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

/// Loads what happened after the cursor.
///
/// # Errors
/// 503 when the stream does not answer, or when PostgreSQL is away and the stream does not
/// reach back far enough.
pub async fn load(ctx: &Ctx<Chat>, request: &SyncRequest, max_bytes: usize) -> Result<Found> {
    let conversation = &request.conversation;
    let room = conversation.name();
    let directions = [Direction::Newer(request.after)];
    let scope = Scope {
        subjects: &conversation.stream_subjects(),
        change_subjects: &[conversation.change_subject()],
        directions: &directions,
        // One message more than asked for shows whether there is more.
        need: Limit::within(
            request.limit as usize + 1,
            max_bytes,
            ctx.settings().request_deadline(),
        ),
    };

    let frontier = Frontier::load(ctx.stream()).await?;
    let Unstored { tails, changes, .. } = Unstored::read(ctx, frontier, scope).await?;
    let changes: Vec<&Change> = changes.iter().collect();

    let keys = Merge::lookup_keys(tails.all(), &changes);
    let wanted = PageQuery {
        room: &room,
        directions: &directions,
        end: frontier.end,
        // Of two duplicates in the tail, a worker may have stored the second one.
        rows: scope.need.messages + tails.duplicates(),
        bytes: max_bytes,
        max_text_bytes: ctx.limits().text_bytes,
        keys: &keys,
        participants: &conversation.participants(),
        cutoff: !changes.is_empty() || !tails.is_empty(),
    };
    let stored = query::load_page(ctx.database(), request.after, &wanted).await?;
    let Some((stored, stored_changes)) = stored else {
        return load_from_stream_alone(ctx, request, scope).await;
    };
    let merge = Merge::new(stored.stored, changes, stored.cutoffs, tails.all());
    let rows = stored.parts.into_iter().next().unwrap_or_default();
    let after = request.after;
    let mut found = found_after(after, &merge, frontier, &tails, rows, stored_changes);
    for message in &mut found.messages {
        let cursors = |to: &str| stored.cursors.get(to).copied().unwrap_or_default();
        Cursors::set_status(message, cursors);
    }
    Ok(found)
}

/// Messages and changes after a cursor, as far as both are complete.
pub fn found_after(
    after: Seq,
    merge: &Merge<'_>,
    frontier: Frontier,
    tails: &Tails,
    rows: Rows,
    stored_changes: StoredChanges,
) -> Found {
    let part = merge.part(Direction::Newer(after), frontier, tails.of(0), rows);
    // What lies beyond the nearer of the two ends is for the next page.
    let through = stored_changes
        .complete_through
        .map_or(part.through, |end| end.min(part.through));
    let range = after.next()..=through;
    let (changes, changes_from_stream) = merge.changes(stored_changes.entries, &range);
    let mut messages = part.messages;
    messages.retain(|message| message.seq <= through);
    let source = if part.from_stream || changes_from_stream {
        Source::Both
    } else {
        Source::Projection
    };
    Found {
        messages,
        changes,
        through,
        more: through < frontier.end,
        source,
    }
}

/// While PostgreSQL is away: what the stream still holds, or an error when that may leave a hole.
async fn load_from_stream_alone(
    ctx: &Ctx<Chat>,
    request: &SyncRequest,
    scope: Scope<'_>,
) -> Result<Found> {
    let read = StreamAlone::read(ctx, scope).await?;
    if !read.has_all_after(request.after) {
        return Err(Error::new(
            Code::Unavailable,
            "the database is away and the stream no longer holds what came right after this \
             cursor; try again",
        ));
    }
    let Unstored {
        frontier,
        tails,
        changes,
    } = read.unstored;
    let cutoffs = Cutoffs::of_one(&request.conversation.name(), ctx.cutoff_ms());
    let changes = changes.iter().collect();
    let merge = Merge::new(Default::default(), changes, cutoffs, tails.all());
    let nothing = StoredChanges::default();
    let found = found_after(
        request.after,
        &merge,
        frontier,
        &tails,
        Rows::default(),
        nothing,
    );
    Ok(Found {
        source: Source::Stream,
        ..found
    })
}
