//! What a user has not read, by conversation: stream and projection, counted.
//!
//! Up to `stored_through` PostgreSQL has everything and counts it ([`stored`]). Above it there are
//! few rows: those are loaded and merged with the stream as for a page ([`unstored`]). The read
//! cursors are loaded first. They only grow, so an old value counts messages that were read
//! meanwhile, and never misses one.

mod rooms;
mod stored;
mod unstored;

use std::collections::HashMap;

use sqlx::postgres::PgConnection;

use crate::store::read_only;
use base::error::Result;
use base::seq::Seq;
use jetstream::stream::Limit;
use protocol::change::Change;
use protocol::conversation::Conversation;
use protocol::name::{Room, User};
use protocol::receipt::{Unread, UnreadRoom};
use protocol::subject::{direct_change_subjects, direct_subjects_to};
use service::ctx::Ctx;
use timeline::changes::{changes_on, few_changes};
use timeline::chat::Chat;
use timeline::dedup::look_up;
use timeline::frontier::Frontier;
use timeline::merge::Merge;
use timeline::tail::Tail;

#[cfg(test)]
pub use unstored::ABOVE;

/// Counts are exact up to here.
const EXACT: u64 = 999;
/// So many messages of one conversation are counted; when there are so many, there may be more.
const MOST: i64 = 1_000;
/// So many conversations stand in a reply.
const LISTED: usize = 500;
/// So many conversations are considered: of direct conversations those that began last, of rooms
/// those with the highest cursors.
const CONSIDERED: i64 = 10_000;
/// So many messages of the stream above `stored_through` are considered.
const TAIL: usize = 5_000;
const TAIL_BYTES: usize = 8 << 20;

/// The rooms that user `$1` reads, which are those with a read cursor; at most `$2`. Rooms with
/// news come first, the newest of them first: the cursor of a quiet room is low, and so is what is
/// new in it. Then come the others, the highest cursor first, for messages that only the stream
/// has. Each room costs one look at an index; `$3` rooms are considered.
pub const ROOM_CURSORS: &str = include_str!("unread/room_cursors.sql");

/// Counts.
///
/// # Errors
/// 503 when the stream or PostgreSQL does not answer: only PostgreSQL has the cursors.
pub async fn count(ctx: &Ctx<Chat>, user: &User) -> Result<Unread> {
    let stream = ctx.stream();
    let mut room_cursors = read_only(ctx.database(), async |connection| {
        load_room_cursors(connection, user.as_str()).await
    })
    .await?;
    let is_cut = room_cursors.len() > LISTED;
    room_cursors.truncate(LISTED);

    let frontier = Frontier::load(stream).await?;
    let from = frontier.first_unstored();
    let mut subjects = vec![direct_subjects_to(user)];
    if !frontier.is_all_stored() {
        subjects.extend(rooms_of(&room_cursors).map(|room| room.stream_subject()));
    }
    let limit = Limit::within(TAIL, TAIL_BYTES, ctx.settings().request_deadline());
    let tail = Tail::oldest(stream, &subjects, from, limit, ctx.limits()).await?;
    let changes = match few_changes(stream, from, limit.until).await? {
        Some(few) => few,
        // Too many deletions of all conversations: read only those that concern this user.
        None => {
            let subjects = change_subjects(user, &room_cursors);
            changes_on(stream, &subjects, from, limit.until).await?
        }
    };

    let tail_is_cut = !tail.complete;
    let question = Question {
        user,
        stored_through: frontier.stored_through,
        room_cursors: &room_cursors,
        tail,
        changes: changes.iter().collect(),
    };
    let question = &question;
    let mut counts = read_only(ctx.database(), async |connection| {
        question.count(connection).await
    })
    .await?;
    counts.is_cut |= is_cut;
    Ok(reply(counts, tail_is_cut))
}

fn rooms_of(room_cursors: &[(String, Seq)]) -> impl Iterator<Item = Room> {
    room_cursors
        .iter()
        .filter_map(|(room, _)| Room::parse(room).ok())
}

/// The subjects of the deletions of everything the user reads.
fn change_subjects(user: &User, room_cursors: &[(String, Seq)]) -> Vec<String> {
    let rooms = rooms_of(room_cursors).map(|room| Conversation::Room(room).change_subject());
    direct_change_subjects(user)
        .into_iter()
        .chain(rooms)
        .collect()
}

async fn load_room_cursors(
    connection: &mut PgConnection,
    user: &str,
) -> Result<Vec<(String, Seq)>, sqlx::Error> {
    let rows: Vec<(String, i64)> = sqlx::query_as(ROOM_CURSORS)
        .bind(user)
        .bind(LISTED as i64 + 1)
        .bind(CONSIDERED)
        .fetch_all(connection)
        .await?;
    Ok(rows
        .into_iter()
        .map(|(room, read)| (room, Seq::from_i64(read)))
        .collect())
}

/// What PostgreSQL is asked to count, and what was read before.
struct Question<'a> {
    user: &'a User,
    stored_through: Seq,
    /// The rooms that the user reads, and up to where.
    room_cursors: &'a [(String, Seq)],
    /// The messages of these rooms and the user's direct messages above `stored_through`.
    tail: Tail,
    /// Deletions above `stored_through`.
    changes: Vec<&'a Change>,
}

/// The unread messages of one conversation.
#[derive(Debug, Default)]
struct Count {
    count: u64,
    more: bool,
    newest: Seq,
}

/// By conversation.
#[derive(Debug, Default)]
struct Counts {
    conversations: HashMap<String, Count>,
    /// Some conversations were not considered.
    is_cut: bool,
}

impl Question<'_> {
    async fn count(&self, connection: &mut PgConnection) -> Result<Counts, sqlx::Error> {
        let keys = Merge::lookup_keys(std::slice::from_ref(&self.tail), &self.changes);
        let stored = look_up(connection, &keys).await?;
        // A message that was deleted above `stored_through` may still count in PostgreSQL, where
        // the deletion says that it stands, or where a duplicate of it is stored.
        let tombstones = self.changes.iter().map(|change| change.tombstone());
        let deleted: Vec<i64> = tombstones
            .flat_map(|tombstone| {
                let duplicate = stored.get(&(tombstone.user, tombstone.id)).copied();
                [Some(tombstone.seq), duplicate]
            })
            .flatten()
            .map(Seq::as_i64)
            .collect();
        let mut counts = self.count_stored(connection, &deleted).await?;
        for (room, seq) in self.list_unstored(connection, stored).await? {
            let count = counts.conversations.entry(room).or_default();
            count.count += 1;
            count.newest = count.newest.max(seq);
        }
        Ok(counts)
    }
}

/// The newest conversations first, and not more than are listed.
fn reply(counts: Counts, tail_is_cut: bool) -> Unread {
    let mut conversations: Vec<(String, Count)> = counts
        .conversations
        .into_iter()
        .filter(|(_, count)| count.count > 0 || count.more)
        .collect();
    conversations.sort_unstable_by(|(one, a), (other, b)| {
        b.newest.cmp(&a.newest).then_with(|| one.cmp(other))
    });
    let is_cut = counts.is_cut || tail_is_cut || conversations.len() > LISTED;
    conversations.truncate(LISTED);
    let entry = |(room, count): (String, Count)| UnreadRoom {
        room,
        count: count.count.min(EXACT),
        more: count.more || count.count > EXACT || tail_is_cut,
    };
    let unread: Vec<UnreadRoom> = conversations.into_iter().map(entry).collect();
    let more = is_cut || unread.iter().any(|room| room.more);
    Unread {
        total: unread.iter().map(|room| room.count).sum(),
        unread,
        more,
    }
}
