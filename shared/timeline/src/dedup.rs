//! The deduplication lookup: where the projection already has a message with this sender and id.

use std::collections::HashMap;

use sqlx::postgres::PgConnection;

use base::seq::Seq;
use protocol::message::Message;

/// Sender and id. Together they identify one message, also when the stream holds duplicates of it.
pub type Key = (String, String);

/// The key of a message as shown.
pub fn key(message: &Message) -> Key {
    (message.user.clone(), message.id.clone())
}

/// Ids that the sender supplied; derived ones contain the sequence and need no lookup. A lateral
/// subquery with a limit: whatever PostgreSQL believes of the table, it looks for one id after the
/// other in the index.
pub const LOOKUP: &str = "
    select asked.sender, asked.id, stored.seq
      from unnest($1::text[], $2::text[]) as asked (sender, id)
     cross join lateral (select seq from messages
                          where (sender, messages.id, derived) = (asked.sender, asked.id, false)
                          limit 1) stored";

/// Where the messages with these senders and ids are stored; those that are not are left out.
///
/// # Errors
/// The database does not answer.
pub async fn look_up(
    connection: &mut PgConnection,
    keys: &[Key],
) -> Result<HashMap<Key, Seq>, sqlx::Error> {
    if keys.is_empty() {
        return Ok(HashMap::new());
    }
    let (senders, ids): (Vec<&str>, Vec<&str>) = keys
        .iter()
        .map(|(sender, id)| (sender.as_str(), id.as_str()))
        .unzip();
    let stored: Vec<(String, String, i64)> = sqlx::query_as(LOOKUP)
        .bind(senders)
        .bind(ids)
        .fetch_all(connection)
        .await?;
    Ok(stored
        .into_iter()
        .map(|(sender, id, seq)| ((sender, id), Seq::from_i64(seq)))
        .collect())
}
