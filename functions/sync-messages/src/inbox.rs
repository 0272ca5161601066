//! The direct messages that a user has not received yet: stream and projection above the user's
//! delivered cursor, over all conversations.
//!
//! The cursor is read first. It only grows, so an old value shows once more what was confirmed
//! meanwhile, and never hides anything. The order of the other reads is that of a page.

use std::collections::{BTreeSet, HashMap};

use sqlx::postgres::PgConnection;

use crate::page::{Found, found_after};
use crate::query::{InboxQuery, StoredChanges, load_inbox};
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::stream::Limit;
use postgres::database::Database;
use postgres::error::DatabaseError;
use postgres::span::query_span;
use protocol::change::Change;
use protocol::receipt::{Cursors, InboxRequest};
use protocol::subject::{direct_change_subjects, direct_subjects_to};
use service::ctx::Ctx;
use timeline::chat::Chat;
use timeline::cursors::{delivered, read_in};
use timeline::cutoffs::Cutoffs;
use timeline::dedup::{Key, look_up};
use timeline::frontier::Frontier;
use timeline::merge::{Direction, Merge, Rows};
use timeline::query::DEADLINE;
use timeline::tail::Tails;
use timeline::unstored::{Scope, Unstored};

/// Loads the inbox.
///
/// # Errors
/// 503 when the stream or PostgreSQL does not answer: only PostgreSQL knows the cursor.
pub async fn load(ctx: &Ctx<Chat>, request: &InboxRequest, max_bytes: usize) -> Result<Found> {
    let user = request.user.as_str();
    let after = load_delivered(ctx.database(), user)
        .await?
        .ok_or_else(away)?;
    let scope = Scope {
        subjects: &[direct_subjects_to(&request.user)],
        change_subjects: &direct_change_subjects(&request.user),
        directions: &[Direction::Newer(after)],
        // One message more than asked for shows whether there is more.
        need: Limit::within(
            request.limit as usize + 1,
            max_bytes,
            ctx.settings().request_deadline(),
        ),
    };

    let frontier = Frontier::load(ctx.stream()).await?;
    let Unstored { tails, changes, .. } = Unstored::read(ctx, frontier, scope).await?;
    let changes: Vec<&Change> = changes
        .iter()
        .filter(|change| change.deletion.to.as_deref() == Some(user))
        .collect();

    let wanted = InboxQuery {
        user,
        after,
        end: frontier.end,
        // Of two duplicates in the tail, a worker may have stored the second one.
        rows: scope.need.messages + tails.duplicates(),
        bytes: max_bytes,
    };
    let keys = Merge::lookup_keys(tails.all(), &changes);
    let unstored_rooms = rooms(&tails, &changes);
    let stored = load_stored(ctx.database(), &wanted, &keys, &unstored_rooms)
        .await?
        .ok_or_else(away)?;

    let merge = Merge::new(stored.stored, changes, stored.cutoffs, tails.all());
    let mut found = found_after(after, &merge, frontier, &tails, stored.rows, stored.changes);
    for message in &mut found.messages {
        let read = stored.read.get(&message.room).copied().unwrap_or_default();
        Cursors::set_status(message, |_| Cursors {
            delivered: after,
            read,
        });
    }
    Ok(found)
}

fn away() -> Error {
    Error::new(
        Code::Unavailable,
        "the database is away, and only it knows what was delivered; try again",
    )
}

/// The delivered cursor of the user; `None` while PostgreSQL is away.
async fn load_delivered(database: &Database, user: &str) -> Result<Option<Seq>, DatabaseError> {
    let query = async |connection: &mut PgConnection| {
        query_span("select", "users", delivered(connection, user)).await
    };
    database.run_if_there(DEADLINE, query).await
}

/// The conversations that have something in the stream.
fn rooms<'a>(tails: &'a Tails, changes: &[&'a Change]) -> Vec<&'a str> {
    let messages = tails.all().iter().flat_map(|tail| &tail.messages);
    let rooms: BTreeSet<&str> = messages
        .map(|message| message.room.as_str())
        .chain(changes.iter().map(|change| change.room.as_str()))
        .collect();
    rooms.into_iter().collect()
}

/// What the projection has above the cursor.
struct StoredInbox {
    rows: Rows,
    changes: StoredChanges,
    /// Where the keys are stored.
    stored: HashMap<Key, Seq>,
    /// Up to where the user has read each conversation.
    read: HashMap<String, Seq>,
    /// Of the conversations that have something in the stream.
    cutoffs: Cutoffs,
}

/// `None` while PostgreSQL is away.
async fn load_stored(
    database: &Database,
    wanted: &InboxQuery<'_>,
    keys: &[Key],
    unstored_rooms: &[&str],
) -> Result<Option<StoredInbox>, DatabaseError> {
    let query = async |connection: &mut PgConnection| {
        let load = async {
            let (rows, changes) = load_inbox(connection, wanted).await?;
            let stored = look_up(connection, keys).await?;
            let stored_rooms = rows.messages.iter().map(|message| message.room.as_str());
            let rooms: BTreeSet<&str> =
                stored_rooms.chain(unstored_rooms.iter().copied()).collect();
            let rooms: Vec<&str> = rooms.into_iter().collect();
            let read = read_in(connection, wanted.user, &rooms).await?;
            let cutoffs = Cutoffs::load(connection, unstored_rooms).await?;
            Ok(StoredInbox {
                rows,
                changes,
                stored,
                read,
                cutoffs,
            })
        };
        query_span("select", "messages", load).await
    };
    database.run_if_there(DEADLINE, query).await
}
