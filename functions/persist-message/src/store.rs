//! Stores one batch: messages and dead letters in one statement, deletions in one transaction.
//!
//! Every statement takes its locks in the order of the unique key of `messages`, and a transaction
//! does so once, so two replicas never deadlock.

use std::collections::HashMap;

use sqlx::Connection;
use sqlx::postgres::PgConnection;
use sqlx::types::time::OffsetDateTime;

use crate::batch::Batch;
use crate::changes;
use crate::dead_letters::Deleted;
use crate::erase::Erasure;
use crate::last_seen::LastSeen;
use crate::row::{Key, Row};
use postgres::span::query_span;

/// Messages, dead letters and the outbox in one statement: all of them or none.
///
/// Storing again does no harm: a message meets itself under its sender and id. Where a sender used
/// an id twice, the lower sequence stays, whichever replica was faster. The exception is a message
/// that the stream received later: it comes from a recreated stream, and the stored row keeps its
/// place. A deleted row takes no text any more. A row that loses its place to another text becomes
/// a dead letter (trigger note_displaced).
const STORE_ROWS: &str = include_str!("sql/store_rows.sql");
/// Messages whose sender and id another message already has.
///
/// With the same text in the same room such a message is a duplicate; its sequence is remembered,
/// so that a deletion finds it. So is every duplicate of a deleted message, whose text nobody knows
/// any more. With another text it is a conflict. If the message found has the same sequence and was
/// received at another time, it comes from a stream that is gone: the sequence is reused.
pub const CLASSIFY_COLLISIONS: &str = include_str!("sql/classify_collisions.sql");
/// Which of these messages are deleted, when the stream received them, and whether they are deleted
/// for good.
pub const FIND_DELETED: &str = include_str!("sql/find_deleted.sql");

/// A batch's rooms. A lateral join with an offset, here and in the other statements, is a nested
/// loop over the index whatever PostgreSQL knows about the table; with `name = any($1)` a generic
/// plan compares every room with every name.
pub const FIND_ROOMS: &str = "
    select asked.name, found.id from unnest($1::text[]) as asked (name)
     cross join lateral (select id from rooms where rooms.name = asked.name offset 0) as found";

const INSERT_ROOMS: &str = "
    insert into rooms (name) select unnest($1::text[]) on conflict do nothing";

/// What became of a batch's rows.
#[derive(Debug, Default)]
pub struct Stored {
    /// Messages that are new.
    pub new: u64,
    /// Sequences under which another message is stored: their own messages are not stored.
    pub reused: Vec<i64>,
    /// Sequences whose sender used the id for another message before.
    pub conflicts: Vec<i64>,
    /// Changes that are new.
    pub changed: u64,
    /// Texts that have to be erased from the stream before the batch is acknowledged.
    pub erasures: Vec<Erasure>,
    /// Hard-deleted messages whose dead letters have to be erased before the batch is acknowledged.
    pub deleted: Vec<Deleted>,
}

/// Stores the batch.
///
/// # Errors
/// The database's. Whatever of the batch is stored by then, a second attempt finds.
pub async fn store(
    connection: &mut PgConnection,
    batch: &Batch,
    last_seen: &LastSeen,
) -> Result<Stored, sqlx::Error> {
    last_seen.record(connection, batch).await?;
    let rooms = rooms(connection, batch).await?;
    let mut stored = Stored::default();
    let mut under_tombstones = Vec::new();
    if !batch.rows.is_empty() || !batch.dead_letters.is_empty() {
        (stored.new, under_tombstones) = store_rows(connection, batch, &rooms).await?;
    }
    if !batch.changes.is_empty() {
        let mut transaction = connection.begin().await?;
        let applied = changes::apply(&mut transaction, &batch.changes, &rooms).await?;
        transaction.commit().await?;
        stored.changed = applied.new;
        stored.reused = applied.reused;
        // After the commit; see `find_deletions`.
        changes::find_erasures(connection, &batch.changes, &mut stored).await?;
    }
    let mut duplicates = Vec::new();
    // Only messages whose id is taken can be duplicates or conflicts; usually there are none.
    let all_new = stored.new >= batch.rows.len() as u64;
    if !all_new || batch.rows.iter().any(|row| !row.duplicates.is_empty()) {
        for (seq, what) in classify_collisions(connection, batch, &rooms).await? {
            match what.as_str() {
                "reused" => stored.reused.push(seq),
                "conflict" => stored.conflicts.push(seq),
                _ => duplicates.push(seq),
            }
        }
    }
    find_deletions(
        connection,
        batch,
        &under_tombstones,
        &duplicates,
        &mut stored,
    )
    .await?;
    Ok(stored)
}

/// Finds out whether what was just stored is deleted: duplicates of deleted messages, messages that
/// took a tombstone's place, dead letters of deleted messages. We commit first and look for the
/// deletion afterwards; a replica that stores the deletion commits it first and looks for
/// duplicates and dead letters afterwards. So however the two are interleaved, one of them sees the
/// other.
async fn find_deletions(
    connection: &mut PgConnection,
    batch: &Batch,
    under_tombstones: &[i64],
    duplicates: &[i64],
    stored: &mut Stored,
) -> Result<(), sqlx::Error> {
    let suspect =
        |row: &&Row| under_tombstones.contains(&row.seq()) || duplicates.contains(&row.seq());
    let rows: Vec<&Row> = batch.messages().filter(suspect).collect();
    let mut keys: Vec<Key> = column(&rows, |row| row.key());
    keys.extend(
        batch
            .dead_letters
            .iter()
            .filter_map(|dead_letter| dead_letter.key.clone()),
    );
    keys.sort_unstable();
    keys.dedup();
    if keys.is_empty() {
        return Ok(());
    }
    let found = find_deleted(connection, &keys).await?;
    for row in rows {
        let key = row.key();
        // A duplicate repeats the deleted text, so it goes in any case; the message itself goes
        // only when it is deleted for good.
        let is_duplicate = duplicates.contains(&row.seq());
        if found
            .get(&key)
            .is_some_and(|(_, hard)| *hard || is_duplicate)
        {
            stored.erasures.push(Erasure::new(row.message.seq, key));
        }
    }
    for dead_letter in &batch.dead_letters {
        if let Some(key) = &dead_letter.key
            && let Some((deleted, true)) = found.get(key)
            && deleted.is(key, dead_letter.original.received_at)
        {
            stored.deleted.push(deleted.clone());
        }
    }
    Ok(())
}

/// Which of these messages are deleted, and whether for good.
async fn find_deleted(
    connection: &mut PgConnection,
    keys: &[Key],
) -> Result<HashMap<Key, (Deleted, bool)>, sqlx::Error> {
    let found: Vec<(String, String, bool, OffsetDateTime, bool)> = sqlx::query_as(FIND_DELETED)
        .bind(column(keys, |key| key.sender.as_str()))
        .bind(column(keys, |key| key.id.as_str()))
        .bind(column(keys, |key| key.derived))
        .fetch_all(connection)
        .await?;
    let mut deleted = HashMap::new();
    for (sender, id, derived, received_at, hard) in found {
        let key = Key {
            sender,
            id,
            derived,
        };
        deleted.insert(key.clone(), (Deleted { key, received_at }, hard));
    }
    Ok(deleted)
}

/// Stores messages and dead letters. Returns how many messages are new, and the sequences of those
/// that took a tombstone's place.
async fn store_rows(
    connection: &mut PgConnection,
    batch: &Batch,
    rooms: &HashMap<String, i32>,
) -> Result<(u64, Vec<i64>), sqlx::Error> {
    let rows = &batch.rows;
    let letters = &batch.dead_letters;
    let traced: Vec<&Row> = rows
        .iter()
        .filter(|row| row.traceparent.is_some())
        .collect();
    let key_part = |of: fn(&Key) -> &str| {
        column(letters, |dead_letter| {
            dead_letter.key.as_ref().map_or("", of)
        })
    };
    let store = sqlx::query_as(STORE_ROWS)
        .bind(column(rows, Row::seq))
        .bind(column(rows, |row| rooms.get(&row.message.room).copied()))
        .bind(column(rows, |row| row.message.user.as_str()))
        .bind(column(rows, |row| row.message.to.as_deref()))
        .bind(column(rows, |row| row.id.as_str()))
        .bind(column(rows, Row::derived))
        .bind(column(rows, |row| row.message.text.as_str()))
        .bind(column(rows, Row::sent_at))
        .bind(column(rows, Row::received_at))
        .bind(column(letters, |dead_letter| dead_letter.original.seq))
        .bind(column(letters, |dead_letter| {
            dead_letter.original.subject.as_str()
        }))
        .bind(column(letters, |dead_letter| {
            dead_letter.original.headers.as_slice()
        }))
        .bind(column(letters, |dead_letter| {
            dead_letter.original.payload.as_ref()
        }))
        .bind(column(letters, |dead_letter| dead_letter.reason.as_str()))
        .bind(column(letters, |dead_letter| dead_letter.detail.as_str()))
        .bind(column(letters, |dead_letter| {
            dead_letter.original.received_at
        }))
        .bind(column(&traced, |row| row.seq()))
        .bind(column(&traced, |row| row.traceparent.as_deref()))
        .bind(key_part(|key| &key.sender))
        .bind(key_part(|key| &key.id))
        .fetch_one(connection);
    let (new, deleted): (i64, Vec<i64>) = query_span("insert", "messages", store).await?;
    Ok((u64::try_from(new).unwrap_or_default(), deleted))
}

/// What each message is whose sender and id were taken already.
async fn classify_collisions(
    connection: &mut PgConnection,
    batch: &Batch,
    rooms: &HashMap<String, i32>,
) -> Result<Vec<(i64, String)>, sqlx::Error> {
    let rows: Vec<&Row> = batch.messages().collect();
    sqlx::query_as(CLASSIFY_COLLISIONS)
        .bind(column(&rows, |row| row.seq()))
        .bind(column(&rows, |row| row.message.user.as_str()))
        .bind(column(&rows, |row| row.id.as_str()))
        .bind(column(&rows, |row| row.derived()))
        .bind(column(&rows, |row| rooms.get(&row.message.room).copied()))
        .bind(column(&rows, |row| row.message.text.as_str()))
        .bind(column(&rows, |row| row.received_at()))
        .fetch_all(connection)
        .await
}

/// The batch's rooms, inserted where they are new. Asked every time and never remembered: a
/// database that was restored or emptied meanwhile may give the same number to another room.
async fn rooms(
    connection: &mut PgConnection,
    batch: &Batch,
) -> Result<HashMap<String, i32>, sqlx::Error> {
    let of_messages = batch.messages().map(|row| row.message.room.as_str());
    let of_changes = batch.changes.iter().map(|row| row.change.room.as_str());
    let mut names: Vec<&str> = of_messages.chain(of_changes).collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return Ok(HashMap::new());
    }
    let mut rooms = find_rooms(connection, &names).await?;
    names.retain(|name| !rooms.contains_key(*name));
    if !names.is_empty() {
        sqlx::query(INSERT_ROOMS)
            .bind(&names)
            .execute(&mut *connection)
            .await?;
        rooms.extend(find_rooms(connection, &names).await?);
    }
    Ok(rooms)
}

async fn find_rooms(
    connection: &mut PgConnection,
    names: &[&str],
) -> Result<HashMap<String, i32>, sqlx::Error> {
    let found: Vec<(String, i32)> = sqlx::query_as(FIND_ROOMS)
        .bind(names)
        .fetch_all(connection)
        .await?;
    Ok(found.into_iter().collect())
}

/// One column of a statement's parameters.
pub fn column<'a, R, T>(rows: &'a [R], value: impl Fn(&'a R) -> T) -> Vec<T> {
    rows.iter().map(value).collect()
}
