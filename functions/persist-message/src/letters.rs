//! Dead letters of messages that are deleted for good: found by sender and id, emptied, some at a time.
//!
//! Whatever order letters and deletions are stored in, the letter is emptied: whoever writes one looks for the deletion
//! afterwards, and whoever stores a deletion looks for letters afterwards. What an operator did about a letter does not matter:
//! a dropped or retried one still holds the text.

use sqlx::postgres::PgConnection;
use sqlx::types::time::OffsetDateTime;

use crate::batch::Key;
use crate::erase::Erasure;
use base::seq::Seq;
use nats::headers::parse_headers;
use protocol::message::{Incoming, Limits};

/// Letters read at once: a mebibyte each at most.
const PAGE: usize = 50;

/// Letters nobody has read yet: those from before there were names, and those that `stream-bootstrap` writes. For other reasons
/// there is nothing in them that could have been read.
pub const UNNAMED: &str = "
    select id, seq, subject, headers, payload, received_at from dead_letters
     where outcome is distinct from 'erased' and sender is null
     order by id limit $1";

const NAME: &str = "
    update dead_letters set sender = named.sender, message_id = named.message_id
      from unnest($1::bigint[], $2::text[], $3::text[]) as named (id, sender, message_id)
     where dead_letters.id = named.id";

pub const OF_MESSAGES: &str = "
    select found.id, seq, subject, headers, payload, received_at
      from unnest($1::text[], $2::text[]) as asked (sender, message_id)
     cross join lateral (
           select id, seq, subject, headers, payload, received_at from dead_letters
            where (dead_letters.sender, dead_letters.message_id) = (asked.sender, asked.message_id)
              and outcome is distinct from 'erased' and dead_letters.sender <> '' and id > $3
           offset 0) as found
     order by found.id limit $4";

const EMPTY: &str = "
    update dead_letters
       set headers = '', payload = '', outcome = 'erased', outcome_at = now(), outcome_seq = null
      from unnest($1::bigint[]) as asked (id)
     where dead_letters.id = asked.id and outcome is distinct from 'erased'";

/// A message that is deleted for good.
#[derive(Debug, Clone)]
pub struct Deleted {
    /// Its name.
    pub key: Key,
    /// When the log took it.
    pub received_at: OffsetDateTime,
}

impl Deleted {
    /// Without an id of its own, only the time tells a message from another one in the same place of a log that was made anew.
    pub fn is(&self, key: &Key, received_at: OffsetDateTime) -> bool {
        self.key == *key && (!key.derived || self.received_at == received_at)
    }
}

type Row = (i64, i64, String, Vec<u8>, Vec<u8>, OffsetDateTime);

/// Reads some of the letters nobody has read yet, and writes down whose they are; whether there may be more.
///
/// # Errors
/// The database's.
pub async fn name_some(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let letters: Vec<Row> = sqlx::query_as(UNNAMED)
        .bind(PAGE as i64)
        .fetch_all(&mut *connection)
        .await?;
    if letters.is_empty() {
        return Ok(false);
    }
    let named: Vec<Option<Key>> = letters
        .iter()
        .map(|letter| message(letter).map(|message| key(&message)))
        .collect();
    let part = |of: fn(&Key) -> &str| {
        named
            .iter()
            .map(|key| key.as_ref().map_or("", of))
            .collect::<Vec<&str>>()
    };
    sqlx::query(NAME)
        .bind(letters.iter().map(|letter| letter.0).collect::<Vec<i64>>())
        .bind(part(|key| &key.sender))
        .bind(part(|key| &key.id))
        .execute(connection)
        .await?;
    Ok(letters.len() == PAGE)
}

/// Empties some of the letters of these messages behind the letter `after`; the log may still hold the texts where the letters
/// came from. And the letter to go on after, where there may be more.
///
/// # Errors
/// The database's.
pub async fn empty_some(
    connection: &mut PgConnection,
    messages: &[Deleted],
    after: i64,
) -> Result<(Vec<Erasure>, Option<i64>), sqlx::Error> {
    let letters: Vec<Row> = sqlx::query_as(OF_MESSAGES)
        .bind(
            messages
                .iter()
                .map(|message| message.key.sender.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(
            messages
                .iter()
                .map(|message| message.key.id.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(after)
        .bind(PAGE as i64)
        .fetch_all(&mut *connection)
        .await?;
    let next = letters
        .last()
        .filter(|_| letters.len() == PAGE)
        .map(|letter| letter.0);
    // A key names more than is meant: somebody may have chosen the id `seq:7`.
    let meant = |letter: &Row| {
        let named = key(&message(letter)?);
        let meant = messages.iter().any(|message| message.is(&named, letter.5));
        meant.then(|| (letter.0, Erasure::new(Seq::from_i64(letter.1), named)))
    };
    let (ids, erasures): (Vec<i64>, Vec<Erasure>) = letters.iter().filter_map(meant).unzip();
    if !ids.is_empty() {
        sqlx::query(EMPTY).bind(ids).execute(connection).await?;
    }
    Ok((erasures, next))
}

fn key(message: &Incoming) -> Key {
    Key {
        sender: message.user.clone(),
        id: message.shown_id(),
        derived: message.id.is_none(),
    }
}

/// The message a letter holds, whatever the limits are today: a text that was once too long is a text.
fn message((_, seq, subject, headers, payload, received_at): &Row) -> Option<Incoming> {
    let headers = parse_headers(headers).ok();
    let received_ms =
        i64::try_from(received_at.unix_timestamp_nanos() / 1_000_000).unwrap_or_default();
    let limits = Limits {
        text_bytes: payload.len(),
    };
    let message_id = headers.as_ref().and_then(timeline::message::message_id_in);
    Incoming::parse(
        subject,
        message_id,
        payload,
        Seq::from_i64(*seq),
        received_ms,
        limits,
    )
    .ok()
}
