//! What moving either mark has in common.

use std::time::Duration;

use sqlx::Connection;
use sqlx::postgres::{PgConnection, PgTransaction};

use base::error::{Code, Error, Result};
use postgres::database::Database;

/// A mark is moved in milliseconds, and thousands of conversations are counted in some hundred; a database that takes this long is
/// away. Below the deadline of a request.
const DEADLINE: Duration = Duration::from_millis(3_500);

/// Somebody is here. Takes the user's row until the transaction ends, also where it changes nothing: one user's marks move one
/// after the other.
const SEEN: &str = "
    insert into users (name) values ($1)
    on conflict (name) do update set last_seen = now() where users.last_seen < now() - interval '1 minute'";

/// Runs `work` in a transaction in which nobody else moves a mark of `user`.
///
/// # Errors
/// 503 while PostgreSQL is away: only there are marks.
pub async fn alone<T>(
    database: &Database,
    user: &str,
    work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error> + Clone,
) -> Result<T> {
    let done = database.run_if_there(DEADLINE, async |connection| {
        let mut transaction: PgTransaction<'_> = connection.begin().await?;
        sqlx::query(SEEN)
            .bind(user)
            .execute(&mut *transaction)
            .await?;
        let done = work(&mut transaction).await?;
        transaction.commit().await?;
        Ok(done)
    });
    done.await?.ok_or_else(away)
}

/// Looks, and changes nothing.
///
/// # Errors
/// As [`alone`].
pub async fn look<T>(
    database: &Database,
    work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error> + Clone,
) -> Result<T> {
    database
        .run_if_there(DEADLINE, work)
        .await?
        .ok_or_else(away)
}

fn away() -> Error {
    Error::new(
        Code::Unavailable,
        "the database is away or too slow, and only it knows who has read what; try again, marking twice is harmless",
    )
}
