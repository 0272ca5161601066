//! One batch, one statement; deletions, one transaction.
//!
//! Every statement takes its locks in the order of the unique key of `messages`, and a transaction does so once, so two
//! replicas never wait for each other.

use std::collections::HashMap;

use sqlx::Connection;
use sqlx::postgres::PgConnection;
use sqlx::types::time::OffsetDateTime;

use crate::batch::{Batch, Key, Row};
use crate::change;
use crate::erase::Erasure;
use crate::letters::Deleted;
use crate::seen::Seen;
use postgres::span::query_span;

/// Rows, letters and the outbox together or not at all. Storing again is harmless: a row meets itself under its
/// sender and id. Where a sender used an id twice, the lower sequence stays, whichever copy was faster; unless the
/// log took it later: then it comes from a log that was made anew, and the row keeps its place. A row that is deleted
/// takes no text any more. A row that loses its place to another text becomes a dead letter (`note_displaced`).
pub const STORE: &str = "
    with letters as (
        insert into dead_letters (seq, subject, headers, payload, reason, detail, received_at, sender, message_id)
        select * from unnest($10::bigint[], $11::text[], $12::bytea[], $13::bytea[], $14::text[], $15::text[], $16::timestamptz[],
                             $19::text[], $20::text[])
        on conflict do nothing
    ), stored as (
        insert into messages (seq, room_id, sender, recipient, id, derived, text, sent_at, received_at)
        select * from unnest($1::bigint[], $2::int[], $3::text[], $4::text[], $5::text[], $6::bool[], $7::text[],
                             $8::timestamptz[], $9::timestamptz[])
        on conflict on constraint messages_sender_id_key do update
           set seq = excluded.seq, room_id = excluded.room_id, recipient = excluded.recipient,
               text = case when messages.deleted then '' else excluded.text end,
               sent_at = excluded.sent_at, received_at = excluded.received_at
         where messages.seq > excluded.seq and messages.received_at >= excluded.received_at
        returning seq, deleted
    ), noted as (
        insert into outbox (first_seq, last_seq, seqs, traced, traceparents)
        select min(seq), max(seq), array_agg(seq), $17::bigint[], $18::text[] from stored having count(*) > 0
    )
    select count(*), coalesce(array_agg(seq) filter (where deleted), '{}') from stored";

/// A batch's rooms. Lateral with an offset, here and below, is a nested loop over the index whatever PostgreSQL knows
/// about the table: `name = any($1)` compares every room with every name under a generic plan.
pub const FIND_ROOMS: &str = "
    select asked.name, found.id from unnest($1::text[]) as asked (name)
     cross join lateral (select id from rooms where rooms.name = asked.name offset 0) as found";

const MAKE_ROOMS: &str = "
    insert into rooms (name) select unnest($1::text[]) on conflict do nothing";

/// Messages that met another one under their sender and id. Of the same text in the same room it is a duplicate, and its
/// place is remembered for whoever deletes the message; so is every copy of a deleted message, whose text nobody knows any
/// more. Another text is a conflict. Under the message's own sequence, received at another time, stands a message of a log
/// that is gone: the sequence is reused.
pub const MET: &str = "
    with met as (
        select asked.seq, asked.sender, asked.id, asked.received_at,
               case when found.seq = asked.seq then 'reused'
                    when found.deleted or (found.text = asked.text and found.room_id = asked.room_id) then 'duplicate'
                    else 'conflict' end as what
          from unnest($1::bigint[], $2::text[], $3::text[], $4::bool[], $5::int[], $6::text[], $7::timestamptz[])
               as asked (seq, sender, id, derived, room_id, text, received_at)
         cross join lateral (
               select seq, room_id, text, deleted, received_at from messages
                where (messages.sender, messages.id, messages.derived) = (asked.sender, asked.id, asked.derived)
               offset 0) as found
         where case when found.seq = asked.seq then found.received_at <> asked.received_at else not asked.derived end
    ), noted as (
        insert into duplicates (seq, sender, id)
        select seq, sender, id from met where what = 'duplicate' order by sender, id, seq
        on conflict do nothing
    )
    select seq, what from met
     where what <> 'conflict'
        or (select count(*) from dead_letters
             where (dead_letters.seq, reason, dead_letters.received_at) = (met.seq, 'id_conflict', met.received_at)) = 0";

/// Of some messages those that are deleted, when the log took them, and whether they are deleted for good.
pub const DELETED: &str = "
    select asked.sender, asked.id, asked.derived, found.received_at,
           (select count(*) > 0
              from (select from changes
                     where (changes.sender, changes.id) = (asked.sender, asked.id) and mode = 'hard' limit 1) as hard) as hard
      from unnest($1::text[], $2::text[], $3::bool[]) as asked (sender, id, derived)
     cross join lateral (
           select deleted, received_at from messages
            where (messages.sender, messages.id, messages.derived) = (asked.sender, asked.id, asked.derived)
           offset 0) as found
     where found.deleted";

/// What became of a batch's rows.
#[derive(Debug, Default)]
pub struct Stored {
    /// Rows that are new.
    pub new: u64,
    /// Sequences under which another message is stored: their rows were not, and nobody may think they were.
    pub reused: Vec<i64>,
    /// Sequences whose sender used the id for another message before.
    pub conflicts: Vec<i64>,
    /// Changes that are new.
    pub changed: u64,
    /// Texts that have to leave the log before the batch is acknowledged.
    pub erase: Vec<Erasure>,
    /// Messages deleted for good whose dead letters have to be emptied before the batch is acknowledged.
    pub empty: Vec<Deleted>,
}

/// Stores the batch.
///
/// # Errors
/// Nothing more of the batch is stored then than a second attempt will find.
pub async fn store(
    connection: &mut PgConnection,
    batch: &Batch,
    seen: &Seen,
) -> Result<Stored, sqlx::Error> {
    seen.note(connection, batch).await?;
    let rooms = rooms(connection, batch).await?;
    let mut stored = Stored::default();
    let mut deleted = Vec::new();
    if !batch.rows.is_empty() || !batch.letters.is_empty() {
        (stored.new, deleted) = store_rows(connection, batch, &rooms).await?;
    }
    if !batch.changes.is_empty() {
        let mut transaction = connection.begin().await?;
        let made = change::make(&mut transaction, &batch.changes, &rooms).await?;
        transaction.commit().await?;
        (stored.changed, stored.reused) = (made.new, made.reused);
        // Committed first, looked for afterwards; see `meet_deletions`.
        change::erase(connection, &batch.changes, &mut stored).await?;
    }
    let mut copies = Vec::new();
    // Only rows that met another can be duplicates or conflicts; usually none has.
    if stored.new < batch.rows.len() as u64 || batch.rows.iter().any(|row| !row.copies.is_empty()) {
        for (seq, what) in met(connection, batch, &rooms).await? {
            match what.as_str() {
                "reused" => stored.reused.push(seq),
                "conflict" => stored.conflicts.push(seq),
                _ => copies.push(seq),
            }
        }
    }
    meet_deletions(connection, batch, &deleted, &copies, &mut stored).await?;
    Ok(stored)
}

/// Whether what was just stored is deleted: copies of deleted messages, messages that took a tombstone's place, letters of
/// deleted messages. We commit, then look for the deletion; whoever stores the deletion commits it, then looks for copies
/// and letters. So one of the two sees the other, however they are interleaved.
async fn meet_deletions(
    connection: &mut PgConnection,
    batch: &Batch,
    deleted: &[i64],
    copies: &[i64],
    stored: &mut Stored,
) -> Result<(), sqlx::Error> {
    let rows: Vec<&Row> = batch
        .messages()
        .filter(|row| {
            [deleted, copies]
                .iter()
                .any(|seqs| seqs.contains(&row.seq()))
        })
        .collect();
    let letters = batch
        .letters
        .iter()
        .filter_map(|letter| letter.named.clone());
    let mut asked: Vec<Key> = rows.iter().map(|row| row.named()).chain(letters).collect();
    asked.sort_unstable();
    asked.dedup();
    if asked.is_empty() {
        return Ok(());
    }
    let found: Vec<(String, String, bool, OffsetDateTime, bool)> = sqlx::query_as(DELETED)
        .bind(
            asked
                .iter()
                .map(|key| key.sender.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            asked
                .iter()
                .map(|key| key.id.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(asked.iter().map(|key| key.derived).collect::<Vec<bool>>())
        .fetch_all(connection)
        .await?;
    let found: HashMap<Key, (Deleted, bool)> = found
        .into_iter()
        .map(|(sender, id, derived, received_at, hard)| {
            let key = Key {
                sender,
                id,
                derived,
            };
            (key.clone(), (Deleted { key, received_at }, hard))
        })
        .collect();
    for row in rows {
        // A copy says again what is deleted, so it goes; the message itself goes only when it is deleted for good.
        if found
            .get(&row.named())
            .is_some_and(|(_, hard)| *hard || copies.contains(&row.seq()))
        {
            stored
                .erase
                .push(Erasure::new(row.message.seq, row.named()));
        }
    }
    for letter in &batch.letters {
        let deleted = letter
            .named
            .as_ref()
            .and_then(|key| Some((key, found.get(key)?)));
        if let Some((key, (deleted, true))) = deleted
            && deleted.is(key, letter.original.received_at)
        {
            stored.empty.push(deleted.clone());
        }
    }
    Ok(())
}

async fn store_rows(
    connection: &mut PgConnection,
    batch: &Batch,
    rooms: &HashMap<String, i32>,
) -> Result<(u64, Vec<i64>), sqlx::Error> {
    let (rows, letters) = (&batch.rows, &batch.letters);
    let room_ids: Vec<Option<i32>> = rows
        .iter()
        .map(|row| rooms.get(row.message.room.as_str()).copied())
        .collect();
    let traced = || {
        rows.iter()
            .filter_map(|row| Some((row.message.seq.as_i64(), row.traceparent.as_deref()?)))
    };
    let named = |of: fn(&Key) -> &str| {
        letters
            .iter()
            .map(|letter| letter.named.as_ref().map_or("", of))
            .collect::<Vec<&str>>()
    };
    let store = sqlx::query_as(STORE)
        .bind(rows.iter().map(Row::seq).collect::<Vec<i64>>())
        .bind(room_ids)
        .bind(
            rows.iter()
                .map(|row| row.message.user.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            rows.iter()
                .map(|row| row.message.to.as_deref())
                .collect::<Vec<Option<&str>>>(),
        )
        .bind(
            rows.iter()
                .map(|row| row.id.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(rows.iter().map(|row| row.derived()).collect::<Vec<bool>>())
        .bind(
            rows.iter()
                .map(|row| row.message.text.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            rows.iter()
                .map(|row| row.sent_at())
                .collect::<Vec<OffsetDateTime>>(),
        )
        .bind(
            rows.iter()
                .map(|row| row.received_at())
                .collect::<Vec<OffsetDateTime>>(),
        )
        .bind(
            letters
                .iter()
                .map(|letter| letter.original.seq)
                .collect::<Vec<i64>>(),
        )
        .bind(
            letters
                .iter()
                .map(|letter| letter.original.subject.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            letters
                .iter()
                .map(|letter| letter.original.headers.as_slice())
                .collect::<Vec<&[u8]>>(),
        )
        .bind(
            letters
                .iter()
                .map(|letter| letter.original.payload.as_ref())
                .collect::<Vec<&[u8]>>(),
        )
        .bind(
            letters
                .iter()
                .map(|letter| letter.reason.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            letters
                .iter()
                .map(|letter| letter.detail.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            letters
                .iter()
                .map(|letter| letter.original.received_at)
                .collect::<Vec<OffsetDateTime>>(),
        )
        .bind(traced().map(|(seq, _)| seq).collect::<Vec<i64>>())
        .bind(
            traced()
                .map(|(_, traceparent)| traceparent)
                .collect::<Vec<&str>>(),
        )
        .bind(named(|key| &key.sender))
        .bind(named(|key| &key.id))
        .fetch_one(connection);
    let (new, deleted): (i64, Vec<i64>) = query_span("insert", "messages", store).await?;
    Ok((u64::try_from(new).unwrap_or_default(), deleted))
}

/// What each message met that stood under its sender and id already.
async fn met(
    connection: &mut PgConnection,
    batch: &Batch,
    rooms: &HashMap<String, i32>,
) -> Result<Vec<(i64, String)>, sqlx::Error> {
    let rows: Vec<&Row> = batch.messages().collect();
    sqlx::query_as(MET)
        .bind(rows.iter().map(|row| row.seq()).collect::<Vec<i64>>())
        .bind(
            rows.iter()
                .map(|row| row.message.user.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            rows.iter()
                .map(|row| row.id.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(rows.iter().map(|row| row.derived()).collect::<Vec<bool>>())
        .bind(
            rows.iter()
                .map(|row| rooms.get(&row.message.room).copied())
                .collect::<Vec<Option<i32>>>(),
        )
        .bind(
            rows.iter()
                .map(|row| row.message.text.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            rows.iter()
                .map(|row| row.received_at())
                .collect::<Vec<OffsetDateTime>>(),
        )
        .fetch_all(connection)
        .await
}

/// The batch's rooms, made where they are new. Asked every time instead of remembered: a database that was
/// restored or emptied meanwhile may give the same number to another room.
async fn rooms(
    connection: &mut PgConnection,
    batch: &Batch,
) -> Result<HashMap<String, i32>, sqlx::Error> {
    let changed = batch.changes.iter().map(|row| row.change.room.as_str());
    let mut names: Vec<&str> = batch
        .messages()
        .map(|row| row.message.room.as_str())
        .chain(changed)
        .collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return Ok(HashMap::new());
    }
    let mut known = find_rooms(connection, &names).await?;
    names.retain(|name| !known.contains_key(*name));
    if !names.is_empty() {
        sqlx::query(MAKE_ROOMS)
            .bind(&names)
            .execute(&mut *connection)
            .await?;
        known.extend(find_rooms(connection, &names).await?);
    }
    Ok(known)
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
