//! One batch, one statement; with deletions among it, one transaction.

use std::collections::HashMap;

use runtime::query_span;
use sqlx::Connection;
use sqlx::postgres::PgConnection;
use sqlx::types::time::OffsetDateTime;

use crate::batch::{Batch, Row};
use crate::change;
use crate::erase::Erasure;
use crate::seen::Seen;

/// Rows, letters and the outbox together or not at all. Storing again is harmless: a row meets itself under its
/// sender and id. Where a sender used an id twice, the lower sequence stays, whichever copy was faster; unless the
/// log took it later: then it comes from a log that was made anew, and the row keeps its place. A row that is deleted
/// takes no text any more.
const STORE: &str = "
    with letters as (
        insert into dead_letters (seq, subject, headers, payload, reason, detail, received_at)
        select * from unnest($10::bigint[], $11::text[], $12::bytea[], $13::bytea[], $14::text[], $15::text[], $16::timestamptz[])
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
        returning seq
    ), noted as (
        insert into outbox (first_seq, last_seq, seqs, traced, traceparents)
        select min(seq), max(seq), array_agg(seq), $17::bigint[], $18::text[] from stored having count(*) > 0
    )
    select count(*) from stored";

/// Of some sequences, those that hold another message: the log took it at another time.
const REUSED: &str = "
    select asked.seq from unnest($1::bigint[], $2::timestamptz[]) as asked (seq, received_at)
      join messages on messages.seq = asked.seq and messages.received_at <> asked.received_at";

const FIND_ROOMS: &str = "select name, id from rooms where name = any($1::text[])";

const MAKE_ROOMS: &str = "
    insert into rooms (name) select unnest($1::text[]) on conflict do nothing";

/// Where the log holds messages whose sender and id are stored under another sequence; those that are deleted there.
const NOTE_DUPLICATES: &str = "
    with found as (
        select asked.seq, asked.sender, asked.id, messages.deleted
          from unnest($1::bigint[], $2::text[], $3::text[]) as asked (seq, sender, id)
          join messages on (messages.sender, messages.id, messages.derived) = (asked.sender, asked.id, false)
         where messages.seq <> asked.seq
    ), noted as (
        insert into duplicates (seq, sender, id) select seq, sender, id from found on conflict do nothing
    )
    select seq, sender, id from found where deleted";

/// What became of a batch's rows.
#[derive(Debug, Default)]
pub struct Stored {
    /// Rows that are new.
    pub new: u64,
    /// Sequences under which another message is stored: their rows were not, and nobody may think they were.
    pub reused: Vec<i64>,
    /// Changes that are new.
    pub changed: u64,
    /// Texts that have to leave the log before the batch is acknowledged.
    pub erase: Vec<Erasure>,
}

/// Stores the batch.
///
/// # Errors
/// Nothing more of the batch is stored then than a second attempt will find.
pub async fn store(connection: &mut PgConnection, batch: &Batch, seen: &Seen) -> Result<Stored, sqlx::Error> {
    seen.note(connection, batch).await?;
    let rooms = rooms(connection, batch).await?;
    let mut stored = if batch.changes.is_empty() {
        Stored { new: store_rows(connection, batch, &rooms).await?, ..Stored::default() }
    } else {
        let mut transaction = connection.begin().await?;
        let new = store_rows(&mut transaction, batch, &rooms).await?;
        let made = change::make(&mut transaction, &batch.changes, &rooms).await?;
        transaction.commit().await?;
        Stored { new, changed: made.new, reused: made.reused, erase: made.erase }
    };
    // Only rows that met another can have met a stranger, or be duplicates; usually none has.
    if stored.new < batch.rows.len() as u64 {
        stored.reused.extend(reused(connection, batch).await?);
    }
    if stored.new < batch.rows.len() as u64 || !batch.repeated.is_empty() {
        stored.erase.extend(note_duplicates(connection, batch).await?);
    }
    Ok(stored)
}

async fn store_rows(connection: &mut PgConnection, batch: &Batch, rooms: &HashMap<String, i32>) -> Result<u64, sqlx::Error> {
    let (rows, letters) = (&batch.rows, &batch.letters);
    let room_ids: Vec<Option<i32>> = rows.iter().map(|row| rooms.get(row.message.room.as_str()).copied()).collect();
    let traced = || rows.iter().filter_map(|row| Some((row.message.seq.as_i64(), row.traceparent.as_deref()?)));
    let store = sqlx::query_scalar(STORE)
        .bind(seqs(rows))
        .bind(room_ids)
        .bind(rows.iter().map(|row| row.message.user.as_str()).collect::<Vec<&str>>())
        .bind(rows.iter().map(|row| row.message.to.as_deref()).collect::<Vec<Option<&str>>>())
        .bind(rows.iter().map(|row| row.id.as_str()).collect::<Vec<&str>>())
        .bind(rows.iter().map(|row| row.derived()).collect::<Vec<bool>>())
        .bind(rows.iter().map(|row| row.message.text.as_str()).collect::<Vec<&str>>())
        .bind(rows.iter().map(|row| row.sent_at()).collect::<Vec<OffsetDateTime>>())
        .bind(rows.iter().map(|row| row.received_at()).collect::<Vec<OffsetDateTime>>())
        .bind(letters.iter().map(|letter| letter.original.seq).collect::<Vec<i64>>())
        .bind(letters.iter().map(|letter| letter.original.subject.as_str()).collect::<Vec<&str>>())
        .bind(letters.iter().map(|letter| letter.original.headers.as_slice()).collect::<Vec<&[u8]>>())
        .bind(letters.iter().map(|letter| letter.original.payload.as_ref()).collect::<Vec<&[u8]>>())
        .bind(letters.iter().map(|letter| letter.reason.as_str()).collect::<Vec<&str>>())
        .bind(letters.iter().map(|letter| letter.detail.as_str()).collect::<Vec<&str>>())
        .bind(letters.iter().map(|letter| letter.original.received_at).collect::<Vec<OffsetDateTime>>())
        .bind(traced().map(|(seq, _)| seq).collect::<Vec<i64>>())
        .bind(traced().map(|(_, traceparent)| traceparent).collect::<Vec<&str>>())
        .fetch_one(connection);
    let new: i64 = query_span("insert", "messages", store).await?;
    Ok(u64::try_from(new).unwrap_or_default())
}

fn seqs(rows: &[Row]) -> Vec<i64> {
    rows.iter().map(|row| row.message.seq.as_i64()).collect()
}

/// Remembers where the log holds what is stored already. A message that is deleted and said again is erased there.
async fn note_duplicates(connection: &mut PgConnection, batch: &Batch) -> Result<Vec<Erasure>, sqlx::Error> {
    let rows: Vec<&Row> = batch.rows.iter().chain(&batch.repeated).filter(|row| !row.derived()).collect();
    let found: Vec<(i64, String, String)> = sqlx::query_as(NOTE_DUPLICATES)
        .bind(rows.iter().map(|row| row.message.seq.as_i64()).collect::<Vec<i64>>())
        .bind(rows.iter().map(|row| row.message.user.as_str()).collect::<Vec<&str>>())
        .bind(rows.iter().map(|row| row.id.as_str()).collect::<Vec<&str>>())
        .fetch_all(connection)
        .await?;
    Ok(found.into_iter().map(Erasure::of_duplicate).collect())
}

async fn reused(connection: &mut PgConnection, batch: &Batch) -> Result<Vec<i64>, sqlx::Error> {
    sqlx::query_scalar(REUSED)
        .bind(seqs(&batch.rows))
        .bind(batch.rows.iter().map(|row| row.received_at()).collect::<Vec<OffsetDateTime>>())
        .fetch_all(connection)
        .await
}

/// The batch's rooms, made where they are new. Asked every time instead of remembered: a database that was
/// restored or emptied meanwhile may give the same number to another room.
async fn rooms(connection: &mut PgConnection, batch: &Batch) -> Result<HashMap<String, i32>, sqlx::Error> {
    let changed = batch.changes.iter().map(|row| row.change.room.as_str());
    let mut names: Vec<&str> = batch.rows.iter().map(|row| row.message.room.as_str()).chain(changed).collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return Ok(HashMap::new());
    }
    let mut known = find_rooms(connection, &names).await?;
    names.retain(|name| !known.contains_key(*name));
    if !names.is_empty() {
        sqlx::query(MAKE_ROOMS).bind(&names).execute(&mut *connection).await?;
        known.extend(find_rooms(connection, &names).await?);
    }
    Ok(known)
}

async fn find_rooms(connection: &mut PgConnection, names: &[&str]) -> Result<HashMap<String, i32>, sqlx::Error> {
    let found: Vec<(String, i32)> = sqlx::query_as(FIND_ROOMS).bind(names).fetch_all(connection).await?;
    Ok(found.into_iter().collect())
}
