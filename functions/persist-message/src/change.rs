//! Deletions: a tombstone in `messages`, a row in `changes`, and the text out of the dead letters.
//!
//! The tombstone goes by the message's unique key. Where the message is stored, it loses its text; where it is not yet,
//! the tombstone takes its place, and the message will find it there. So the order of arrival does not matter.

use std::collections::HashMap;

use runtime::parse_headers;
use sqlx::postgres::PgConnection;
use sqlx::types::time::OffsetDateTime;
use wire::{Incoming, Limits, Reason, Seq};

use crate::batch::{ChangeRow, instant};
use crate::erase::Erasure;

const TOMBSTONES: &str = "
    insert into messages (seq, room_id, sender, recipient, id, derived, text, sent_at, received_at, deleted)
    select seq, room_id, sender, recipient, id, derived, '', sent_at, received_at, true
      from unnest($1::bigint[], $2::int[], $3::text[], $4::text[], $5::text[], $6::bool[], $7::timestamptz[], $8::timestamptz[])
           as target (seq, room_id, sender, recipient, id, derived, sent_at, received_at)
    on conflict on constraint messages_sender_id_key do update set text = '', deleted = true";

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

const DUPLICATES: &str = "
    select duplicates.seq, sender, id from duplicates
     where (sender, id) in (select * from unnest($1::text[], $2::text[]))";

/// Letters that hold a whole message; for the other reasons there is nothing in them that could have been read.
const LETTERS: &str = "
    select id, seq, subject, headers, payload, received_at from dead_letters
     where outcome is null and reason = any($1::text[])";

const ERASE_LETTERS: &str = "
    update dead_letters set headers = '', payload = '', outcome = 'erased', outcome_at = now() where id = any($1::bigint[])";

const WHOLE: [Reason; 3] = [Reason::SequenceReused, Reason::RefusedByDatabase, Reason::BelowFence];

/// What became of a batch's changes.
#[derive(Debug, Default)]
pub struct Made {
    /// Changes that are new.
    pub new: u64,
    /// Sequences under which another change is stored.
    pub reused: Vec<i64>,
    /// Texts that have to leave the log.
    pub erase: Vec<Erasure>,
}

/// Makes every change.
///
/// # Errors
/// The transaction has failed.
pub async fn make(connection: &mut PgConnection, changes: &[ChangeRow], rooms: &HashMap<String, i32>) -> Result<Made, sqlx::Error> {
    bury(connection, changes, rooms).await?;
    let new = note(connection, changes, rooms).await?;
    let mut made = Made { new, ..Made::default() };
    if new < changes.len() as u64 {
        made.reused = sqlx::query_scalar(REUSED)
            .bind(changes.iter().map(|row| row.change.seq.as_i64()).collect::<Vec<i64>>())
            .bind(changes.iter().map(ChangeRow::received_at).collect::<Vec<OffsetDateTime>>())
            .fetch_all(&mut *connection)
            .await?;
    }
    let hard: Vec<&ChangeRow> = changes.iter().filter(|row| row.is_hard()).collect();
    if !hard.is_empty() {
        made.erase = erasures(connection, &hard).await?;
        made.erase.extend(erase_letters(connection, &hard).await?);
    }
    Ok(made)
}

/// Puts a tombstone in the place of every target.
async fn bury(connection: &mut PgConnection, changes: &[ChangeRow], rooms: &HashMap<String, i32>) -> Result<(), sqlx::Error> {
    // One statement must not meet the same message twice.
    let mut targets: Vec<&ChangeRow> = changes.iter().collect();
    targets.dedup_by(|later, first| later.key() == first.key());
    let of = |row: &&ChangeRow| row.change.deletion.clone();
    sqlx::query(TOMBSTONES)
        .bind(targets.iter().map(|row| row.change.deletion.target.as_i64()).collect::<Vec<i64>>())
        .bind(targets.iter().map(|row| rooms.get(&row.change.room).copied()).collect::<Vec<Option<i32>>>())
        .bind(targets.iter().map(|row| row.key().0).collect::<Vec<&str>>())
        .bind(targets.iter().map(|row| of(row).to).collect::<Vec<Option<String>>>())
        .bind(targets.iter().map(|row| row.key().1).collect::<Vec<&str>>())
        .bind(targets.iter().map(|row| row.key().2).collect::<Vec<bool>>())
        .bind(targets.iter().map(|row| instant(of(row).timestamp)).collect::<Vec<OffsetDateTime>>())
        .bind(targets.iter().map(|row| instant(of(row).received)).collect::<Vec<OffsetDateTime>>())
        .execute(connection)
        .await
        .map(|_| ())
}

async fn note(connection: &mut PgConnection, changes: &[ChangeRow], rooms: &HashMap<String, i32>) -> Result<u64, sqlx::Error> {
    let traced = || changes.iter().filter_map(|row| Some((row.change.seq.as_i64(), row.traceparent.as_deref()?)));
    let new: i64 = sqlx::query_scalar(CHANGES)
        .bind(changes.iter().map(|row| row.change.seq.as_i64()).collect::<Vec<i64>>())
        .bind(changes.iter().map(|row| rooms.get(&row.change.room).copied()).collect::<Vec<Option<i32>>>())
        .bind(changes.iter().map(|row| row.change.deletion.target.as_i64()).collect::<Vec<i64>>())
        .bind(changes.iter().map(|row| row.key().0).collect::<Vec<&str>>())
        .bind(changes.iter().map(|row| row.key().1).collect::<Vec<&str>>())
        .bind(changes.iter().map(|row| row.change.deletion.mode.as_str()).collect::<Vec<&str>>())
        .bind(changes.iter().map(|row| row.change.deletion.by.as_str()).collect::<Vec<&str>>())
        .bind(changes.iter().map(ChangeRow::received_at).collect::<Vec<OffsetDateTime>>())
        .bind(traced().map(|(seq, _)| seq).collect::<Vec<i64>>())
        .bind(traced().map(|(_, traceparent)| traceparent).collect::<Vec<&str>>())
        .bind(changes.iter().map(|row| row.change.deletion.to.as_deref()).collect::<Vec<Option<&str>>>())
        .fetch_one(connection)
        .await?;
    Ok(u64::try_from(new).unwrap_or_default())
}

/// Where the log may hold the texts.
async fn erasures(connection: &mut PgConnection, hard: &[&ChangeRow]) -> Result<Vec<Erasure>, sqlx::Error> {
    let given: Vec<&&ChangeRow> = hard.iter().filter(|row| !row.key().2).collect();
    let copies: Vec<(i64, String, String)> = sqlx::query_as(DUPLICATES)
        .bind(given.iter().map(|row| row.key().0).collect::<Vec<&str>>())
        .bind(given.iter().map(|row| row.key().1).collect::<Vec<&str>>())
        .fetch_all(connection)
        .await?;
    let targets = hard.iter().map(|row| Erasure::of_target(&row.change.deletion));
    Ok(targets.chain(copies.into_iter().map(Erasure::of_duplicate)).collect())
}

/// Empties the letters that hold the texts; the log may still hold them where the letters came from, too.
async fn erase_letters(connection: &mut PgConnection, hard: &[&ChangeRow]) -> Result<Vec<Erasure>, sqlx::Error> {
    type Letter = (i64, i64, String, Vec<u8>, Vec<u8>, OffsetDateTime);
    let reasons: Vec<&str> = WHOLE.iter().map(|reason| reason.as_str()).collect();
    let letters: Vec<Letter> = sqlx::query_as(LETTERS).bind(reasons).fetch_all(&mut *connection).await?;
    let concerned = |(_, seq, subject, headers, payload, received_at): &Letter| {
        let headers = parse_headers(headers).ok();
        let seq = Seq::from_i64(*seq);
        let received_ms = i64::try_from(received_at.unix_timestamp_nanos() / 1_000_000).unwrap_or_default();
        // Whatever the limits are today: a text that was once too long is a text.
        let limits = Limits { text_bytes: payload.len() };
        let message_id = headers.as_ref().and_then(runtime::message_id);
        let message = Incoming::parse(subject, message_id, payload, seq, received_ms, limits).ok()?;
        let is = |row: &&&ChangeRow| {
            let deletion = &row.change.deletion;
            // Without an id, only the time tells it from another message in the same place of a log that was made anew.
            Erasure::of_target(deletion).is(&message) && (!deletion.derived || deletion.received == received_ms)
        };
        hard.iter().find(is).map(|row| Erasure::of_target(&row.change.deletion).at(seq))
    };
    let found: Vec<(i64, Erasure)> = letters.iter().filter_map(|letter| Some((letter.0, concerned(letter)?))).collect();
    let (ids, erasures): (Vec<i64>, Vec<Erasure>) = found.into_iter().unzip();
    if !ids.is_empty() {
        sqlx::query(ERASE_LETTERS).bind(ids).execute(connection).await?;
    }
    Ok(erasures)
}
