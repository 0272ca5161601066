//! Appends salvaged messages to the stream again: the dead letters with reason `below_fence` and
//! without an outcome.

use std::time::Duration;

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Connection as _, FromRow, Row as _};
use time::OffsetDateTime;

use crate::deletions::{Deletions, Moved};
use crate::error::Error;
use crate::stored::stored_seqs;
use base::seq::Seq;
use base::time::unix_ms;
use jetstream::append::AppendError;
use jetstream::stream::{StreamMessage, StreamReader};
use nats::connection::Connection;
use nats::headers::parse_headers;
use protocol::header;
use protocol::message::{Incoming, Limits};
use protocol::reason::Reason;
use timeline::append_again::{Again, append_again};
use timeline::message::parse;

/// Dead letters read together; each may be as large as `max_payload`.
const CHUNK: i64 = 16;
const ACK_TIMEOUT: Duration = Duration::from_secs(5);

/// Ordered by the dead letter's number: those salvaged earlier come first, and those salvaged
/// together keep the order of their stream. An outcome says that it must not be appended.
const WAITING: &str = "
    select id, seq, subject, headers, payload, received_at,
           encode(sha256(sha256(headers) || sha256(payload)), 'hex') as digest
      from dead_letters where reason = $1 and outcome is null order by id limit $2";

const WAITING_COUNT: &str =
    "select count(*) from dead_letters where reason = $1 and outcome is null";

/// The row stays locked until the message is in the stream: an erasure has to wait for that, or the
/// message is not appended.
const LOCK: &str = "select id from dead_letters where id = $1 and outcome is null for update";

const CHANGE_REASON: &str = "
    with dead_letter as (delete from dead_letters where id = $1 returning *)
    insert into dead_letters (seq, subject, headers, payload, reason, detail, received_at)
    select seq, subject, headers, payload, $2, $3, received_at from dead_letter
    on conflict do nothing";

/// A dead letter that waits to be appended again.
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

impl DeadLetter {
    fn message(&self) -> StreamMessage {
        StreamMessage {
            seq: Seq::from_i64(self.seq),
            subject: self.subject.clone(),
            headers: parse_headers(&self.headers).ok(),
            payload: self.payload.clone().into(),
            received_ms: unix_ms(self.received_at),
        }
    }

    /// The `Nats-Msg-Id` it is appended with: always the same for the same dead letter, whichever
    /// replica appends it.
    fn message_id(&self) -> String {
        format!("fence:{}:{}", self.seq, self.digest)
    }
}

/// How many dead letters wait to be appended again.
///
/// # Errors
/// The database does not answer.
pub async fn count_waiting(connection: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(WAITING_COUNT)
        .bind(Reason::BelowFence.as_str())
        .fetch_one(connection)
        .await
}

/// Appends every waiting dead letter to the stream, in order, and removes it when the stream has
/// acknowledged it; returns what was done.
///
/// # Errors
/// The stream does not accept a message now, or the database does not answer. What is left waits
/// for the next attempt.
pub async fn reappend(
    stream: &StreamReader,
    nats: &Connection,
    connection: &mut PgConnection,
    limits: Limits,
) -> Result<Vec<String>, Error> {
    let mut reappender = Reappender {
        stream,
        nats,
        limits,
        deletions: Deletions::waiting(connection).await?,
        is_first: true,
        appended: 0,
        refused: 0,
    };
    loop {
        let dead_letters: Vec<DeadLetter> = sqlx::query_as(WAITING)
            .bind(Reason::BelowFence.as_str())
            .bind(CHUNK)
            .fetch_all(&mut *connection)
            .await?;
        if dead_letters.is_empty() {
            return Ok(reappender.done());
        }
        for dead_letter in dead_letters {
            if reappender.process(connection, &dead_letter).await? {
                // The rewritten deletions may be among the dead letters that were read already.
                reappender.deletions = Deletions::waiting(connection).await?;
                break;
            }
        }
    }
}

/// The state of one pass over the waiting dead letters.
struct Reappender<'a> {
    stream: &'a StreamReader,
    nats: &'a Connection,
    limits: Limits,
    deletions: Deletions,
    is_first: bool,
    appended: u64,
    refused: u64,
}

impl Reappender<'_> {
    /// Handles one dead letter in one transaction; returns whether its deletions were rewritten.
    async fn process(
        &mut self,
        connection: &mut PgConnection,
        dead_letter: &DeadLetter,
    ) -> Result<bool, Error> {
        // Only the first one can be in the stream already: a replica died after it had appended it
        // and before it removed it here.
        let existing = if std::mem::take(&mut self.is_first) {
            find_appended(self.stream, dead_letter).await?
        } else {
            None
        };
        let mut transaction = connection.begin().await?;
        let locked = sqlx::query(LOCK)
            .bind(dead_letter.id)
            .fetch_optional(&mut *transaction)
            .await?;
        if locked.is_none() {
            // It got an outcome since it was read.
            return Ok(false);
        }
        let appended = match existing {
            Some(seq) => Ok(Some(seq)),
            // A worker may have stored the message while it was being salvaged.
            None if is_stored(&mut transaction, dead_letter, self.limits).await? => Ok(None),
            None => publish(self.nats, dead_letter).await?.map(Some),
        };
        self.appended += u64::from(existing.is_none() && matches!(appended, Ok(Some(_))));
        let rewritten = match appended {
            Ok(Some(seq)) => self.settle(&mut transaction, dead_letter, seq).await?,
            Ok(None) => {
                remove(&mut transaction, dead_letter).await?;
                false
            }
            Err((reason, detail)) => {
                sqlx::query(CHANGE_REASON)
                    .bind(dead_letter.id)
                    .bind(reason.as_str())
                    .bind(detail)
                    .execute(&mut *transaction)
                    .await?;
                self.refused += 1;
                false
            }
        };
        transaction.commit().await?;
        Ok(rewritten)
    }

    /// Removes a dead letter that is in the stream again, at `seq`, and rewrites its deletions so
    /// that they name that sequence; returns whether there were any. The caller's transaction makes
    /// sure that both happen, or neither.
    async fn settle(
        &self,
        connection: &mut PgConnection,
        dead_letter: &DeadLetter,
        seq: Seq,
    ) -> Result<bool, Error> {
        let message = dead_letter.message();
        let Ok(Incoming { room, user, id, .. }) = &parse(&message, self.limits) else {
            remove(connection, dead_letter).await?;
            return Ok(false);
        };
        let moved = Moved {
            room,
            sender: user,
            id: id.as_deref(),
            from: message.seq,
            received_ms: message.received_ms,
        };
        if !self.deletions.include(&moved) {
            remove(connection, dead_letter).await?;
            return Ok(false);
        }
        // The deletion has to name the new time of receipt too, because workers distinguish
        // messages with the same sequence apart by it.
        let received_ms = self
            .stream
            .next(&dead_letter.subject, seq)
            .await?
            .map_or(moved.received_ms, |raw| raw.message.received_ms);
        self.deletions
            .rewrite(connection, &moved, seq, received_ms)
            .await?;
        remove(connection, dead_letter).await?;
        Ok(true)
    }

    fn done(&self) -> Vec<String> {
        let mut done = Vec::new();
        if self.appended > 0 {
            done.push(format!(
                "{} messages were appended again above the sequence guard",
                self.appended
            ));
        }
        if self.refused > 0 {
            done.push(format!(
                "{} messages from below the sequence guard cannot be appended again and stay dead \
                 letters",
                self.refused
            ));
        }
        done
    }
}

async fn is_stored(
    connection: &mut PgConnection,
    dead_letter: &DeadLetter,
    limits: Limits,
) -> Result<bool, Error> {
    let stored = stored_seqs(connection, &[&dead_letter.message()], limits).await?;
    Ok(!stored.is_empty())
}

/// Where the stream holds the dead letter already. A message that was appended again is higher than
/// everything that was purged, so a search from the dead letter's own sequence finds it.
async fn find_appended(
    stream: &StreamReader,
    dead_letter: &DeadLetter,
) -> Result<Option<Seq>, Error> {
    let wanted = dead_letter.message_id();
    let mut from = Seq::from_i64(dead_letter.seq).next();
    while let Some(raw) = stream.next(&dead_letter.subject, from).await? {
        let id = raw
            .message
            .headers
            .as_ref()
            .and_then(|headers| headers.get(header::MESSAGE_ID));
        if id.is_some_and(|id| id.as_str() == wanted) {
            return Ok(Some(raw.message.seq));
        }
        from = raw.message.seq.next();
    }
    Ok(None)
}

async fn remove(
    connection: &mut PgConnection,
    dead_letter: &DeadLetter,
) -> Result<(), sqlx::Error> {
    sqlx::query("delete from dead_letters where id = $1")
        .bind(dead_letter.id)
        .execute(connection)
        .await
        .map(|_| ())
}

/// Appends one dead letter; returns its new sequence, or why it can never be appended.
async fn publish(
    nats: &Connection,
    dead_letter: &DeadLetter,
) -> Result<Result<Seq, (Reason, String)>, Error> {
    let message_id = dead_letter.message_id();
    let again = Again {
        subject: &dead_letter.subject,
        headers: &dead_letter.headers,
        payload: &dead_letter.payload,
        message_id: &message_id,
        // Empty: a message without an id of its own gets one from its sequence, as before.
        unnamed: "",
    };
    match append_again(nats, again, ACK_TIMEOUT).await {
        Ok(seq) => Ok(Ok(seq)),
        Err(AppendError::MalformedHeaders(_)) => Ok(Err((Reason::MalformedHeaders, String::new()))),
        Err(AppendError::TooLarge(why)) => Ok(Err((Reason::PayloadTooLarge, why))),
        Err(error) => Err(Error::DeadLettersWaiting(error.to_string())),
    }
}
