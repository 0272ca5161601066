//! PostgreSQL, as the endpoints use it: one user's cursors move one after the other.

use std::time::Duration;

use sqlx::Connection;
use sqlx::postgres::{PgConnection, PgTransaction};

use base::error::{Code, Error, Result};
use postgres::database::Database;
use postgres::span::query_span;

/// A cursor moves in milliseconds, and thousands of conversations are counted in some hundred.
/// After this the database counts as away. Below the deadline of a request.
const DEADLINE: Duration = Duration::from_millis(3_500);

/// Notes that the user was seen, and locks the user's row until the transaction ends, also where
/// nothing is changed.
const LOCK_USER: &str = "
    insert into users (name) values ($1)
    on conflict (name) do update
    set last_seen = now() where users.last_seen < now() - interval '1 minute'";

/// Runs `work` in a transaction in which nobody else moves a cursor of `user`.
///
/// # Errors
/// 503 while PostgreSQL is away: only it has the cursors.
pub async fn with_user_lock<T>(
    database: &Database,
    user: &str,
    work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error> + Clone,
) -> Result<T> {
    let done = database.run_if_there(DEADLINE, async |connection| {
        let transaction = async {
            let mut transaction: PgTransaction<'_> = connection.begin().await?;
            sqlx::query(LOCK_USER)
                .bind(user)
                .execute(&mut *transaction)
                .await?;
            let done = work(&mut transaction).await?;
            transaction.commit().await?;
            Ok(done)
        };
        query_span("update", "users", transaction).await
    });
    done.await?.ok_or_else(away)
}

/// Runs `work`, which changes nothing.
///
/// # Errors
/// As [`with_user_lock`].
pub async fn read_only<T>(
    database: &Database,
    work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error> + Clone,
) -> Result<T> {
    let done = database.run_if_there(DEADLINE, async |connection| {
        query_span("select", "receipts", work(connection)).await
    });
    done.await?.ok_or_else(away)
}

fn away() -> Error {
    Error::new(
        Code::Unavailable,
        "the database is away or too slow, and only it knows who has read what; try again, \
         marking twice is harmless",
    )
}
