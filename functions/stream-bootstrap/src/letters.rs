//! Messages taken from below the fence: dead letters with reason `below_fence`, until they are appended again.

use std::time::Duration;

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Connection as _, FromRow, Row};
use time::OffsetDateTime;

use crate::deletions::{Deletions, Moved};
use crate::trouble::Trouble;
use base::seq::Seq;
use base::subject::overlap;
use jetstream::append::AppendError;
use jetstream::stream::{RawMessage, StreamMessage, StreamReader};
use nats::connection::Connection;
use nats::headers::parse_headers;
use protocol::change::Change;
use protocol::header;
use protocol::message::{Incoming, Limits};
use protocol::reason::Reason;
use timeline::append_again::{Again, append_again};
use timeline::message::parse;

/// Letters read at once; each may weigh `max_payload`.
const CHUNK: i64 = 16;
const ACK_TIMEOUT: Duration = Duration::from_secs(5);

/// A message is stored when its row is there, or one of the same sender and id. Its row is the one with its
/// place, author and the log's own time of receipt. Not its text: that may have been erased since, and must not come
/// back; and whoever said "hello" in the same place of the lost log and of this one said it twice. A message is stored
/// as well when its deletion is: by its id where it has one of its own (the tombstone is a row), else by its place.
const STORED: &str = "
    select asked.seq
      from unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::bool[], $6::timestamptz[])
           as asked (seq, room, sender, id, derived, received_at)
     where exists (
               select from messages join rooms on rooms.id = messages.room_id
                where messages.seq = asked.seq and rooms.name = asked.room and messages.received_at = asked.received_at
                  and (messages.sender, messages.id, messages.derived) = (asked.sender, asked.id, asked.derived))
        or not asked.derived and exists (
               select from messages
                where (messages.sender, messages.id, messages.derived) = (asked.sender, asked.id, false))
        or asked.derived and exists (
               select from changes join rooms on rooms.id = changes.room_id
                where (changes.target, changes.sender, changes.id, rooms.name) = (asked.seq, asked.sender, asked.id, asked.room))
           and not exists (
               select from messages where messages.seq = asked.seq and messages.received_at <> asked.received_at)";

const CHANGES_STORED: &str = "
    select changes.seq from changes
      join unnest($1::bigint[], $2::timestamptz[]) as asked (seq, received_at) using (seq, received_at)";

/// Letters that stay: those of another reason, and those with an outcome.
const LETTERS_AT: &str = "
    select seq, headers, payload, received_at, outcome is not distinct from 'erased' as erased
      from dead_letters where seq = any($1::bigint[]) and (reason <> $2 or outcome is not null)";

const TAKE: &str = "
    insert into dead_letters (seq, subject, headers, payload, reason, received_at)
    select * from unnest($1::bigint[], $2::text[], $3::bytea[], $4::bytea[], $5::text[], $6::timestamptz[])
        as taken (seq, subject, headers, payload, reason, received_at)
     order by seq
    on conflict do nothing";

/// By number of the letter: letters of an earlier fence come first, then each in the order of its log. Whoever gave a
/// letter an outcome decided that it is not appended.
const WAITING: &str = "
    select id, seq, subject, headers, payload, received_at,
           encode(sha256(sha256(headers) || sha256(payload)), 'hex') as digest
      from dead_letters where reason = $1 and outcome is null order by id limit $2";

/// Held until the log has it: whoever erases a letter waits, or it is not appended.
const HOLD: &str = "select id from dead_letters where id = $1 and outcome is null for update";

const WAITING_COUNT: &str =
    "select count(*) from dead_letters where reason = $1 and outcome is null";

const SET_ASIDE: &str = "
    with letter as (delete from dead_letters where id = $1 returning *)
    insert into dead_letters (seq, subject, headers, payload, reason, detail, received_at)
    select seq, subject, headers, payload, $2, $3, received_at from letter
    on conflict do nothing";

/// A letter that waits.
struct DeadLetter {
    id: i64,
    seq: i64,
    subject: String,
    headers: Vec<u8>,
    payload: Vec<u8>,
    received_at: OffsetDateTime,
    digest: String,
}

impl FromRow<'_, PgRow> for DeadLetter {
    fn from_row(row: &PgRow) -> Result<DeadLetter, sqlx::Error> {
        Ok(DeadLetter {
            id: row.try_get("id")?,
            seq: row.try_get("seq")?,
            subject: row.try_get("subject")?,
            headers: row.try_get("headers")?,
            payload: row.try_get("payload")?,
            received_at: row.try_get("received_at")?,
            digest: row.try_get("digest")?,
        })
    }
}

/// A letter that stays.
struct Kept {
    seq: i64,
    headers: Vec<u8>,
    payload: Vec<u8>,
    received_at: OffsetDateTime,
    erased: bool,
}

impl FromRow<'_, PgRow> for Kept {
    fn from_row(row: &PgRow) -> Result<Kept, sqlx::Error> {
        Ok(Kept {
            seq: row.try_get("seq")?,
            headers: row.try_get("headers")?,
            payload: row.try_get("payload")?,
            received_at: row.try_get("received_at")?,
            erased: row.try_get("erased")?,
        })
    }
}

impl DeadLetter {
    fn message(&self) -> StreamMessage {
        StreamMessage {
            seq: Seq::from_i64(self.seq),
            subject: self.subject.clone(),
            headers: parse_headers(&self.headers).ok(),
            payload: self.payload.clone().into(),
            received_ms: i64::try_from(self.received_at.unix_timestamp_nanos() / 1_000_000)
                .unwrap_or_default(),
        }
    }
}

/// How many letters wait to be appended again.
///
/// # Errors
/// The database does not answer.
pub async fn waiting(connection: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(WAITING_COUNT)
        .bind(Reason::BelowFence.as_str())
        .fetch_one(connection)
        .await
}

/// Writes those of `found` that nobody stored to the dead letters; how many are new there. What cannot be
/// appended again at all stays there for its own reason.
///
/// # Errors
/// The database does not answer.
pub async fn take(
    connection: &mut PgConnection,
    found: &[RawMessage],
    stream_subjects: &[String],
    limits: Limits,
) -> Result<u64, Trouble> {
    let messages: Vec<&StreamMessage> = found
        .iter()
        .filter(|raw| !raw.malformed)
        .map(|raw| &raw.message)
        .collect();
    let mut known = stored(connection, &messages, limits).await?;
    known.extend(dead(connection, found).await?);
    let left: Vec<&RawMessage> = found
        .iter()
        .filter(|raw| !known.contains(&raw.message.seq.as_i64()))
        .collect();
    if left.is_empty() {
        return Ok(0);
    }
    let taken = sqlx::query(TAKE)
        .bind(
            left.iter()
                .map(|raw| raw.message.seq.as_i64())
                .collect::<Vec<i64>>(),
        )
        .bind(
            left.iter()
                .map(|raw| raw.message.subject.replace('\0', "\u{fffd}"))
                .collect::<Vec<String>>(),
        )
        .bind(
            left.iter()
                .map(|raw| raw.header_block.as_slice())
                .collect::<Vec<&[u8]>>(),
        )
        .bind(
            left.iter()
                .map(|raw| raw.message.payload.as_ref())
                .collect::<Vec<&[u8]>>(),
        )
        .bind(
            left.iter()
                .map(|raw| reason(raw, stream_subjects).as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            left.iter()
                .map(|raw| instant(raw.message.received_ms))
                .collect::<Vec<OffsetDateTime>>(),
        )
        .execute(connection)
        .await?;
    Ok(taken.rows_affected())
}

/// Appends every waiting letter to the log, in order, and removes it when the log has it; says what was done.
///
/// # Errors
/// The log does not take a message now, or the database does not answer. What is left waits for the next time.
pub async fn append(
    log: &StreamReader,
    nats: &Connection,
    connection: &mut PgConnection,
    limits: Limits,
) -> Result<Vec<String>, Trouble> {
    let (mut appended, mut aside, mut first) = (0_u64, 0_u64, true);
    let mut deletions = Deletions::waiting(connection).await?;
    loop {
        let letters: Vec<DeadLetter> = sqlx::query_as(WAITING)
            .bind(Reason::BelowFence.as_str())
            .bind(CHUNK)
            .fetch_all(&mut *connection)
            .await?;
        if letters.is_empty() {
            break;
        }
        for letter in letters {
            // Only the first one can be in the log already: whoever appended it died before removing the letter.
            let there = if std::mem::take(&mut first) {
                appended_at(log, &letter).await?
            } else {
                None
            };
            let mut held = connection.begin().await?;
            if sqlx::query(HOLD)
                .bind(letter.id)
                .fetch_optional(&mut *held)
                .await?
                .is_none()
            {
                // It got an outcome since it was read.
                continue;
            }
            let place = match there {
                Some(place) => Ok(Some(place)),
                None if is_stored(&mut held, &letter, limits).await? => Ok(None),
                None => publish(nats, &letter).await?.map(Some),
            };
            appended += u64::from(there.is_none() && matches!(place, Ok(Some(_))));
            let followed = match place {
                Ok(Some(place)) => {
                    settle(log, &mut held, &letter, place, &deletions, limits).await?
                }
                Ok(None) => remove(&mut held, &letter).await.map(|()| false)?,
                Err((reason, detail)) => {
                    sqlx::query(SET_ASIDE)
                        .bind(letter.id)
                        .bind(reason.as_str())
                        .bind(detail)
                        .execute(&mut *held)
                        .await?;
                    aside += 1;
                    false
                }
            };
            held.commit().await?;
            if followed {
                // They may be among those that were read already.
                deletions = Deletions::waiting(connection).await?;
                break;
            }
        }
    }
    let mut done = Vec::new();
    if appended > 0 {
        done.push(format!(
            "{appended} messages were appended again above the fence"
        ));
    }
    if aside > 0 {
        done.push(format!("{aside} messages from below the fence cannot be appended again and stay in the dead letters"));
    }
    Ok(done)
}

/// Removes a letter that stands in the log again, at `place`, and lets its deletions follow it there; whether there were
/// any. Within one transaction: both or neither.
async fn settle(
    log: &StreamReader,
    connection: &mut PgConnection,
    letter: &DeadLetter,
    place: Seq,
    deletions: &Deletions,
    limits: Limits,
) -> Result<bool, Trouble> {
    let message = letter.message();
    let Ok(parsed) = parse(&message, limits) else {
        remove(connection, letter).await?;
        return Ok(false);
    };
    let Incoming { room, user, id, .. } = &parsed;
    let moved = Moved {
        room,
        sender: user,
        id: id.as_deref(),
        from: message.seq,
        received_ms: message.received_ms,
    };
    if !deletions.concern(&moved) {
        remove(connection, letter).await?;
        return Ok(false);
    }
    // Its time of receipt is another now, and whoever stores tells messages apart by it.
    let received_ms = log
        .next(&letter.subject, place)
        .await?
        .map_or(moved.received_ms, |raw| raw.message.received_ms);
    deletions
        .follow(connection, &moved, place, received_ms)
        .await?;
    remove(connection, letter).await?;
    Ok(true)
}

/// The sequences among `messages` under which PostgreSQL has that very message.
async fn stored(
    connection: &mut PgConnection,
    messages: &[&StreamMessage],
    limits: Limits,
) -> Result<Vec<i64>, sqlx::Error> {
    let mut known = stored_messages(connection, messages, limits).await?;
    let changes: Vec<&&StreamMessage> = messages
        .iter()
        .filter(|message| {
            Change::parse(
                &message.subject,
                &message.payload,
                message.seq,
                message.received_ms,
            )
            .is_ok()
        })
        .collect();
    if !changes.is_empty() {
        let found: Vec<i64> = sqlx::query_scalar(CHANGES_STORED)
            .bind(
                changes
                    .iter()
                    .map(|change| change.seq.as_i64())
                    .collect::<Vec<i64>>(),
            )
            .bind(
                changes
                    .iter()
                    .map(|change| instant(change.received_ms))
                    .collect::<Vec<OffsetDateTime>>(),
            )
            .fetch_all(connection)
            .await?;
        known.extend(found);
    }
    Ok(known)
}

async fn stored_messages(
    connection: &mut PgConnection,
    messages: &[&StreamMessage],
    limits: Limits,
) -> Result<Vec<i64>, sqlx::Error> {
    let read = |message: &&StreamMessage| {
        let parsed = parse(message, limits).ok()?;
        Some((parsed, instant(message.received_ms)))
    };
    let rows: Vec<(Incoming, OffsetDateTime)> = messages.iter().filter_map(read).collect();
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    sqlx::query_scalar(STORED)
        .bind(
            rows.iter()
                .map(|(row, _)| row.seq.as_i64())
                .collect::<Vec<i64>>(),
        )
        .bind(
            rows.iter()
                .map(|(row, _)| row.room.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            rows.iter()
                .map(|(row, _)| row.user.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            rows.iter()
                .map(|(row, _)| row.shown_id())
                .collect::<Vec<String>>(),
        )
        .bind(
            rows.iter()
                .map(|(row, _)| row.id.is_none())
                .collect::<Vec<bool>>(),
        )
        .bind(
            rows.iter()
                .map(|(_, received_at)| *received_at)
                .collect::<Vec<OffsetDateTime>>(),
        )
        .fetch_all(connection)
        .await
}

/// The sequences among `found` under which a dead letter, other than a waiting one, holds the same message.
async fn dead(
    connection: &mut PgConnection,
    found: &[RawMessage],
) -> Result<Vec<i64>, sqlx::Error> {
    let seqs: Vec<i64> = found.iter().map(|raw| raw.message.seq.as_i64()).collect();
    let letters: Vec<Kept> = sqlx::query_as(LETTERS_AT)
        .bind(seqs)
        .bind(Reason::BelowFence.as_str())
        .fetch_all(connection)
        .await?;
    let same = |raw: &RawMessage, letter: &Kept| {
        // A worker writes headers as it read them: same lines, not always the same bytes.
        let headers = || {
            letter.headers == raw.header_block
                || (!raw.malformed && parse_headers(&letter.headers).ok() == raw.message.headers)
        };
        // Of an erased letter the bytes are gone, and must not come back out of an old log: its place and time are left.
        let bytes = || {
            if letter.erased {
                letter.received_at == instant(raw.message.received_ms)
            } else {
                letter.payload == raw.message.payload && headers()
            }
        };
        letter.seq == raw.message.seq.as_i64() && bytes()
    };
    let known = found
        .iter()
        .filter(|raw| letters.iter().any(|letter| same(raw, letter)));
    Ok(known.map(|raw| raw.message.seq.as_i64()).collect())
}

/// `below_fence` for what can be published again as it is, else why it cannot.
fn reason(raw: &RawMessage, stream_subjects: &[String]) -> Reason {
    let subject = &raw.message.subject;
    let taken_in = !subject.split('.').any(str::is_empty)
        && stream_subjects
            .iter()
            .any(|pattern| overlap(pattern, subject));
    if raw.malformed && (raw.header_block.is_empty() || parse_headers(&raw.header_block).is_ok()) {
        Reason::MalformedSubject
    } else if raw.malformed {
        Reason::MalformedHeaders
    } else if subject.contains('\0') {
        Reason::NulInSubject
    } else if !taken_in {
        Reason::UnsupportedSubject
    } else {
        Reason::BelowFence
    }
}

/// A worker may have held the message while it was being taken.
async fn is_stored(
    connection: &mut PgConnection,
    letter: &DeadLetter,
    limits: Limits,
) -> Result<bool, Trouble> {
    Ok(!stored(connection, &[&letter.message()], limits)
        .await?
        .is_empty())
}

/// Where the log holds the letter already. What was appended again lies above everything that was purged, so
/// looking from the letter's own sequence on finds it.
async fn appended_at(log: &StreamReader, letter: &DeadLetter) -> Result<Option<Seq>, Trouble> {
    let mut from = Seq::from_i64(letter.seq).next();
    while let Some(raw) = log.next(&letter.subject, from).await? {
        let id = raw
            .message
            .headers
            .as_ref()
            .and_then(|headers| headers.get(header::MESSAGE_ID));
        if id.is_some_and(|id| id.as_str() == fence_id(letter)) {
            return Ok(Some(raw.message.seq));
        }
        from = raw.message.seq.next();
    }
    Ok(None)
}

async fn remove(connection: &mut PgConnection, letter: &DeadLetter) -> Result<(), sqlx::Error> {
    sqlx::query("delete from dead_letters where id = $1")
        .bind(letter.id)
        .execute(connection)
        .await
        .map(|_| ())
}

/// Appends one letter and says where it is now, or why that can never be.
async fn publish(
    nats: &Connection,
    letter: &DeadLetter,
) -> Result<Result<Seq, (Reason, String)>, Trouble> {
    let id = fence_id(letter);
    // Empty: its sequence shall serve as its id, as before.
    let again = Again {
        subject: &letter.subject,
        headers: &letter.headers,
        payload: &letter.payload,
        message_id: &id,
        unnamed: "",
    };
    match append_again(nats, again, ACK_TIMEOUT).await {
        Ok(place) => Ok(Ok(place)),
        Err(AppendError::MalformedHeaders(_)) => Ok(Err((Reason::MalformedHeaders, String::new()))),
        Err(AppendError::TooLarge(why)) => Ok(Err((Reason::PayloadTooLarge, why))),
        Err(error) => Err(Trouble::LettersWait(error.to_string())),
    }
}

/// The same for the same letter, whoever sends it.
fn fence_id(letter: &DeadLetter) -> String {
    format!("fence:{}:{}", letter.seq, letter.digest)
}

/// Unix milliseconds as a point in time.
pub fn instant(ms: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}
