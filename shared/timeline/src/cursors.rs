//! Read and delivered cursors: up to where users have received and read their messages.
//!
//! `delivered` is one cursor for each user, over all direct messages. `read` is one for each user
//! and conversation. Both only grow.

use std::collections::HashMap;

use sqlx::postgres::PgConnection;

use base::seq::Seq;
use protocol::receipt::Cursors;

const IN_ROOM: &str = "select person, delivered, read from marks($1, $2)";

const DELIVERED: &str = "select delivered from users where name = $1";

/// The limit in the subquery makes every plan go from one key to the next. Without it, a plan that
/// was made while the table was empty would read all of it.
pub const READ: &str = "
    select asked.room, cursors.read
      from (select distinct room from unnest($2::text[]) as asked (room)) asked
     cross join lateral (select read from receipts
                          where (reader, receipts.room) = ($1, asked.room) limit 1) cursors";

/// The cursors of some users in one conversation, by user.
///
/// # Errors
/// The database does not answer.
pub async fn in_room(
    connection: &mut PgConnection,
    room: &str,
    users: &[&str],
) -> Result<HashMap<String, Cursors>, sqlx::Error> {
    if users.is_empty() {
        return Ok(HashMap::new());
    }
    let rows: Vec<(String, i64, i64)> = sqlx::query_as(IN_ROOM)
        .bind(room)
        .bind(users)
        .fetch_all(connection)
        .await?;
    let cursors = |(user, delivered, read)| {
        let cursors = Cursors {
            delivered: Seq::from_i64(delivered),
            read: Seq::from_i64(read),
        };
        (user, cursors)
    };
    Ok(rows.into_iter().map(cursors).collect())
}

/// Up to where a user has received direct messages; 0 for an unknown user.
///
/// # Errors
/// The database does not answer.
pub async fn delivered(connection: &mut PgConnection, user: &str) -> Result<Seq, sqlx::Error> {
    let delivered: Option<i64> = sqlx::query_scalar(DELIVERED)
        .bind(user)
        .fetch_optional(connection)
        .await?;
    Ok(delivered.map_or(Seq::ZERO, Seq::from_i64))
}

/// Up to where a user has read some conversations, by conversation; those without a cursor are left
/// out.
///
/// # Errors
/// The database does not answer.
pub async fn read_in(
    connection: &mut PgConnection,
    user: &str,
    rooms: &[&str],
) -> Result<HashMap<String, Seq>, sqlx::Error> {
    if rooms.is_empty() {
        return Ok(HashMap::new());
    }
    let rows: Vec<(String, i64)> = sqlx::query_as(READ)
        .bind(user)
        .bind(rooms)
        .fetch_all(connection)
        .await?;
    Ok(rows
        .into_iter()
        .map(|(room, read)| (room, Seq::from_i64(read)))
        .collect())
}
