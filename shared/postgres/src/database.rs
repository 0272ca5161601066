//! The pool: every use has a deadline, and it survives silent network cuts and sessions that
//! PostgreSQL ended.

use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use sqlx::pool::{PoolConnection, PoolConnectionMetadata};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, Postgres};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::circuit_breaker::CircuitBreaker;
use crate::error::{Class, DatabaseError};
use crate::settings::Settings;
use base::error::Fatal;

/// Set on every connection.
///
/// * `plan_cache_mode`: a statement over arrays that starts with custom plans may become four times
///   slower when PostgreSQL switches to a generic plan after five executions. Generic from the
///   start stays fast.
/// * `jit`: a generic plan expects far more rows than a page has, so on large tables PostgreSQL
///   would compile it at each execution. An inbox of one message took 28 ms on a million rows, and
///   takes 2.
/// * `enable_seqscan`: each of our queries reads ranges of an index. But a plan that was made while
///   a table was empty is kept, and would read all of the table when it has grown. With this,
///   PostgreSQL takes an index wherever there is one.
/// * `client_connection_check_interval`: we close the connection of a query that we give up, and
///   this ends the query on the server.
pub const SESSION: [(&str, &str); 11] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("jit", "off"),
    ("statement_timeout", "20s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "20s"),
    ("client_connection_check_interval", "500ms"),
    ("tcp_keepalives_idle", "15"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
    ("tcp_user_timeout", "30000"),
];

/// A connection that was idle for so long is pinged before it is used: something between us and
/// PostgreSQL may have dropped it silently, and then a query would wait until its deadline.
const PING_AFTER: Duration = Duration::from_secs(10);
const PING_LIMIT: Duration = Duration::from_millis(500);

/// The database. Each use has a deadline, and a connection that was abandoned in the middle of a
/// query never goes back to the pool.
#[derive(Debug, Clone)]
pub struct Database {
    pool: PgPool,
    circuit_breaker: Arc<CircuitBreaker>,
    retired: Retired,
}

impl Database {
    /// Connects when first used.
    ///
    /// # Errors
    /// The URL cannot be read.
    pub fn new(settings: &Settings, application: &str) -> Result<Database, Fatal> {
        let options = PgConnectOptions::from_str(settings.url.expose())
            .map_err(|_| {
                Fatal::new(
                    "configuration: DATABASE_URL is not of the form \
                     postgres://user:password@host:5432/database",
                )
            })?
            .application_name(application)
            .options(SESSION)
            .disable_statement_logging();
        let retired = Retired::default();
        let of_pool = retired.clone();
        let pool = PgPoolOptions::new()
            .max_connections(settings.connections)
            .idle_timeout(settings.idle_timeout)
            .max_lifetime(settings.max_lifetime)
            // A ping before every use would double the round trips.
            .test_before_acquire(false)
            .before_acquire(move |connection, metadata| {
                let retired = of_pool.clone();
                async move { Ok(retired.is_usable(connection, &metadata).await) }.boxed()
            })
            .connect_lazy_with(options.clone());
        Ok(Database {
            pool,
            circuit_breaker: Arc::new(CircuitBreaker::new(options)),
            retired,
        })
    }

    /// Runs `work` on one connection, all of it within `limit`. When the session turns out to have
    /// ended, or to be useless (read-only since a failover), `work` runs a second time on a new
    /// connection. So it must be harmless to repeat.
    ///
    /// # Errors
    /// The database's error, classified; [`Class::Transient`] when the time is up.
    pub async fn run<T, W>(&self, limit: Duration, work: W) -> Result<T, DatabaseError>
    where
        W: AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error> + Clone,
    {
        let deadline = Instant::now() + limit;
        match self.attempt(limit, deadline, work.clone()).await {
            Err(Failed::Begun(error)) if error.ends_session() => {
                self.retired.retire();
                Ok(self.attempt(limit, deadline, work).await?)
            }
            outcome => Ok(outcome?),
        }
    }

    /// Like [`run`](Database::run), for work that must not run a second time.
    ///
    /// # Errors
    /// As [`run`](Database::run).
    pub async fn run_once<T, W>(&self, limit: Duration, work: W) -> Result<T, DatabaseError>
    where
        W: AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    {
        let outcome = self.attempt(limit, Instant::now() + limit, work).await;
        if matches!(&outcome, Err(Failed::Begun(error)) if error.ends_session()) {
            self.retired.retire();
        }
        Ok(outcome?)
    }

    /// Like [`run`](Database::run), but `None` when the caller has to do without the database: at
    /// once while PostgreSQL is away; otherwise because this work found no connection, or did not
    /// end within `limit`. Only connection errors and failed probes open the circuit breaker for
    /// everybody; a slow query concerns its caller alone.
    ///
    /// # Errors
    /// Any error that is not [`Class::Transient`].
    pub async fn run_if_there<T, W>(
        &self,
        limit: Duration,
        work: W,
    ) -> Result<Option<T>, DatabaseError>
    where
        W: AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error> + Clone,
    {
        if self.circuit_breaker.is_open() {
            return Ok(None);
        }
        let slow = Instant::now() + limit / 2;
        let run = self.run(limit, work);
        tokio::pin!(run);
        let outcome = tokio::select! {
            outcome = &mut run => outcome,
            () = sleep_until(slow) => {
                // PostgreSQL may be away. We probe now, so that others need not wait to find out.
                tokio::spawn(self.clone().probe());
                run.await
            }
        };
        match outcome {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.class != Class::Transient => Err(error),
            Err(error) => {
                if error.is_away() {
                    self.open_circuit_breaker(&error);
                } else {
                    self.circuit_breaker.log_once(&error);
                }
                Ok(None)
            }
        }
    }

    /// Whether PostgreSQL answers, within `limit`.
    ///
    /// # Errors
    /// As [`run`](Database::run).
    pub async fn ping(&self, limit: Duration) -> Result<(), DatabaseError> {
        self.run(limit, async |connection| {
            sqlx::query("select 1")
                .execute(connection)
                .await
                .map(|_| ())
        })
        .await
    }

    /// Closes every connection.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    async fn attempt<T>(
        &self,
        limit: Duration,
        deadline: Instant,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Failed> {
        let connection = self
            .acquire(limit, deadline)
            .await
            .map_err(Failed::Before)?;
        let mut guard = Guard(Some(connection));
        let Some(connection) = guard.0.as_mut() else {
            return Err(Failed::Before(DatabaseError::late(limit)));
        };
        let outcome = timeout_at(deadline, work(connection)).await;
        let outcome = outcome
            .map_err(|_| DatabaseError::late(limit))
            .and_then(|done| done.map_err(DatabaseError::from));
        if outcome
            .as_ref()
            .err()
            .is_none_or(DatabaseError::leaves_session)
        {
            guard.return_to_pool();
        }
        outcome.map_err(Failed::Begun)
    }

    /// A connection of the pool. When a probe finds that none can be had, the error comes before
    /// the deadline.
    async fn acquire(
        &self,
        limit: Duration,
        deadline: Instant,
    ) -> Result<PoolConnection<Postgres>, DatabaseError> {
        tokio::select! {
            biased;
            acquired = self.pool.acquire() => acquired.map_err(DatabaseError::connecting),
            refusal = self.circuit_breaker.refusal() => Err(refusal),
            () = sleep_until(deadline) => Err(DatabaseError::pool_exhausted(limit)),
        }
    }

    async fn probe(self) {
        if let Err(error) = self.circuit_breaker.probe_if_due().await
            && error.is_away()
        {
            self.open_circuit_breaker(&error);
        }
    }

    /// From now on no request waits for PostgreSQL, until it is back.
    fn open_circuit_breaker(&self, error: &DatabaseError) {
        if self.circuit_breaker.open(error) {
            self.retired.retire();
            let pool = self.pool.clone();
            let circuit_breaker = self.circuit_breaker.clone();
            tokio::spawn(async move {
                circuit_breaker.close_when_back(|| pool.is_closed()).await;
            });
        }
    }
}

/// Where an attempt failed.
enum Failed {
    /// Before there was a connection: nothing was sent.
    Before(DatabaseError),
    /// In the middle of the work.
    Begun(DatabaseError),
}

impl From<Failed> for DatabaseError {
    fn from(failed: Failed) -> DatabaseError {
        match failed {
            Failed::Before(error) | Failed::Begun(error) => error,
        }
    }
}

/// Connections from before this time are not used again. Where PostgreSQL ended one session, it
/// mostly ended the idle ones, too, and each of them would cost a request an error.
#[derive(Debug, Clone, Default)]
struct Retired(Arc<Mutex<Option<std::time::Instant>>>);

impl Retired {
    fn retire(&self) {
        if let Ok(mut before) = self.0.lock() {
            *before = Some(std::time::Instant::now());
        }
    }

    fn is_retired(&self, age: Duration) -> bool {
        let before = self.0.lock().ok().and_then(|before| *before);
        before.is_some_and(|before| before.elapsed() <= age)
    }

    async fn is_usable(
        &self,
        connection: &mut PgConnection,
        metadata: &PoolConnectionMetadata,
    ) -> bool {
        if self.is_retired(metadata.age) {
            return false;
        }
        if metadata.idle_for < PING_AFTER {
            return true;
        }
        let is_there = matches!(timeout(PING_LIMIT, connection.ping()).await, Ok(Ok(())));
        if !is_there {
            self.retire();
        }
        is_there
    }
}

/// Keeps a connection that was abandoned in the middle of a query out of the pool: after a silent
/// network cut the pool would wait for it for ever (sqlx #4349). Closing it ends the query on the
/// server.
struct Guard(Option<PoolConnection<Postgres>>);

impl Guard {
    fn return_to_pool(mut self) {
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
