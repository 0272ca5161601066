//! One copy at a time: a transaction that holds an advisory lock.

use std::time::Duration;

use sqlx::Connection;
use sqlx::postgres::PgConnection;

use crate::Own;
use base::error::{Error, Result};
use postgres::error::DatabaseError;
use service::ctx::Ctx;

/// Less than idle_in_transaction_session_timeout (20 s): we notice before PostgreSQL lets another copy in.
const LIMIT: Duration = Duration::from_secs(15);

/// Runs `work` in a transaction that holds `lock`; `None` where another session holds it.
///
/// # Errors
/// The work's, or the database does not answer. Nothing of it is committed then.
pub async fn alone<T>(
    ctx: &Ctx<Own>,
    lock: i64,
    work: impl AsyncFnOnce(&mut PgConnection) -> Result<T>,
) -> Result<Option<T>> {
    let mut outcome = Ok(None);
    let ended = ctx
        .chat
        .database()
        .run_once(LIMIT, async |connection: &mut PgConnection| {
            let mut transaction = connection.begin().await?;
            let mine: bool = sqlx::query_scalar("select pg_try_advisory_xact_lock($1)")
                .bind(lock)
                .fetch_one(&mut *transaction)
                .await?;
            if mine {
                outcome = work(&mut transaction).await.map(Some);
            }
            // What failed may be the session, such as one to a former primary: it is closed, which rolls back, and not used again.
            if outcome.is_ok() {
                transaction.commit().await
            } else {
                Err(sqlx::Error::WorkerCrashed)
            }
        });
    let ended = ended.await;
    let outcome = outcome?;
    ended?;
    Ok(outcome)
}

/// A statement's error, for callers and for the log.
pub fn refused(error: sqlx::Error) -> Error {
    DatabaseError::from(error).into()
}
