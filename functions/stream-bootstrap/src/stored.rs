//! Which messages of a stream PostgreSQL has stored.

use sqlx::postgres::PgConnection;
use time::OffsetDateTime;

use base::time::from_unix_ms;
use jetstream::stream::StreamMessage;
use protocol::change::Change;
use protocol::message::{Incoming, Limits};
use timeline::message::parse;

const MESSAGES: &str = include_str!("stored_messages.sql");

const CHANGES: &str = "
    select changes.seq from changes
      join unnest($1::bigint[], $2::timestamptz[]) as candidate (seq, received_at)
           using (seq, received_at)";

/// The sequences among `messages` under which PostgreSQL has stored exactly that message.
///
/// # Errors
/// The database does not answer.
pub async fn stored_seqs(
    connection: &mut PgConnection,
    messages: &[&StreamMessage],
    limits: Limits,
) -> Result<Vec<i64>, sqlx::Error> {
    let mut seqs = stored_messages(connection, messages, limits).await?;
    seqs.extend(stored_changes(connection, messages).await?);
    Ok(seqs)
}

async fn stored_messages(
    connection: &mut PgConnection,
    messages: &[&StreamMessage],
    limits: Limits,
) -> Result<Vec<i64>, sqlx::Error> {
    let parse = |message: &&StreamMessage| {
        let incoming = parse(message, limits).ok()?;
        Some((incoming, from_unix_ms(message.received_ms)))
    };
    let parsed: Vec<(Incoming, OffsetDateTime)> = messages.iter().filter_map(parse).collect();
    if parsed.is_empty() {
        return Ok(Vec::new());
    }
    let seqs: Vec<i64> = parsed.iter().map(|(row, _)| row.seq.as_i64()).collect();
    let rooms: Vec<&str> = parsed.iter().map(|(row, _)| row.room.as_str()).collect();
    let senders: Vec<&str> = parsed.iter().map(|(row, _)| row.user.as_str()).collect();
    let ids: Vec<String> = parsed.iter().map(|(row, _)| row.shown_id()).collect();
    let derived: Vec<bool> = parsed.iter().map(|(row, _)| row.id.is_none()).collect();
    let received_at: Vec<OffsetDateTime> = parsed.iter().map(|(_, at)| *at).collect();
    sqlx::query_scalar(MESSAGES)
        .bind(seqs)
        .bind(rooms)
        .bind(senders)
        .bind(ids)
        .bind(derived)
        .bind(received_at)
        .fetch_all(connection)
        .await
}

async fn stored_changes(
    connection: &mut PgConnection,
    messages: &[&StreamMessage],
) -> Result<Vec<i64>, sqlx::Error> {
    let is_change = |message: &&&StreamMessage| {
        Change::parse(
            &message.subject,
            &message.payload,
            message.seq,
            message.received_ms,
        )
        .is_ok()
    };
    let changes: Vec<&&StreamMessage> = messages.iter().filter(is_change).collect();
    if changes.is_empty() {
        return Ok(Vec::new());
    }
    let seqs: Vec<i64> = changes.iter().map(|change| change.seq.as_i64()).collect();
    let received_at: Vec<OffsetDateTime> = changes
        .iter()
        .map(|change| from_unix_ms(change.received_ms))
        .collect();
    sqlx::query_scalar(CHANGES)
        .bind(seqs)
        .bind(received_at)
        .fetch_all(connection)
        .await
}
