//! Work that only one replica does at a time.

use std::time::Duration;

use sqlx::postgres::PgConnection;

use crate::state::State;
use base::error::{Error, Result};
use postgres::error::DatabaseError;
use postgres::lock::with_transaction_lock;
use service::ctx::Ctx;

/// Less than `idle_in_transaction_session_timeout` (20 s): we notice that our time is up before
/// PostgreSQL gives the lock to another replica.
const LIMIT: Duration = Duration::from_secs(15);

/// Runs `work` in a transaction that holds the advisory lock `key`; `None` if another session holds
/// it.
///
/// # Errors
/// The work's own, or the database does not answer. Nothing is committed then.
pub async fn with_lock<T>(
    ctx: &Ctx<State>,
    key: i64,
    work: impl AsyncFnOnce(&mut PgConnection) -> Result<T>,
) -> Result<Option<T>> {
    with_transaction_lock(ctx.chat.database(), key, LIMIT, work).await
}

/// A failed statement, as the error for callers and operators.
pub fn database_error(error: sqlx::Error) -> Error {
    DatabaseError::from(error).into()
}
