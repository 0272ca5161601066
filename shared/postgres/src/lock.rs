//! Advisory locks: work that only one replica may do at a time.
//!
//! Prefer [`with_transaction_lock`]: PostgreSQL releases the lock when the transaction ends, and it
//! works behind a pooler in transaction mode. [`with_session_lock`] is for work that cannot be one
//! transaction, such as migrations that take minutes; it needs a direct connection.

use std::time::Duration;

use sqlx::Connection;
use sqlx::postgres::PgConnection;
use tokio::time::timeout;

use crate::database::Database;
use crate::error::DatabaseError;

/// Releasing a lock takes longer only when the connection is cut.
const UNLOCK_LIMIT: Duration = Duration::from_secs(5);

/// Runs `work` in a transaction that holds the advisory lock `key`, all of it within `limit`;
/// `None` when another session holds the lock. Commits when `work` succeeds.
///
/// Keep `limit` below `idle_in_transaction_session_timeout` (20 s): then we notice that our time is
/// up before PostgreSQL ends the session and gives the lock to another replica.
///
/// # Errors
/// The work's own, or the database does not answer. Nothing is committed then.
pub async fn with_transaction_lock<T, E: From<DatabaseError>>(
    database: &Database,
    key: i64,
    limit: Duration,
    work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>,
) -> Result<Option<T>, E> {
    let mut outcome = Ok(None);
    let ended = database.run_once(limit, async |connection: &mut PgConnection| {
        let mut transaction = connection.begin().await?;
        let locked: bool = sqlx::query_scalar("select pg_try_advisory_xact_lock($1)")
            .bind(key)
            .fetch_one(&mut *transaction)
            .await?;
        if locked {
            outcome = work(&mut transaction).await.map(Some);
        }
        match &outcome {
            Ok(_) => transaction.commit().await,
            Err(_) => Err(close_session()),
        }
    });
    let ended = ended.await;
    let outcome = outcome?;
    ended?;
    Ok(outcome)
}

/// Runs `work` on a connection whose session holds the advisory lock `key`, all of it within
/// `limit`; `None` when another session holds the lock. Afterwards every advisory lock of the
/// session is released, also one that `work` left behind.
///
/// When the session ends in the middle of the work, another replica may begin; `work` notices at
/// its next statement.
///
/// # Errors
/// The work's own, or the database does not answer.
pub async fn with_session_lock<T, E: From<DatabaseError>>(
    database: &Database,
    key: i64,
    limit: Duration,
    work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>,
) -> Result<Option<T>, E> {
    let mut outcome = Ok(None);
    let ended = database.run_once(limit, async |connection: &mut PgConnection| {
        let locked: bool = sqlx::query_scalar("select pg_try_advisory_lock($1)")
            .bind(key)
            .fetch_one(&mut *connection)
            .await?;
        if !locked {
            return Ok(());
        }
        outcome = work(connection).await.map(Some);
        unlock(connection).await?;
        match &outcome {
            Ok(_) => Ok(()),
            Err(_) => Err(close_session()),
        }
    });
    match (ended.await, outcome) {
        (Err(error), Ok(None)) => Err(error.into()),
        // The work is done, and PostgreSQL releases the lock of a broken session by itself.
        (_, outcome) => outcome,
    }
}

/// An error after which the connection is closed and not used again: the work may have failed
/// because of the session, for example one to a former primary. Closing it also rolls back.
fn close_session() -> sqlx::Error {
    sqlx::Error::WorkerCrashed
}

/// All locks of the session: sqlx keeps one of its own when a migration fails.
async fn unlock(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let unlock = sqlx::query("select pg_advisory_unlock_all()").execute(connection);
    timeout(UNLOCK_LIMIT, unlock)
        .await
        .map_err(|_| sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))?
        .map(|_| ())
}
