//! Deletions: a tombstone in `messages`, a row in `changes`.
//!
//! The tombstone is found by the message's unique key. Where the message is stored, it loses its
//! text; where it is not stored yet, the tombstone takes its place, and the message finds it there.
//! So the order of arrival does not matter.

use std::collections::HashMap;

use sqlx::Postgres;
use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::query::Query;

use crate::dead_letters::Deleted;
use crate::erase::Erasure;
use crate::row::{ChangeRow, Key};
use crate::store::{Stored, column};
use base::seq::Seq;
use base::time::from_unix_ms;

/// A stored message loses its text. For one that is not stored yet, the tombstone takes its place.
const INSERT_TOMBSTONES: &str = include_str!("sql/insert_tombstones.sql");
/// A tombstone in the place of a duplicate moves to the place of the message itself, which is where
/// readers learned that the message is. A duplicate is stored before its message when the message
/// was erased from the stream before it was stored. The time of receipt guards as in
/// store_rows.sql, and another message's place stays its own. This transaction already holds the
/// rows' locks, so they stay where the index finds them.
pub const MOVE_TOMBSTONES: &str = include_str!("sql/move_tombstones.sql");
const INSERT_CHANGES: &str = include_str!("sql/insert_changes.sql");
/// Where the stream may hold these messages: under their own sequence, and under those of
/// duplicates.
pub const FIND_DUPLICATES: &str = include_str!("sql/find_duplicates.sql");

/// Of some sequences, those that hold another change: the stream received it at another time.
const FIND_REUSED: &str = "
    select asked.seq from unnest($1::bigint[], $2::timestamptz[]) as asked (seq, received_at)
      join changes on changes.seq = asked.seq and changes.received_at <> asked.received_at";

/// What became of a batch's changes.
#[derive(Debug, Default)]
pub struct Applied {
    /// Changes that are new.
    pub new: u64,
    /// Sequences under which another change is stored.
    pub reused: Vec<i64>,
}

/// Applies every change.
///
/// # Errors
/// The transaction has failed.
pub async fn apply(
    connection: &mut PgConnection,
    changes: &[ChangeRow],
    rooms: &HashMap<String, i32>,
) -> Result<Applied, sqlx::Error> {
    write_tombstones(connection, changes, rooms).await?;
    let new = insert_changes(connection, changes, rooms).await?;
    let mut applied = Applied {
        new,
        ..Applied::default()
    };
    if new < changes.len() as u64 {
        applied.reused = sqlx::query_scalar(FIND_REUSED)
            .bind(column(changes, ChangeRow::seq))
            .bind(column(changes, ChangeRow::received_at))
            .fetch_all(&mut *connection)
            .await?;
    }
    Ok(applied)
}

/// Finds the texts of hard-deleted messages, and adds them to `stored`.
///
/// # Errors
/// The database's. Doing it again finds the same.
pub async fn find_erasures(
    connection: &mut PgConnection,
    changes: &[ChangeRow],
    stored: &mut Stored,
) -> Result<(), sqlx::Error> {
    let hard: Vec<&ChangeRow> = changes.iter().filter(|row| row.is_hard()).collect();
    let mut keys: Vec<Key> = column(&hard, |row| row.key());
    keys.dedup();
    if keys.is_empty() {
        return Ok(());
    }
    let duplicates: Vec<(String, String, bool, i64)> = sqlx::query_as(FIND_DUPLICATES)
        .bind(column(&keys, |key| key.sender.as_str()))
        .bind(column(&keys, |key| key.id.as_str()))
        .bind(column(&keys, |key| key.derived))
        .fetch_all(connection)
        .await?;
    for row in hard {
        let deletion = &row.change.deletion;
        stored
            .erasures
            .push(Erasure::new(deletion.target, row.key()));
        stored.deleted.push(Deleted {
            key: row.key(),
            received_at: from_unix_ms(deletion.received),
        });
    }
    for (sender, id, derived, seq) in duplicates {
        let key = Key {
            sender,
            id,
            derived,
        };
        stored.erasures.push(Erasure::new(Seq::from_i64(seq), key));
    }
    Ok(())
}

/// Puts a tombstone in the place of every deleted message.
async fn write_tombstones(
    connection: &mut PgConnection,
    changes: &[ChangeRow],
    rooms: &HashMap<String, i32>,
) -> Result<(), sqlx::Error> {
    // One statement must not contain the same message twice.
    let mut targets: Vec<&ChangeRow> = changes.iter().collect();
    targets.sort_by(|a, b| {
        let by_target = a.change.deletion.target.cmp(&b.change.deletion.target);
        a.key_ref().cmp(&b.key_ref()).then(by_target)
    });
    targets.dedup_by(|later, first| later.key_ref() == first.key_ref());
    for statement in [INSERT_TOMBSTONES, MOVE_TOMBSTONES] {
        bind_targets(statement, &targets, rooms)
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

fn bind_targets<'q>(
    statement: &'static str,
    targets: &[&'q ChangeRow],
    rooms: &HashMap<String, i32>,
) -> Query<'q, Postgres, PgArguments> {
    sqlx::query(statement)
        .bind(column(targets, |row| row.change.deletion.target.as_i64()))
        .bind(column(targets, |row| rooms.get(&row.change.room).copied()))
        .bind(column(targets, |row| row.key_ref().0))
        .bind(column(targets, |row| row.change.deletion.to.clone()))
        .bind(column(targets, |row| row.key_ref().1))
        .bind(column(targets, |row| row.key_ref().2))
        .bind(column(targets, |row| {
            from_unix_ms(row.change.deletion.timestamp)
        }))
        .bind(column(targets, |row| {
            from_unix_ms(row.change.deletion.received)
        }))
}

async fn insert_changes(
    connection: &mut PgConnection,
    changes: &[ChangeRow],
    rooms: &HashMap<String, i32>,
) -> Result<u64, sqlx::Error> {
    let traced: Vec<&ChangeRow> = changes
        .iter()
        .filter(|row| row.traceparent.is_some())
        .collect();
    let new: i64 = sqlx::query_scalar(INSERT_CHANGES)
        .bind(column(changes, ChangeRow::seq))
        .bind(column(changes, |row| rooms.get(&row.change.room).copied()))
        .bind(column(changes, |row| row.change.deletion.target.as_i64()))
        .bind(column(changes, |row| row.key_ref().0))
        .bind(column(changes, |row| row.key_ref().1))
        .bind(column(changes, |row| row.change.deletion.mode.as_str()))
        .bind(column(changes, |row| row.change.deletion.by.as_str()))
        .bind(column(changes, ChangeRow::received_at))
        .bind(column(&traced, |row| row.seq()))
        .bind(column(&traced, |row| row.traceparent.as_deref()))
        .bind(column(changes, |row| row.change.deletion.to.as_deref()))
        .fetch_one(connection)
        .await?;
    Ok(u64::try_from(new).unwrap_or_default())
}
