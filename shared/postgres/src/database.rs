//! PostgreSQL: a pool that survives silent cuts and sessions that were ended, and errors that say whose fault they are.

use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use sqlx::pool::{PoolConnection, PoolConnectionMetadata};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, Postgres};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::error::{Class, DatabaseError};
use crate::presence::Presence;
use crate::settings::Settings;
use base::error::Fatal;

/// Set on every connection. The plans: a statement over arrays that starts as a custom plan may turn
/// four times slower when PostgreSQL changes its mind after five executions; generic from the start stays fast.
/// Such a plan is made for far more rows than a page has, so on large tables PostgreSQL would compile each of them, every time
/// anew: an inbox of one message took 28 ms on a million, and takes 2.
/// `enable_seqscan`: every query of ours is about ranges of an index. But a plan that was made while a table was empty is kept, and
/// reads all of the table when it has grown: so PostgreSQL takes an index wherever there is one.
/// `client_connection_check_interval`: a query that was given up ends on the server, too, because we close its connection.
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

/// A connection that was idle for so long is asked whether it is still there: something between us and PostgreSQL may have
/// dropped it without a word, and then a query would wait until its deadline.
const PING_AFTER: Duration = Duration::from_secs(10);
const PING_LIMIT: Duration = Duration::from_millis(500);

/// The database, as functions may use it: each use has a deadline, and a connection that was given
/// up in the middle of a query never goes back to the pool.
#[derive(Debug, Clone)]
pub struct Database {
    pool: PgPool,
    presence: Arc<Presence>,
    retired: Retired,
}

impl Database {
    /// Connects when first used.
    ///
    /// # Errors
    /// The URL cannot be read.
    pub fn new(settings: &Settings, application: &str) -> Result<Database, Fatal> {
        let options = PgConnectOptions::from_str(settings.url.expose())
            .map_err(|_| Fatal::new("configuration: DATABASE_URL is not of the form postgres://user:password@host:5432/database"))?
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
            presence: Arc::new(Presence::new(options)),
            retired,
        })
    }

    /// Runs `work` on one connection, all of it within `limit`. Should the session turn out to be over, or useless (read-only
    /// since a failover), `work` runs a second time on a new connection: it must be harmless to repeat, as a request is
    /// that a caller repeats after a 503.
    ///
    /// # Errors
    /// Whatever the database answered, classified; [`Class::Transient`] when the time is up.
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

    /// Like [`run`](Database::run) for work that must not, or cannot, run a second time.
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

    /// Like [`run`](Database::run), and `None` when the caller has to do without the database: at once while PostgreSQL is away;
    /// otherwise because this very work found no connection, or did not end within `limit`. Only connection errors and failed
    /// probes declare PostgreSQL away for everybody; a slow query is its caller's trouble alone.
    ///
    /// # Errors
    /// Any error but the database's trouble.
    pub async fn run_if_there<T, W>(
        &self,
        limit: Duration,
        work: W,
    ) -> Result<Option<T>, DatabaseError>
    where
        W: AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error> + Clone,
    {
        if self.presence.is_away() {
            return Ok(None);
        }
        let doubt = Instant::now() + limit / 2;
        let run = self.run(limit, work);
        tokio::pin!(run);
        let outcome = tokio::select! {
            outcome = &mut run => outcome,
            () = sleep_until(doubt) => {
                // Slow already: should PostgreSQL be away, others need not wait to find out.
                tokio::spawn(self.clone().doubt());
                run.await
            }
        };
        match outcome {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.class != Class::Transient => Err(error),
            Err(error) => {
                if error.is_away() {
                    self.is_away(&error);
                } else {
                    self.presence.say(&error);
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
            guard.give_back();
        }
        outcome.map_err(Failed::Begun)
    }

    /// A connection of the pool; an error before the deadline when a probe finds that none can be had.
    async fn acquire(
        &self,
        limit: Duration,
        deadline: Instant,
    ) -> Result<PoolConnection<Postgres>, DatabaseError> {
        tokio::select! {
            biased;
            acquired = self.pool.acquire() => acquired.map_err(DatabaseError::connecting),
            refusal = self.presence.refusal() => Err(refusal),
            () = sleep_until(deadline) => Err(DatabaseError::crowded(limit)),
        }
    }

    async fn doubt(self) {
        if let Err(error) = self.presence.doubt().await
            && error.is_away()
        {
            self.is_away(&error);
        }
    }

    /// From now on nobody asks, until PostgreSQL is back.
    fn is_away(&self, error: &DatabaseError) {
        if self.presence.declare_away(error) {
            self.retired.retire();
            let Database { pool, presence, .. } = self.clone();
            tokio::spawn(async move { presence.wait_until_back(|| pool.is_closed()).await });
        }
    }
}

/// Where an attempt failed.
enum Failed {
    /// Without a connection: nothing was sent.
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

/// Connections of the pool from before this time are not used again: where one session was ended, the idle ones beside it mostly
/// were, too, and each would cost somebody an error.
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

/// Keeps a connection that was abandoned mid-query out of the pool: after a silent network cut the
/// pool would wait on it for ever (sqlx #4349). Closing it ends the query on the server.
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
