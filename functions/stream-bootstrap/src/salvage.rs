//! Salvage: saves what a restored stream holds and nobody stored, before the sequence guard purges
//! it.
//!
//! Such messages become dead letters with reason `below_fence`, until [`crate::reappend`] appends
//! them to the stream again.

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{FromRow, Row as _};
use time::OffsetDateTime;

use crate::error::Error;
use crate::stored::stored_seqs;
use base::subject::overlap;
use base::time::from_unix_ms;
use jetstream::stream::{RawMessage, StreamMessage};
use nats::headers::parse_headers;
use protocol::message::Limits;
use protocol::reason::Reason;

/// Dead letters that are not appended again: those with another reason, and those with an outcome.
const FINAL_DEAD_LETTERS: &str = "
    select seq, headers, payload, received_at, outcome is not distinct from 'erased' as erased
      from dead_letters where seq = any($1::bigint[]) and (reason <> $2 or outcome is not null)";

const INSERT: &str = "
    insert into dead_letters (seq, subject, headers, payload, reason, received_at)
    select * from unnest($1::bigint[], $2::text[], $3::bytea[], $4::bytea[], $5::text[],
                         $6::timestamptz[])
        as salvaged (seq, subject, headers, payload, reason, received_at)
     order by seq
    on conflict do nothing";

/// A dead letter that is not appended again.
struct FinalDeadLetter {
    seq: i64,
    headers: Vec<u8>,
    payload: Vec<u8>,
    received_at: OffsetDateTime,
    erased: bool,
}

impl FromRow<'_, PgRow> for FinalDeadLetter {
    fn from_row(row: &PgRow) -> Result<FinalDeadLetter, sqlx::Error> {
        Ok(FinalDeadLetter {
            seq: row.try_get("seq")?,
            headers: row.try_get("headers")?,
            payload: row.try_get("payload")?,
            received_at: row.try_get("received_at")?,
            erased: row.try_get("erased")?,
        })
    }
}

/// Saves those of `messages` that are not stored as dead letters; returns how many are new. A
/// message that cannot be published again as it is gets the reason for that, and stays.
///
/// # Errors
/// The database does not answer.
pub async fn save_unstored(
    connection: &mut PgConnection,
    messages: &[RawMessage],
    stream_subjects: &[String],
    limits: Limits,
) -> Result<u64, Error> {
    let readable: Vec<&StreamMessage> = messages
        .iter()
        .filter(|raw| !raw.malformed)
        .map(|raw| &raw.message)
        .collect();
    let mut known = stored_seqs(connection, &readable, limits).await?;
    known.extend(dead_lettered_seqs(connection, messages).await?);
    let unstored: Vec<&RawMessage> = messages
        .iter()
        .filter(|raw| !known.contains(&raw.message.seq.as_i64()))
        .collect();
    if unstored.is_empty() {
        return Ok(0);
    }
    insert(connection, &unstored, stream_subjects).await
}

async fn insert(
    connection: &mut PgConnection,
    messages: &[&RawMessage],
    stream_subjects: &[String],
) -> Result<u64, Error> {
    let seqs: Vec<i64> = messages
        .iter()
        .map(|raw| raw.message.seq.as_i64())
        .collect();
    let subjects: Vec<String> = messages
        .iter()
        .map(|raw| raw.message.subject.replace('\0', "\u{fffd}"))
        .collect();
    let headers: Vec<&[u8]> = messages
        .iter()
        .map(|raw| raw.header_block.as_slice())
        .collect();
    let payloads: Vec<&[u8]> = messages
        .iter()
        .map(|raw| raw.message.payload.as_ref())
        .collect();
    let reasons: Vec<&str> = messages
        .iter()
        .map(|raw| reason(raw, stream_subjects).as_str())
        .collect();
    let received_at: Vec<OffsetDateTime> = messages
        .iter()
        .map(|raw| from_unix_ms(raw.message.received_ms))
        .collect();
    let inserted = sqlx::query(INSERT)
        .bind(seqs)
        .bind(subjects)
        .bind(headers)
        .bind(payloads)
        .bind(reasons)
        .bind(received_at)
        .execute(connection)
        .await?;
    Ok(inserted.rows_affected())
}

/// The sequences of those messages that are dead letters already, other than waiting ones.
async fn dead_lettered_seqs(
    connection: &mut PgConnection,
    messages: &[RawMessage],
) -> Result<Vec<i64>, sqlx::Error> {
    let seqs: Vec<i64> = messages
        .iter()
        .map(|raw| raw.message.seq.as_i64())
        .collect();
    let dead_letters: Vec<FinalDeadLetter> = sqlx::query_as(FINAL_DEAD_LETTERS)
        .bind(seqs)
        .bind(Reason::BelowFence.as_str())
        .fetch_all(connection)
        .await?;
    let known = messages.iter().filter(|raw| {
        dead_letters
            .iter()
            .any(|dead_letter| is_same(raw, dead_letter))
    });
    Ok(known.map(|raw| raw.message.seq.as_i64()).collect())
}

fn is_same(raw: &RawMessage, dead_letter: &FinalDeadLetter) -> bool {
    if dead_letter.seq != raw.message.seq.as_i64() {
        return false;
    }
    // An erased dead letter has lost its bytes, and they must not come back from an old stream. Its
    // sequence and its time of receipt are what is left to compare.
    if dead_letter.erased {
        return dead_letter.received_at == from_unix_ms(raw.message.received_ms);
    }
    // A worker writes the headers it parsed: the same lines, but not always the same bytes.
    let same_headers = || {
        dead_letter.headers == raw.header_block
            || (!raw.malformed && parse_headers(&dead_letter.headers).ok() == raw.message.headers)
    };
    dead_letter.payload == raw.message.payload && same_headers()
}

/// `below_fence` for a message that can be published again as it is, otherwise why it cannot.
fn reason(raw: &RawMessage, stream_subjects: &[String]) -> Reason {
    let subject = &raw.message.subject;
    let is_captured = !subject.split('.').any(str::is_empty)
        && stream_subjects
            .iter()
            .any(|pattern| overlap(pattern, subject));
    if raw.malformed && (raw.header_block.is_empty() || parse_headers(&raw.header_block).is_ok()) {
        Reason::MalformedSubject
    } else if raw.malformed {
        Reason::MalformedHeaders
    } else if subject.contains('\0') {
        Reason::NulInSubject
    } else if !is_captured {
        Reason::UnsupportedSubject
    } else {
        Reason::BelowFence
    }
}
