//! Whether PostgreSQL is there. Connection errors and failed probes say that it is away; a deadline that passed says nothing of
//! it, and only leads to a probe. Probes have a connection of their own: the pool's may all be busy, or all broken.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection};
use tokio::time::{Instant, timeout};

use crate::error::{DatabaseError, Scope};

/// How often a database that is away is asked whether it is back.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);
/// Connecting takes some milliseconds. Whom a server does not let in within this, it is away for.
const PROBE_LIMIT: Duration = Duration::from_secs(2);
/// After a probe that succeeded, slow queries lead to no other one for so long.
const PROBE_PAUSE: Duration = Duration::from_secs(1);
/// Whoever waits so long for a connection asks whether one can be had at all.
const PATIENCE: Duration = Duration::from_millis(250);
/// The same complaint is worth one line in this time.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// The last probe: when it ended, and what it found.
type Outcome = (Instant, Result<(), DatabaseError>);

pub(crate) struct Presence {
    options: PgConnectOptions,
    away: AtomicBool,
    probed: tokio::sync::Mutex<Option<Outcome>>,
    /// When the last line about a single request was written.
    said: Mutex<Option<Instant>>,
}

/// Without the options: they hold the password.
impl fmt::Debug for Presence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Presence")
            .field("away", &self.away)
            .finish_non_exhaustive()
    }
}

impl Presence {
    pub fn new(options: PgConnectOptions) -> Presence {
        Presence {
            options,
            away: AtomicBool::new(false),
            probed: tokio::sync::Mutex::default(),
            said: Mutex::default(),
        }
    }

    pub fn is_away(&self) -> bool {
        self.away.load(Ordering::Relaxed)
    }

    /// Whether this is news.
    pub fn declare_away(&self, error: &DatabaseError) -> bool {
        let news = !self.away.swap(true, Ordering::Relaxed);
        if news {
            tracing::warn!(%error, "PostgreSQL is away");
        }
        news
    }

    /// Asks until PostgreSQL is back, or `is_over`.
    pub async fn wait_until_back(&self, is_over: impl Fn() -> bool) {
        while !is_over() {
            // A refusal that somebody has to mend is an answer, too, and every request gets it.
            if !matches!(self.probe(Duration::ZERO).await, Err(error) if error.is_away()) {
                tracing::info!("PostgreSQL is back");
                self.away.store(false, Ordering::Relaxed);
                return;
            }
            tokio::time::sleep(PROBE_INTERVAL).await;
        }
    }

    /// A query was slow: what a probe says, unless one has just succeeded.
    pub async fn doubt(&self) -> Result<(), DatabaseError> {
        self.probe(PROBE_PAUSE).await
    }

    /// Ends, with the reason, when no connection can be had; as long as PostgreSQL lets others in, never.
    pub async fn refusal(&self) -> DatabaseError {
        tokio::time::sleep(PATIENCE).await;
        loop {
            match self.doubt().await {
                Err(error) if error.scope == Scope::Connection => return error,
                _ => tokio::time::sleep(PROBE_PAUSE).await,
            }
        }
    }

    /// One line for the log now and then, when single requests have to do without the database.
    pub fn say(&self, error: &DatabaseError) {
        let now = Instant::now();
        let Ok(mut said) = self.said.lock() else {
            return;
        };
        if said.is_none_or(|said| now.duration_since(said) > LINE_INTERVAL) {
            *said = Some(now);
            tracing::warn!(%error, "a request did without PostgreSQL");
        }
    }

    /// What a probe finds: many may ask, one probes. One that succeeded counts for `good_for`; a failure only for those who were
    /// waiting for it.
    async fn probe(&self, good_for: Duration) -> Result<(), DatabaseError> {
        let asked = Instant::now();
        let mut probed = self.probed.lock().await;
        if let Some((ended, outcome)) = &*probed
            && (*ended >= asked || outcome.is_ok() && ended.elapsed() < good_for)
        {
            return outcome.clone();
        }
        let outcome = match timeout(PROBE_LIMIT, self.options.connect()).await {
            Ok(Ok(connection)) => {
                tokio::spawn(timeout(PROBE_LIMIT, PgConnection::close(connection)));
                Ok(())
            }
            Ok(Err(error)) => Err(DatabaseError::connecting(error)),
            Err(_) => Err(DatabaseError::unreachable(PROBE_LIMIT)),
        };
        *probed = Some((Instant::now(), outcome.clone()));
        outcome
    }
}
