//! When direct messages were delivered and read.

use sqlx::types::time::OffsetDateTime;

use base::time::unix_ms;
use postgres::database::Database;
use postgres::error::DatabaseError;
use postgres::span::query_span;
use protocol::message::Message;
use timeline::query::DEADLINE;

/// For each message, when the cursors of its recipient first reached it. A message that was read
/// has been delivered, too.
const TIMES: &str = include_str!("times.sql");

/// Sets on the direct messages of `room` when they were delivered and read, where that is known;
/// nothing while PostgreSQL is away.
///
/// # Errors
/// The deployment's fault, such as a missing table.
pub async fn load_times(
    database: &Database,
    room: &str,
    messages: &mut [Message],
) -> Result<(), DatabaseError> {
    type Times = (Option<OffsetDateTime>, Option<OffsetDateTime>);
    let seqs: Vec<i64> = messages
        .iter()
        .map(|message| message.seq.as_i64())
        .collect();
    let recipients: Vec<Option<&str>> = messages
        .iter()
        .map(|message| message.to.as_deref())
        .collect();
    let times = database.run_if_there(DEADLINE, async |connection| {
        let query = sqlx::query_as::<_, Times>(TIMES)
            .bind(room)
            .bind(&seqs)
            .bind(&recipients);
        query_span("select", "receipt_moves", query.fetch_all(connection)).await
    });
    let times = times.await?.unwrap_or_default();
    for (message, (delivered, read)) in messages.iter_mut().zip(times) {
        message.delivered_at = delivered.map(unix_ms);
        message.read_at = read.map(unix_ms);
    }
    Ok(())
}
