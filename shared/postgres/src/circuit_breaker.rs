//! The circuit breaker: whether PostgreSQL is away.
//!
//! Connection errors and failed probes open it. A deadline that passed does not, because the
//! statement may be slow or a row locked; it only causes a probe. Probes have a connection of their
//! own, because those of the pool may all be busy or broken.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection};
use tokio::time::{Instant, timeout};

use crate::error::{DatabaseError, Scope};

/// How often we probe while PostgreSQL is away.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);
/// Connecting takes some milliseconds. A server that takes longer than this is away.
const PROBE_LIMIT: Duration = Duration::from_secs(2);
/// After a successful probe, slow queries cause no other one for so long.
const PROBE_PAUSE: Duration = Duration::from_secs(1);
/// A request that waits so long for a connection probes whether one can be had at all.
const PATIENCE: Duration = Duration::from_millis(250);
/// The same warning is logged once in this time.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The last probe: when it ended, and its result.
type LastProbe = (Instant, Result<(), DatabaseError>);

pub(crate) struct CircuitBreaker {
    options: PgConnectOptions,
    is_open: AtomicBool,
    last_probe: tokio::sync::Mutex<Option<LastProbe>>,
    /// When the last warning about a single request was logged.
    logged: Mutex<Option<Instant>>,
}

/// Without the options, because they hold the password.
impl fmt::Debug for CircuitBreaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreaker")
            .field("is_open", &self.is_open)
            .finish_non_exhaustive()
    }
}

impl CircuitBreaker {
    pub fn new(options: PgConnectOptions) -> CircuitBreaker {
        CircuitBreaker {
            options,
            is_open: AtomicBool::new(false),
            last_probe: tokio::sync::Mutex::default(),
            logged: Mutex::default(),
        }
    }

    /// PostgreSQL is away.
    pub fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Relaxed)
    }

    /// Opens; whether it was closed before.
    pub fn open(&self, error: &DatabaseError) -> bool {
        let was_closed = !self.is_open.swap(true, Ordering::Relaxed);
        if was_closed {
            tracing::warn!(
                %error,
                "PostgreSQL is away: requests do without it, or are answered 503, until it is back"
            );
        }
        was_closed
    }

    /// Probes until PostgreSQL is back, and closes; gives up when `is_over`.
    pub async fn close_when_back(&self, is_over: impl Fn() -> bool) {
        while !is_over() {
            // An error that an operator has to fix is an answer, too, and every request gets it.
            if !matches!(self.probe(Duration::ZERO).await, Err(error) if error.is_away()) {
                tracing::info!("PostgreSQL is back");
                self.is_open.store(false, Ordering::Relaxed);
                return;
            }
            tokio::time::sleep(PROBE_INTERVAL).await;
        }
    }

    /// A query was slow: the result of a probe. A recent successful one counts, too.
    pub async fn probe_if_due(&self) -> Result<(), DatabaseError> {
        self.probe(PROBE_PAUSE).await
    }

    /// Ends, with the reason, when no connection can be had; never, as long as PostgreSQL accepts
    /// connections.
    pub async fn refusal(&self) -> DatabaseError {
        tokio::time::sleep(PATIENCE).await;
        loop {
            match self.probe_if_due().await {
                Err(error) if error.scope == Scope::Connection => return error,
                _ => tokio::time::sleep(PROBE_PAUSE).await,
            }
        }
    }

    /// Logs that a single request did without PostgreSQL, once in [`LOG_INTERVAL`].
    pub fn log_once(&self, error: &DatabaseError) {
        let now = Instant::now();
        let Ok(mut logged) = self.logged.lock() else {
            return;
        };
        if logged.is_none_or(|logged| now.duration_since(logged) > LOG_INTERVAL) {
            *logged = Some(now);
            tracing::warn!(
                %error,
                "a request did without PostgreSQL; if this stays, look for slow statements, locks \
                 and DATABASE_CONNECTIONS"
            );
        }
    }

    /// The result of a probe. Many may wait for it, but one probes. A success counts for
    /// `good_for`; a failure only for those that were waiting for it.
    async fn probe(&self, good_for: Duration) -> Result<(), DatabaseError> {
        let asked = Instant::now();
        let mut last_probe = self.last_probe.lock().await;
        if let Some((ended, result)) = &*last_probe
            && (*ended >= asked || result.is_ok() && ended.elapsed() < good_for)
        {
            return result.clone();
        }
        let result = match timeout(PROBE_LIMIT, self.options.connect()).await {
            Ok(Ok(connection)) => {
                tokio::spawn(timeout(PROBE_LIMIT, PgConnection::close(connection)));
                Ok(())
            }
            Ok(Err(error)) => Err(DatabaseError::connecting(error)),
            Err(_) => Err(DatabaseError::unreachable(PROBE_LIMIT)),
        };
        *last_probe = Some((Instant::now(), result.clone()));
        result
    }
}
