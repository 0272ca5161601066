//! Deletions: a tombstone in `messages`, a row in `changes`.
//!
//! The tombstone goes by the message's unique key. Where the message is stored, it loses its text; where it is not yet,
//! the tombstone takes its place, and the message will find it there. So the order of arrival does not matter.

use std::collections::HashMap;

use sqlx::Postgres;
use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::query::Query;
use sqlx::types::time::OffsetDateTime;

use crate::batch::{ChangeRow, Key, instant};
use crate::erase::Erasure;
use crate::letters::Deleted;
use crate::store::Stored;
use base::seq::Seq;

const TOMBSTONES: &str = "
    insert into messages (seq, room_id, sender, recipient, id, derived, text, sent_at, received_at, deleted)
    select seq, room_id, sender, recipient, id, derived, '', sent_at, received_at, true
      from unnest($1::bigint[], $2::int[], $3::text[], $4::text[], $5::text[], $6::bool[], $7::timestamptz[], $8::timestamptz[])
           as target (seq, room_id, sender, recipient, id, derived, sent_at, received_at)
    on conflict on constraint messages_sender_id_key do update set text = '', deleted = true";

/// Tombstones that stand in the place of a copy move to the message's own place, which is where readers were told that it is.
/// A copy is stored before its message when the message was erased from the log before anybody stored it. The time of
/// receipt guards as in `STORE`, and another message's place stays its own. This transaction has locked the rows already, so
/// they stay where the index finds them.
pub const MOVE: &str = "
    update messages
       set seq = target.seq, room_id = target.room_id, recipient = target.recipient,
           sent_at = target.sent_at, received_at = target.received_at
      from unnest($1::bigint[], $2::int[], $3::text[], $4::text[], $5::text[], $6::bool[], $7::timestamptz[], $8::timestamptz[])
           as target (seq, room_id, sender, recipient, id, derived, sent_at, received_at)
     cross join lateral (
           select ctid as place from messages
            where (messages.sender, messages.id, messages.derived) = (target.sender, target.id, target.derived)
           offset 0) as found
     where messages.ctid = found.place
       and messages.seq > target.seq and messages.received_at >= target.received_at
       and (select count(*) from messages as other where other.seq = target.seq) = 0";

const CHANGES: &str = "
    with made as (
        insert into changes (seq, room_id, target, sender, id, mode, changed_by, received_at, recipient)
        select * from unnest($1::bigint[], $2::int[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[], $8::timestamptz[],
                             $11::text[])
        on conflict (seq) do nothing
        returning seq
    ), noted as (
        insert into outbox (first_seq, last_seq, seqs, traced, traceparents)
        select min(seq), max(seq), array_agg(seq), $9::bigint[], $10::text[] from made having count(*) > 0
    )
    select count(*) from made";

/// Of some sequences, those that hold another change: the log took it at another time.
const REUSED: &str = "
    select asked.seq from unnest($1::bigint[], $2::timestamptz[]) as asked (seq, received_at)
      join changes on changes.seq = asked.seq and changes.received_at <> asked.received_at";

/// Where the log may hold some messages: in their own place, and wherever they stand again.
pub const PLACES: &str = "
    select asked.sender, asked.id, asked.derived, found.seq
      from unnest($1::text[], $2::text[], $3::bool[]) as asked (sender, id, derived)
     cross join lateral (
           select seq from messages
            where (messages.sender, messages.id, messages.derived) = (asked.sender, asked.id, asked.derived)
           union all
           select seq from duplicates
            where (duplicates.sender, duplicates.id) = (asked.sender, asked.id) and not asked.derived
           offset 0) as found";

/// What became of a batch's changes.
#[derive(Debug, Default)]
pub struct Made {
    /// Changes that are new.
    pub new: u64,
    /// Sequences under which another change is stored.
    pub reused: Vec<i64>,
}

/// Makes every change.
///
/// # Errors
/// The transaction has failed.
pub async fn make(
    connection: &mut PgConnection,
    changes: &[ChangeRow],
    rooms: &HashMap<String, i32>,
) -> Result<Made, sqlx::Error> {
    bury(connection, changes, rooms).await?;
    let new = note(connection, changes, rooms).await?;
    let mut made = Made {
        new,
        ..Made::default()
    };
    if new < changes.len() as u64 {
        made.reused = sqlx::query_scalar(REUSED)
            .bind(
                changes
                    .iter()
                    .map(|row| row.change.seq.as_i64())
                    .collect::<Vec<i64>>(),
            )
            .bind(
                changes
                    .iter()
                    .map(ChangeRow::received_at)
                    .collect::<Vec<OffsetDateTime>>(),
            )
            .fetch_all(&mut *connection)
            .await?;
    }
    Ok(made)
}

/// Looks for the texts of what is deleted for good.
///
/// # Errors
/// Doing it again finds the same.
pub async fn erase(
    connection: &mut PgConnection,
    changes: &[ChangeRow],
    stored: &mut Stored,
) -> Result<(), sqlx::Error> {
    let hard: Vec<&ChangeRow> = changes.iter().filter(|row| row.is_hard()).collect();
    let mut keys: Vec<Key> = hard.iter().map(|row| row.named()).collect();
    keys.dedup();
    if keys.is_empty() {
        return Ok(());
    }
    let places: Vec<(String, String, bool, i64)> = sqlx::query_as(PLACES)
        .bind(
            keys.iter()
                .map(|key| key.sender.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            keys.iter()
                .map(|key| key.id.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(keys.iter().map(|key| key.derived).collect::<Vec<bool>>())
        .fetch_all(connection)
        .await?;
    stored.erase.extend(
        hard.iter()
            .map(|row| Erasure::new(row.change.deletion.target, row.named())),
    );
    let found = |(sender, id, derived, seq)| {
        Erasure::new(
            Seq::from_i64(seq),
            Key {
                sender,
                id,
                derived,
            },
        )
    };
    stored.erase.extend(places.into_iter().map(found));
    let deleted = |row: &&ChangeRow| Deleted {
        key: row.named(),
        received_at: instant(row.change.deletion.received),
    };
    stored.empty.extend(hard.iter().map(deleted));
    Ok(())
}

/// Puts a tombstone in the place of every target.
async fn bury(
    connection: &mut PgConnection,
    changes: &[ChangeRow],
    rooms: &HashMap<String, i32>,
) -> Result<(), sqlx::Error> {
    // One statement must not meet the same message twice.
    let mut targets: Vec<&ChangeRow> = changes.iter().collect();
    targets.sort_by(|a, b| {
        a.key()
            .cmp(&b.key())
            .then(a.change.deletion.target.cmp(&b.change.deletion.target))
    });
    targets.dedup_by(|later, first| later.key() == first.key());
    for statement in [TOMBSTONES, MOVE] {
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
    let of = |row: &&ChangeRow| row.change.deletion.clone();
    sqlx::query(statement)
        .bind(
            targets
                .iter()
                .map(|row| row.change.deletion.target.as_i64())
                .collect::<Vec<i64>>(),
        )
        .bind(
            targets
                .iter()
                .map(|row| rooms.get(&row.change.room).copied())
                .collect::<Vec<Option<i32>>>(),
        )
        .bind(targets.iter().map(|row| row.key().0).collect::<Vec<&str>>())
        .bind(
            targets
                .iter()
                .map(|row| of(row).to)
                .collect::<Vec<Option<String>>>(),
        )
        .bind(targets.iter().map(|row| row.key().1).collect::<Vec<&str>>())
        .bind(targets.iter().map(|row| row.key().2).collect::<Vec<bool>>())
        .bind(
            targets
                .iter()
                .map(|row| instant(of(row).timestamp))
                .collect::<Vec<OffsetDateTime>>(),
        )
        .bind(
            targets
                .iter()
                .map(|row| instant(of(row).received))
                .collect::<Vec<OffsetDateTime>>(),
        )
}

async fn note(
    connection: &mut PgConnection,
    changes: &[ChangeRow],
    rooms: &HashMap<String, i32>,
) -> Result<u64, sqlx::Error> {
    let traced = || {
        changes
            .iter()
            .filter_map(|row| Some((row.change.seq.as_i64(), row.traceparent.as_deref()?)))
    };
    let new: i64 = sqlx::query_scalar(CHANGES)
        .bind(
            changes
                .iter()
                .map(|row| row.change.seq.as_i64())
                .collect::<Vec<i64>>(),
        )
        .bind(
            changes
                .iter()
                .map(|row| rooms.get(&row.change.room).copied())
                .collect::<Vec<Option<i32>>>(),
        )
        .bind(
            changes
                .iter()
                .map(|row| row.change.deletion.target.as_i64())
                .collect::<Vec<i64>>(),
        )
        .bind(changes.iter().map(|row| row.key().0).collect::<Vec<&str>>())
        .bind(changes.iter().map(|row| row.key().1).collect::<Vec<&str>>())
        .bind(
            changes
                .iter()
                .map(|row| row.change.deletion.mode.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            changes
                .iter()
                .map(|row| row.change.deletion.by.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            changes
                .iter()
                .map(ChangeRow::received_at)
                .collect::<Vec<OffsetDateTime>>(),
        )
        .bind(traced().map(|(seq, _)| seq).collect::<Vec<i64>>())
        .bind(
            traced()
                .map(|(_, traceparent)| traceparent)
                .collect::<Vec<&str>>(),
        )
        .bind(
            changes
                .iter()
                .map(|row| row.change.deletion.to.as_deref())
                .collect::<Vec<Option<&str>>>(),
        )
        .fetch_one(connection)
        .await?;
    Ok(u64::try_from(new).unwrap_or_default())
}
