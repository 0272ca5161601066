//! One batch, one statement.

use std::collections::HashMap;

use sqlx::postgres::PgConnection;
use sqlx::types::time::OffsetDateTime;
use tracing::Instrument;

use crate::batch::Batch;

/// Rows and letters together or not at all. Storing again is harmless: a row meets itself under its
/// sender and id. Where a sender used an id twice, the lower sequence stays, whichever copy was faster; unless the
/// log took it later: then it comes from a log that was made anew, and the row keeps its place.
const STORE: &str = "
    with letters as (
        insert into dead_letters (seq, subject, headers, payload, reason, detail, received_at)
        select * from unnest($10::bigint[], $11::text[], $12::bytea[], $13::bytea[], $14::text[], $15::text[], $16::timestamptz[])
        on conflict do nothing
    )
    insert into messages (seq, room_id, sender, recipient, id, derived, text, sent_at, received_at)
    select * from unnest($1::bigint[], $2::int[], $3::text[], $4::text[], $5::text[], $6::bool[], $7::text[],
                         $8::timestamptz[], $9::timestamptz[])
    on conflict on constraint messages_sender_id_key do update
       set seq = excluded.seq, room_id = excluded.room_id, recipient = excluded.recipient,
           text = excluded.text, sent_at = excluded.sent_at, received_at = excluded.received_at
     where messages.seq > excluded.seq and messages.received_at >= excluded.received_at";

/// Of some sequences, those that hold another message: the log took it at another time.
const REUSED: &str = "
    select asked.seq from unnest($1::bigint[], $2::timestamptz[]) as asked (seq, received_at)
      join messages on messages.seq = asked.seq and messages.received_at <> asked.received_at";

const FIND_ROOMS: &str = "select name, id from rooms where name = any($1::text[])";

const MAKE_ROOMS: &str = "
    insert into rooms (name) select unnest($1::text[]) on conflict do nothing";

/// What became of a batch's rows.
pub struct Stored {
    /// Rows that are new.
    pub new: u64,
    /// Sequences under which another message is stored: their rows were not, and nobody may think they were.
    pub reused: Vec<i64>,
}

/// Stores the batch.
///
/// # Errors
/// Nothing more of the batch is stored then than a second attempt will find.
pub async fn store(connection: &mut PgConnection, batch: &Batch) -> Result<Stored, sqlx::Error> {
    let rooms = rooms(connection, batch).await?;
    let (rows, letters) = (&batch.rows, &batch.letters);
    let room_ids: Vec<Option<i32>> = rows.iter().map(|row| rooms.get(row.message.room.as_str()).copied()).collect();
    let span = tracing::info_span!(
        "insert messages",
        otel.kind = "client",
        db.system.name = "postgresql",
        db.operation.name = "insert",
        db.collection.name = "messages",
    );
    let new = sqlx::query(STORE)
        .bind(rows.iter().map(|row| row.message.seq.as_i64()).collect::<Vec<i64>>())
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
        .execute(&mut *connection)
        .instrument(span)
        .await?
        .rows_affected();
    // Only rows that met another can have met a stranger; usually none has.
    let reused = if new < rows.len() as u64 { reused(connection, batch).await? } else { Vec::new() };
    Ok(Stored { new, reused })
}

async fn reused(connection: &mut PgConnection, batch: &Batch) -> Result<Vec<i64>, sqlx::Error> {
    sqlx::query_scalar(REUSED)
        .bind(batch.rows.iter().map(|row| row.message.seq.as_i64()).collect::<Vec<i64>>())
        .bind(batch.rows.iter().map(|row| row.received_at()).collect::<Vec<OffsetDateTime>>())
        .fetch_all(connection)
        .await
}

/// The batch's rooms, made where they are new. Asked every time instead of remembered: a database that was
/// restored or emptied meanwhile may give the same number to another room.
async fn rooms(connection: &mut PgConnection, batch: &Batch) -> Result<HashMap<String, i32>, sqlx::Error> {
    let mut names: Vec<&str> = batch.rows.iter().map(|row| row.message.room.as_str()).collect();
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
