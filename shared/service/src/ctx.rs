//! What a handler may touch.

use std::fmt;
use std::ops::Deref;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::{Declared, Settings, Variable, Vars};
use crate::function::Identity;
use base::error::Fatal;
use nats::connection::Connection;

/// Tells the time; a test sets it.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// Asks a server that the function depends on whether it answers; an error says what does not.
pub(crate) type HealthCheck = Box<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// What a handler may touch; `S` is the function's own.
pub struct Ctx<S = ()> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) state: Arc<S>,
}

pub(crate) struct Shared {
    pub identity: Identity,
    pub settings: Settings,
    pub vars: Vars,
    /// What `--help` shows, and what may be read.
    pub declared: Vec<Variable>,
    pub nats: Connection,
    pub clock: Clock,
    pub health_checks: Mutex<Vec<HealthCheck>>,
    /// What is to be closed when everything else is done.
    pub closing: Mutex<Vec<BoxFuture<'static, ()>>>,
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
    /// The same with another state: for the parts of a function that are made during its setup.
    pub fn with_state<T>(&self, state: T) -> Ctx<T> {
        Ctx {
            shared: self.shared.clone(),
            state: Arc::new(state),
        }
    }

    /// Who we are.
    pub fn identity(&self) -> Identity {
        self.shared.identity
    }

    /// What every function is configured with.
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// Reads settings that the function declared with
    /// [`Function::settings`](crate::function::Function::settings).
    ///
    /// # Errors
    /// Names the variable that is missing or wrong.
    pub fn read_settings<T: Declared>(&self) -> Result<T, Fatal> {
        let declared = |field| {
            self.shared
                .declared
                .iter()
                .any(|known| known.field == field)
        };
        match T::VARIABLES.iter().find(|read| !declared(read.field)) {
            None => self.shared.vars.read(),
            Some(read) => Err(Fatal::new(format!(
                "{} is read and not declared: --help would not show it; add .settings::<…>()",
                read.name()
            ))),
        }
    }

    /// The connection the service API uses; not for receiving messages of the log.
    pub fn nats(&self) -> &Connection {
        &self.shared.nats
    }

    /// Tells the time.
    pub fn clock(&self) -> Clock {
        self.shared.clock.clone()
    }

    /// From now on the function counts as healthy only while `check` succeeds; its error says what does not answer.
    pub fn add_health_check<F>(&self, check: impl Fn() -> F + Send + Sync + 'static)
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        let check: HealthCheck = Box::new(move || check().boxed());
        self.shared
            .health_checks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(check);
    }

    /// Runs `close` when the function stops, after all requests and all work.
    pub fn on_stop(&self, close: impl Future<Output = ()> + Send + 'static) {
        self.shared
            .closing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(close.boxed());
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
}
