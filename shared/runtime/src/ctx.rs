//! What a handler may touch.

use std::fmt;
use std::ops::Deref;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{Connection, Database, Fatal, Identity, Log, Settings, Vars, Worker};

pub(crate) type Clock = Box<dyn Fn() -> SystemTime + Send + Sync>;

/// What a handler may touch; `S` is the function's own.
pub struct Ctx<S = ()> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) state: Arc<S>,
}

pub(crate) struct Shared {
    pub identity: Identity,
    pub settings: Settings,
    pub vars: Vars,
    pub nats: Connection,
    pub database: Database,
    pub log: Arc<Log>,
    pub clock: Clock,
    pub stop: CancellationToken,
    /// Where tasks that the function cannot do without report their panics.
    pub failed: mpsc::UnboundedSender<Fatal>,
}

impl<S> Clone for Ctx<S> {
    fn clone(&self) -> Self {
        Ctx {
            shared: self.shared.clone(),
            state: self.state.clone(),
        }
    }
}

impl<S> fmt::Debug for Ctx<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ctx")
            .field("function", &self.shared.identity.name)
            .finish_non_exhaustive()
    }
}

/// The function's own state.
impl<S> Deref for Ctx<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.state
    }
}

impl<S> Ctx<S> {
    /// Who we are.
    pub fn identity(&self) -> Identity {
        self.shared.identity
    }

    /// What every function is configured with.
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// The environment, for settings of the function's own.
    pub fn vars(&self) -> &Vars {
        &self.shared.vars
    }

    /// The connection the service API uses; not for receiving messages of the log.
    pub fn nats(&self) -> &Connection {
        &self.shared.nats
    }

    /// PostgreSQL.
    pub fn database(&self) -> &Database {
        &self.shared.database
    }

    /// The log, for reading.
    pub fn log(&self) -> &Log {
        &self.shared.log
    }

    /// What the log took at this time, in Unix milliseconds, or before has expired, by our clock and without asking the table
    /// `retention`: for while PostgreSQL is away. `None` where nothing expires.
    pub fn cutoff_ms(&self) -> Option<i64> {
        self.shared.settings.cutoff_ms((self.shared.clock)())
    }

    /// Cancelled when the process is told to stop.
    pub fn stop(&self) -> &CancellationToken {
        &self.shared.stop
    }

    /// Spawns a task that the function cannot do without: its panic ends the process, with `what` in the line, so that a
    /// fresh start can go on. Without that, the process would look well and no longer do its work.
    pub fn spawn_essential(
        &self,
        what: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let failed = self.shared.failed.clone();
        tokio::spawn(async move {
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                let _ = failed.send(Fatal::new(format!(
                    "the task that {what} panicked; leaving so that a fresh start can"
                )));
            }
        });
    }

    /// This copy's part in consuming the log: at most `max_batch` messages at once, and an error when
    /// nothing moves for `stuck_after`.
    pub fn worker(&self, max_batch: usize, stuck_after: Duration) -> Worker {
        let shared = &self.shared;
        Worker::new(
            shared.nats.clone(),
            shared.log.clone(),
            shared.settings.clone(),
            shared.identity.name,
            shared.stop.clone(),
            max_batch,
            stuck_after,
        )
    }
}
