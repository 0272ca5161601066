//! PostgreSQL: a pool that survives silent cuts, and errors that say whose fault they are.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions, Postgres};
use tokio::time::{Instant, timeout_at};

use crate::{Fatal, Settings};

/// Set on every connection. The plans: a statement over arrays that starts as a custom plan may turn
/// four times slower when PostgreSQL changes its mind after five executions; generic from the start stays fast.
/// Such a plan is made for far more rows than a page has, so on large tables PostgreSQL would compile each of them, every time
/// anew: an inbox of one message took 28 ms on a million, and takes 2.
const SESSION: [(&str, &str); 9] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("jit", "off"),
    ("statement_timeout", "20s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "20s"),
    ("tcp_keepalives_idle", "15"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
    ("tcp_user_timeout", "30000"),
];

/// How often a database that is away is asked whether it is back.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// The database, as functions may use it: each use has a deadline, and a connection that was given
/// up in the middle of a query never goes back to the pool.
#[derive(Debug, Clone)]
pub struct Database {
    pool: PgPool,
    away: Arc<AtomicBool>,
}

impl Database {
    /// Connects when first used.
    ///
    /// # Errors
    /// The URL cannot be read.
    pub fn new(settings: &Settings, application: &str) -> Result<Database, Fatal> {
        let options = PgConnectOptions::from_str(&settings.database_url)
            .map_err(|_| Fatal::new("configuration: DATABASE_URL is not of the form postgres://user:password@host:5432/database"))?
            .application_name(application)
            .options(SESSION)
            .disable_statement_logging();
        let pool = PgPoolOptions::new()
            .max_connections(settings.database_connections)
            // A ping before every use would double the round trips; a dead connection shows in the query's error.
            .test_before_acquire(false)
            .connect_lazy_with(options);
        Ok(Database { pool, away: Arc::default() })
    }

    /// Runs `work` on one connection, all of it within `limit`.
    ///
    /// # Errors
    /// Whatever the database answered, classified; [`Class::Trouble`] when the time is up.
    pub async fn run<T, W>(&self, limit: Duration, work: W) -> Result<T, DatabaseError>
    where
        W: AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    {
        let deadline = Instant::now() + limit;
        let connection = timeout_at(deadline, self.pool.acquire()).await.map_err(|_| DatabaseError::late(limit))??;
        let mut guard = Guard(Some(connection));
        let connection = guard.0.as_mut().ok_or_else(|| DatabaseError::late(limit))?;
        let outcome = timeout_at(deadline, work(connection)).await.map_err(|_| DatabaseError::late(limit))?;
        let outcome = outcome.map_err(DatabaseError::from);
        if !matches!(&outcome, Err(error) if error.class == Class::Trouble && error.sqlstate.is_none()) {
            guard.give_back();
        }
        outcome
    }

    /// Like [`run`](Database::run), and `None` while PostgreSQL is away: whoever notices waits for `limit`, and until
    /// PostgreSQL answers a probe again nobody else does.
    ///
    /// # Errors
    /// Any error but the database's trouble.
    pub async fn run_if_there<T, W>(&self, limit: Duration, work: W) -> Result<Option<T>, DatabaseError>
    where
        W: AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    {
        if self.away.load(Ordering::Relaxed) {
            return Ok(None);
        }
        match self.run(limit, work).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.class == Class::Trouble => {
                if !self.away.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "PostgreSQL is away");
                    tokio::spawn(self.clone().wait_until_back(limit));
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn wait_until_back(self, limit: Duration) {
        while !self.pool.is_closed() {
            tokio::time::sleep(PROBE_INTERVAL).await;
            let probe = self.run(limit, async |connection| sqlx::query("select 1").execute(connection).await).await;
            if !matches!(&probe, Err(error) if error.class == Class::Trouble) {
                tracing::info!("PostgreSQL is back");
                self.away.store(false, Ordering::Relaxed);
                return;
            }
        }
    }

    /// Closes every connection.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// Keeps a connection that was abandoned mid-query out of the pool: after a silent network cut the
/// pool would wait on it for ever (sqlx #4349).
struct Guard(Option<PoolConnection<Postgres>>);

impl Guard {
    fn give_back(mut self) {
        drop(self.0.take());
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(connection.detach());
        }
    }
}

/// Whose fault a database error is; decides what happens to the messages at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The database's trouble: wait and try again, blame no message.
    Trouble,
    /// This row's.
    Row,
    /// The deployment's: missing table, wrong password. Stop and say so.
    Deployment,
}

/// An error of the database, without anything a message said: neither its DETAIL nor its statement.
#[derive(Debug, Clone, thiserror::Error)]
pub struct DatabaseError {
    /// Whose fault.
    pub class: Class,
    /// Five characters, when the server answered.
    pub sqlstate: Option<String>,
    /// The constraint that was violated.
    pub constraint: Option<String>,
    what: &'static str,
}

impl DatabaseError {
    fn late(limit: Duration) -> DatabaseError {
        let what = if limit < Duration::from_secs(1) { "no answer in time" } else { "no answer for seconds" };
        DatabaseError { class: Class::Trouble, sqlstate: None, constraint: None, what }
    }
}

impl fmt::Display for DatabaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)?;
        if let Some(state) = &self.sqlstate {
            write!(f, ", SQLSTATE {state}")?;
        }
        if let Some(constraint) = &self.constraint {
            write!(f, ", constraint {constraint}")?;
        }
        Ok(())
    }
}

impl From<sqlx::Error> for DatabaseError {
    fn from(error: sqlx::Error) -> DatabaseError {
        let plain = |class, what| DatabaseError { class, sqlstate: None, constraint: None, what };
        match error {
            sqlx::Error::Database(error) => {
                let sqlstate = error.code().map(|code| code.into_owned()).unwrap_or_default();
                let class = class_of(&sqlstate);
                let what = match class {
                    Class::Trouble => "PostgreSQL is in trouble",
                    Class::Row => "PostgreSQL refused the row",
                    Class::Deployment => "PostgreSQL is not set up for this function",
                };
                DatabaseError { class, constraint: error.constraint().map(str::to_owned), sqlstate: Some(sqlstate), what }
            }
            sqlx::Error::Io(_) | sqlx::Error::Tls(_) => plain(Class::Trouble, "the connection to PostgreSQL broke or was refused"),
            sqlx::Error::PoolTimedOut => plain(Class::Trouble, "no connection to PostgreSQL was free"),
            sqlx::Error::PoolClosed => plain(Class::Trouble, "the pool is closed"),
            sqlx::Error::Encode(_) | sqlx::Error::Decode(_) | sqlx::Error::ColumnDecode { .. } | sqlx::Error::ColumnNotFound(_) => {
                plain(Class::Deployment, "PostgreSQL's schema is not the one this function knows")
            }
            _ => plain(Class::Trouble, "the conversation with PostgreSQL failed"),
        }
    }
}

/// By the first two characters; an unknown class is never blamed on a message.
fn class_of(sqlstate: &str) -> Class {
    match sqlstate.get(..2) {
        Some("22" | "23" | "54") => Class::Row,
        Some("42" | "28" | "3D" | "3F") => Class::Deployment,
        _ => Class::Trouble,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_decides_who_is_blamed() {
        for state in ["08006", "40P01", "53300", "55P03", "57P01", "58030", "XX000", "25006", ""] {
            assert_eq!(class_of(state), Class::Trouble, "{state}");
        }
        for state in ["22021", "23505", "54000"] {
            assert_eq!(class_of(state), Class::Row, "{state}");
        }
        for state in ["42P01", "28P01", "3D000"] {
            assert_eq!(class_of(state), Class::Deployment, "{state}");
        }
    }
}
