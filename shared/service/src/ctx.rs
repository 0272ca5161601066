//! The context of handlers and jobs.

use std::fmt;
use std::ops::Deref;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::{Declarations, Declared, Settings, Vars};
use crate::function::Identity;
use base::error::Fatal;
use nats::connection::Connection;

/// The current time; a test sets it.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// Checks that a server the function depends on answers; the error says which one does not.
pub(crate) type HealthCheck = Box<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// What handlers and jobs may use. Dereferences to `S`, the function's state.
pub struct Ctx<S = ()> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) state: Arc<S>,
}

pub(crate) struct Shared {
    pub identity: Identity,
    pub settings: Settings,
    pub vars: Vars,
    /// What `--help` shows, and what may be read.
    pub declared: Declarations,
    pub nats: Connection,
    pub clock: Clock,
    pub health_checks: Mutex<Vec<HealthCheck>>,
    /// Run when all requests and all work are done.
    pub closing: Mutex<Vec<BoxFuture<'static, ()>>>,
    pub stop: CancellationToken,
    /// Essential tasks report their panics here.
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
    /// The same context with another state, for parts of a function that its setup creates.
    pub fn with_state<T>(&self, state: T) -> Ctx<T> {
        Ctx {
            shared: self.shared.clone(),
            state: Arc::new(state),
        }
    }

    /// The function's identity.
    pub fn identity(&self) -> Identity {
        self.shared.identity
    }

    /// The settings that every function has.
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// Reads settings that the function declared with
    /// [`Function::settings`](crate::function::Function::settings).
    ///
    /// # Errors
    /// Names the variable that is missing or wrong.
    pub fn read_settings<T: Declared>(&self) -> Result<T, Fatal> {
        let known = self.shared.declared.variables();
        let declared = |field| known.iter().any(|variable| variable.field == field);
        match T::VARIABLES.iter().find(|read| !declared(read.field)) {
            None => self.shared.vars.read(),
            Some(read) => Err(Fatal::new(format!(
                "{} is read and not declared: --help would not show it; add .settings::<…>()",
                read.name()
            ))),
        }
    }

    /// The connection that replies go out on. Do not receive messages on it whose headers others
    /// wrote: malformed headers break it.
    pub fn nats(&self) -> &Connection {
        &self.shared.nats
    }

    /// The clock.
    pub fn clock(&self) -> Clock {
        self.shared.clock.clone()
    }

    /// From now on the function is healthy only while `check` succeeds. Its error says which server
    /// does not answer.
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

    /// Cancelled when the function stops.
    pub fn stop(&self) -> &CancellationToken {
        &self.shared.stop
    }

    /// Spawns a task that the function needs. Its panic ends the process, so that it is started
    /// again; otherwise the process would look healthy and no longer do its work. `what` completes
    /// the error: "the task that … panicked".
    pub fn spawn_essential(
        &self,
        what: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let failed = self.shared.failed.clone();
        tokio::spawn(async move {
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                let _ = failed.send(Fatal::new(format!(
                    "the task that {what} panicked; leaving so that a fresh start can run it"
                )));
            }
        });
    }
}
