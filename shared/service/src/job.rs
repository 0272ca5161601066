//! Jobs: work that a function repeats from start to stop.
//!
//! A job says what it is ([`Description`]), when it runs ([`Schedule`]) and what one run does
//! ([`Job::run`]). The loop stands here, once for all jobs:
//!
//! * A run that succeeds says when the next one is due ([`Next`]). What it handled is counted.
//! * A run that fails is counted as an error in STATS, logged once until the error changes, and
//!   tried again with back-off and jitter. Nothing a job does may be lost by a failed run.
//! * When NATS refuses something for want of a permission, the function ends: trying again does
//!   not help, and a process that looks well and does nothing is worse than one that is down.
//! * A wake-up ([`WakeUp`]) ends a pause early.
//! * When the function stops, the run under way may finish, and no other begins.
//!
//! # A job in full
//!
//! ```
//! use std::time::Duration;
//!
//! use service::ctx::Ctx;
//! use service::function::Function;
//! use service::job::{Description, Done, Failure, Job, Next, Schedule};
//! use service::meter::Meter;
//!
//! /// Deletes sessions that nobody used for a day.
//! struct ExpireSessions {
//!     batch: u64,
//! }
//!
//! impl Job<()> for ExpireSessions {
//!     const DESCRIPTION: Description = Description {
//!         name: "expire",
//!         subject: "sessions",
//!         about: "Deletes idle sessions; requests are sessions, errors are runs that failed",
//!         failing: "idle sessions are not deleted yet",
//!         recovered: "idle sessions are deleted again",
//!     };
//!
//!     fn start(_: &Ctx) -> (Self, Schedule) {
//!         let schedule = Schedule::every(Duration::from_secs(60))
//!             .retry(Duration::from_secs(1), Duration::from_secs(60))
//!             .timeout(Duration::from_secs(20));
//!         (ExpireSessions { batch: 1_000 }, schedule)
//!     }
//!
//!     async fn run(&mut self, _: &Ctx, _: &Meter) -> Result<Done, Failure> {
//!         let deleted = delete(self.batch).await.map_err(Failure::retry)?;
//!         let next = if deleted == self.batch { Next::Again } else { Next::Idle };
//!         Ok(Done { handled: deleted, next })
//!     }
//! }
//!
//! # async fn delete(_: u64) -> Result<u64, std::io::Error> { Ok(0) }
//! let function = Function::new(service::this!("example")).job::<ExpireSessions>();
//! # let _ = function;
//! ```
//!
//! # What a function needs before it can start
//!
//! [`until_success`] repeats an attempt with the same back-off, the same log and the same rule for
//! missing permissions. Call it in the function's setup.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{FutureExt, StreamExt};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::ctx::Ctx;
use crate::meter::Meter;
use base::backoff::Backoff;
use base::error::Fatal;
use base::log_once::LogOnce;
use nats::connection::Connection;

/// Work that is repeated; `S` is the function's state. See the [module](self).
pub trait Job<S>: Sized + Send + 'static {
    /// What the job is.
    const DESCRIPTION: Description;

    /// The job and when it runs. Called once, after the function's setup.
    fn start(ctx: &Ctx<S>) -> (Self, Schedule);

    /// One run. It is dropped in the middle when it exceeds the schedule's timeout, never because
    /// the function stops.
    ///
    /// # Errors
    /// [`Failure`]: whether to try again.
    fn run(
        &mut self,
        ctx: &Ctx<S>,
        meter: &Meter,
    ) -> impl Future<Output = Result<Done, Failure>> + Send;

    /// A wake-up came: called before the run that it causes.
    fn woken(&mut self) {}
}

/// What a job is, for STATS and for the log.
#[derive(Debug, Clone, Copy)]
pub struct Description {
    /// Its name in STATS and metrics, beside those of the endpoints: no dots.
    pub name: &'static str,
    /// What it works on: a subject, a stream, a table.
    pub subject: &'static str,
    /// What it is for, and what STATS counts as its requests and errors.
    pub about: &'static str,
    /// What it means that a run failed, for the log; the error follows after a colon.
    pub failing: &'static str,
    /// The line when runs succeed again.
    pub recovered: &'static str,
}

/// When a job runs.
#[derive(Debug)]
pub struct Schedule {
    idle: Duration,
    backoff: Backoff,
    timeout: Option<Duration>,
    delayed: bool,
    wake_up: WakeUp,
}

impl Schedule {
    /// Runs at start, then `idle` after a run that found nothing more to do; as often while runs
    /// fail.
    pub fn every(idle: Duration) -> Schedule {
        Schedule {
            idle,
            backoff: Backoff::fixed(idle),
            timeout: None,
            delayed: false,
            wake_up: WakeUp::Never,
        }
    }

    /// The pauses after a failed run and after [`Next::Soon`]: from `first` doubling to `longest`.
    #[must_use]
    pub fn retry(mut self, first: Duration, longest: Duration) -> Schedule {
        self.backoff = Backoff::new(first, longest);
        self
    }

    /// A run that takes longer has failed: its future is dropped. Without this, a run must limit
    /// everything it waits for.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Schedule {
        self.timeout = Some(timeout);
        self
    }

    /// The first run waits for an interval, because the function's setup has done the same.
    #[must_use]
    pub fn delayed(mut self) -> Schedule {
        self.delayed = true;
        self
    }

    /// What ends a pause early.
    #[must_use]
    pub fn wake_up(mut self, wake_up: WakeUp) -> Schedule {
        self.wake_up = wake_up;
        self
    }
}

/// What ends a job's pause early.
#[derive(Debug, Clone)]
pub enum WakeUp {
    /// Nothing.
    Never,
    /// A message on this subject: a hint that there is work. Hints that came before a run are
    /// forgotten when it starts, because it finds what they are about. Not heard after a failed
    /// run: a server that is away does not come back for being asked more often.
    Subject(&'static str),
    /// A request from within the function, heard after a failed run, too.
    Notify(Arc<Notify>),
}

/// A run that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// What it handled, in the unit of [`Description::about`]; shown in STATS as requests.
    pub handled: u64,
    /// When the next run is due.
    pub next: Next,
}

/// When the next run is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// At once: there may be more to do.
    Again,
    /// After a short pause, longer each time: there is something to do, but not yet.
    Soon,
    /// After this pause.
    After(Duration),
    /// After the interval: there is nothing to do.
    Idle,
}

/// Why a run failed.
#[derive(Debug)]
pub enum Failure {
    /// It may succeed later.
    Retry {
        /// For the log and for STATS. Never a message's text.
        error: String,
        /// What the error is about, if `error` holds figures that change each time: the log has
        /// one line for each topic.
        topic: Option<String>,
    },
    /// It will never succeed: the function ends.
    Fatal(Fatal),
}

impl Failure {
    /// It may succeed later.
    pub fn retry(error: impl fmt::Display) -> Failure {
        Failure::Retry {
            error: error.to_string(),
            topic: None,
        }
    }

    /// The same with a topic, so that an error whose figures change is logged once.
    pub fn retry_about(error: impl fmt::Display, topic: impl Into<String>) -> Failure {
        Failure::Retry {
            error: error.to_string(),
            topic: Some(topic.into()),
        }
    }
}

impl From<Fatal> for Failure {
    fn from(fatal: Fatal) -> Failure {
        Failure::Fatal(fatal)
    }
}

/// Runs a job until the function stops.
pub(crate) async fn repeat<S, J>(ctx: Ctx<S>, meter: Meter) -> Result<(), Fatal>
where
    S: Send + Sync + 'static,
    J: Job<S>,
{
    let (mut job, schedule) = J::start(&ctx);
    let mut wake_ups = schedule.wake_up.listen(ctx.nats()).await?;
    let mut attempts = Attempts::new(J::DESCRIPTION.failing, schedule.backoff);
    let mut pause = schedule.delayed.then_some(schedule.idle);
    let mut failed = false;
    loop {
        if let Some(pause) = pause {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                woken = wake_ups.next(failed) => {
                    woken?;
                    attempts.backoff.reset();
                    job.woken();
                }
                () = ctx.stop().cancelled() => {}
            }
        }
        if ctx.stop().is_cancelled() {
            return Ok(());
        }
        wake_ups.forget_hints();
        let begun = Instant::now();
        let outcome = limited(schedule.timeout, job.run(&ctx, &meter)).await;
        failed = outcome.is_err();
        pause = match outcome {
            Ok(done) => {
                if attempts.log.recovered() {
                    tracing::info!(job = J::DESCRIPTION.name, "{}", J::DESCRIPTION.recovered);
                }
                if done.handled > 0 {
                    meter.handled(done.handled, begun.elapsed());
                }
                attempts.pause_before(done.next, schedule.idle)
            }
            Err(Failure::Fatal(fatal)) => return Err(fatal),
            Err(Failure::Retry { error, topic }) => {
                attempts.failed(&error, topic.as_deref(), ctx.nats())?;
                meter.refused(error);
                Some(attempts.backoff.next_pause())
            }
        };
    }
}

async fn limited(
    timeout: Option<Duration>,
    run: impl Future<Output = Result<Done, Failure>>,
) -> Result<Done, Failure> {
    let Some(limit) = timeout else {
        return run.await;
    };
    let late = |_| {
        Failure::retry(format!(
            "a run was given up after {} s",
            limit.as_secs_f32()
        ))
    };
    tokio::time::timeout(limit, run).await.map_err(late)?
}

/// Repeats `attempt` until it succeeds, for what a function needs before it can start. `failing`
/// says in the log what an error means.
///
/// # Errors
/// The attempt failed for good, NATS refuses something for want of a permission, or the function
/// is stopped.
pub async fn until_success<S, T, F>(
    ctx: &Ctx<S>,
    failing: &'static str,
    backoff: Backoff,
    // Not `AsyncFnMut`: the compiler does not see that the futures of such a closure are `Send`.
    mut attempt: impl FnMut() -> F,
) -> Result<T, Fatal>
where
    F: Future<Output = Result<T, Failure>>,
{
    let mut attempts = Attempts::new(failing, backoff);
    loop {
        match attempt().await {
            Ok(done) => return Ok(done),
            Err(Failure::Fatal(fatal)) => return Err(fatal),
            Err(Failure::Retry { error, topic }) => {
                attempts.failed(&error, topic.as_deref(), ctx.nats())?;
                attempts.pause(&error, ctx.stop()).await?;
            }
        }
    }
}

/// What one attempt after another shares: the pauses between them and what was logged.
struct Attempts {
    failing: &'static str,
    backoff: Backoff,
    log: LogOnce,
}

impl Attempts {
    fn new(failing: &'static str, backoff: Backoff) -> Attempts {
        Attempts {
            failing,
            backoff,
            log: LogOnce::default(),
        }
    }

    /// Logs `error` unless its topic was logged before; an error when NATS lacks a permission.
    fn failed(&mut self, error: &str, topic: Option<&str>, nats: &Connection) -> Result<(), Fatal> {
        if self.log.is_news(topic.unwrap_or(error)) {
            tracing::warn!("{}: {error}", self.failing);
        }
        nats.check_permissions()
    }

    /// `None`: at once.
    fn pause_before(&mut self, next: Next, idle: Duration) -> Option<Duration> {
        if next == Next::Soon {
            return Some(self.backoff.next_pause());
        }
        self.backoff.reset();
        match next {
            Next::Again => None,
            Next::After(pause) => Some(pause),
            Next::Idle | Next::Soon => Some(idle),
        }
    }

    async fn pause(&mut self, error: &str, stop: &CancellationToken) -> Result<(), Fatal> {
        tokio::select! {
            () = tokio::time::sleep(self.backoff.next_pause()) => Ok(()),
            () = stop.cancelled() => {
                Err(Fatal::new(format!("stopped while starting; {}: {error}", self.failing)))
            }
        }
    }
}

impl WakeUp {
    async fn listen(self, nats: &Connection) -> Result<WakeUps, Fatal> {
        Ok(match self {
            WakeUp::Never => WakeUps::Never,
            WakeUp::Notify(notify) => WakeUps::Notify(notify),
            WakeUp::Subject(subject) => {
                let subscribed = nats.client().subscribe(subject).await;
                WakeUps::Subject(subscribed.map_err(|error| {
                    Fatal::new(format!("cannot subscribe to {subject}: {error}"))
                })?)
            }
        })
    }
}

/// A [`WakeUp`] that is listened to.
enum WakeUps {
    Never,
    Subject(async_nats::Subscriber),
    Notify(Arc<Notify>),
}

impl WakeUps {
    async fn next(&mut self, failed: bool) -> Result<(), Fatal> {
        match self {
            WakeUps::Notify(notify) => notify.notified().await,
            WakeUps::Subject(hints) if !failed => {
                let closed = || Fatal::new("the connection to NATS is closed");
                hints.next().await.ok_or_else(closed)?;
            }
            WakeUps::Never | WakeUps::Subject(_) => std::future::pending().await,
        }
        Ok(())
    }

    fn forget_hints(&mut self) {
        if let WakeUps::Subject(hints) = self {
            while hints.next().now_or_never().flatten().is_some() {}
        }
    }
}
