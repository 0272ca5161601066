//! Dead letters of hard-deleted messages: found by sender and id, and erased some at a time.
//!
//! The order in which dead letters and deletions are stored does not matter: after writing a dead
//! dead letter we look for the deletion, and after storing a deletion we look for dead letters.

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::types::time::OffsetDateTime;
use sqlx::{FromRow, Row as _};

use crate::erase::Erasure;
use crate::row::Key;
use crate::store::column;
use base::seq::Seq;
use base::time::unix_ms;
use nats::headers::parse_headers;
use protocol::message::{Incoming, Limits};
use timeline::message::message_id_in;

/// Dead letters read at once: at most a mebibyte each.
const PAGE: usize = 50;

/// Dead letters whose message was not identified yet: old ones, and those that `stream-bootstrap`
/// writes.
pub const UNIDENTIFIED: &str = "
    select id, seq, subject, headers, payload, received_at from dead_letters
     where outcome is distinct from 'erased' and sender is null
     order by id limit $1";

const IDENTIFY: &str = "
    update dead_letters set sender = named.sender, message_id = named.message_id
      from unnest($1::bigint[], $2::text[], $3::text[]) as named (id, sender, message_id)
     where dead_letters.id = named.id";

/// Dead letters of these messages after the dead letter $3, whatever an operator did with them: a
/// dropped or retried one still holds the text.
pub const OF_MESSAGES: &str = include_str!("sql/find_dead_letters.sql");

const ERASE: &str = "
    update dead_letters
       set headers = '', payload = '', outcome = 'erased', outcome_at = now(), outcome_seq = null
      from unnest($1::bigint[]) as asked (id)
     where dead_letters.id = asked.id and outcome is distinct from 'erased'";

/// A hard-deleted message.
#[derive(Debug, Clone)]
pub struct Deleted {
    /// Which message.
    pub key: Key,
    /// When the stream received it.
    pub received_at: OffsetDateTime,
}

impl Deleted {
    /// Whether the message `key`, received at this time, is the deleted one. An id derived from the
    /// sequence may mean another message of a recreated stream; only the time distinguishes them.
    pub fn is(&self, key: &Key, received_at: OffsetDateTime) -> bool {
        self.key == *key && (!key.derived || self.received_at == received_at)
    }
}

struct DeadLetterRow {
    id: i64,
    seq: i64,
    subject: String,
    headers: Vec<u8>,
    payload: Vec<u8>,
    received_at: OffsetDateTime,
}

/// Parses some dead letters that were not identified yet, and records sender and id of their
/// messages; whether there may be more.
///
/// # Errors
/// The database's.
pub async fn identify_some(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let letters: Vec<DeadLetterRow> = sqlx::query_as(UNIDENTIFIED)
        .bind(PAGE as i64)
        .fetch_all(&mut *connection)
        .await?;
    if letters.is_empty() {
        return Ok(false);
    }
    let keys: Vec<Option<Key>> = column(&letters, DeadLetterRow::key);
    let part = |of: fn(&Key) -> &str| column(&keys, |key| key.as_ref().map_or("", of));
    sqlx::query(IDENTIFY)
        .bind(column(&letters, |dead_letter| dead_letter.id))
        .bind(part(|key| &key.sender))
        .bind(part(|key| &key.id))
        .execute(connection)
        .await?;
    Ok(letters.len() == PAGE)
}

/// Erases some dead letters of these messages, those after the dead letter `after`. Returns where
/// the stream may still hold the texts, and the dead letter to continue after, if there may be
/// more.
///
/// # Errors
/// The database's.
pub async fn erase_some(
    connection: &mut PgConnection,
    messages: &[Deleted],
    after: i64,
) -> Result<(Vec<Erasure>, Option<i64>), sqlx::Error> {
    let letters: Vec<DeadLetterRow> = sqlx::query_as(OF_MESSAGES)
        .bind(column(messages, |message| message.key.sender.as_str()))
        .bind(column(messages, |message| message.key.id.as_str()))
        .bind(after)
        .bind(PAGE as i64)
        .fetch_all(&mut *connection)
        .await?;
    let next = letters
        .last()
        .filter(|_| letters.len() == PAGE)
        .map(|dead_letter| dead_letter.id);
    let mut ids = Vec::new();
    let mut erasures = Vec::new();
    for dead_letter in &letters {
        // Sender and id may match another message: a client may have chosen the id `seq:7`.
        let Some(key) = dead_letter.key() else {
            continue;
        };
        if messages
            .iter()
            .any(|message| message.is(&key, dead_letter.received_at))
        {
            ids.push(dead_letter.id);
            erasures.push(Erasure::new(Seq::from_i64(dead_letter.seq), key));
        }
    }
    if !ids.is_empty() {
        sqlx::query(ERASE).bind(ids).execute(connection).await?;
    }
    Ok((erasures, next))
}

impl FromRow<'_, PgRow> for DeadLetterRow {
    fn from_row(row: &PgRow) -> Result<DeadLetterRow, sqlx::Error> {
        Ok(DeadLetterRow {
            id: row.try_get("id")?,
            seq: row.try_get("seq")?,
            subject: row.try_get("subject")?,
            headers: row.try_get("headers")?,
            payload: row.try_get("payload")?,
            received_at: row.try_get("received_at")?,
        })
    }
}

impl DeadLetterRow {
    fn key(&self) -> Option<Key> {
        self.message().as_ref().map(Key::of)
    }

    /// The message it holds. The text may have any length: `MAX_TEXT_BYTES` may have been larger
    /// once.
    fn message(&self) -> Option<Incoming> {
        let headers = parse_headers(&self.headers).ok();
        let limits = Limits {
            text_bytes: self.payload.len(),
        };
        let parsed = Incoming::parse(
            &self.subject,
            headers.as_ref().and_then(message_id_in),
            &self.payload,
            Seq::from_i64(self.seq),
            unix_ms(self.received_at),
            limits,
        );
        parsed.ok()
    }
}
