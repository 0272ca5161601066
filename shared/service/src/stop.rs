//! How a function stops: steps that share one deadline.
//!
//! ```text
//! signal, or the first failure
//!   Drain    requests and work under way are finished; nothing new is begun
//!   Flush    the last replies and acknowledgements leave
//!   Close    what the function opened is closed, such as the database
//!   Export   the last spans, metrics and log records leave
//!   Threads  blocking calls return
//! ```
//!
//! Each step may use what is left until the deadline, except for what the steps after it need at
//! least. A thread watches from outside, because a runtime that is blocked can watch over nothing.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use async_nats::connection::State;
use futures::future::{BoxFuture, join_all, select_all};
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::ctx::Shared;
use base::error::{Fatal, Result};

/// After this the process is ended, whatever holds it up; compose and `dev` wait 30 s before they
/// kill.
const KILL_AFTER: Duration = Duration::from_secs(25);
/// All steps together.
const ALL_STEPS: Duration = Duration::from_secs(21);
/// Of flushing, where NATS is away and would have to come back first.
const FLUSH_AWAY: Duration = Duration::from_secs(1);

/// A step of stopping, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Drain,
    Flush,
    Close,
    Export,
    Threads,
}

impl Step {
    /// The most it takes, even when more is left.
    const fn most(self) -> Duration {
        match self {
            Step::Drain => ALL_STEPS,
            Step::Flush | Step::Close => Duration::from_secs(5),
            Step::Export => Duration::from_secs(2),
            Step::Threads => Duration::from_secs(1),
        }
    }

    /// What it leaves for the steps after it.
    const fn leaves(self) -> Duration {
        Duration::from_millis(match self {
            Step::Drain => 4_000,
            Step::Flush => 3_500,
            Step::Close => 3_000,
            Step::Export => 1_000,
            Step::Threads => 0,
        })
    }
}

/// When stopping has to be over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    /// Begins now.
    pub(crate) fn start() -> Deadline {
        Deadline(Instant::now() + ALL_STEPS)
    }

    /// How long this step may take from now on.
    pub(crate) fn left_for(self, step: Step) -> Duration {
        self.left_at(Instant::now(), step)
    }

    fn left_at(self, now: Instant, step: Step) -> Duration {
        let left = self.0.saturating_duration_since(now);
        left.saturating_sub(step.leaves()).min(step.most())
    }
}

/// A function that has stopped, except for the steps that need no runtime.
#[derive(Debug)]
pub(crate) struct Ended {
    pub outcome: Result<(), Fatal>,
    pub deadline: Deadline,
}

impl Ended {
    /// Nothing was running: there is nothing to drain.
    pub(crate) fn now(outcome: Result<(), Fatal>) -> Ended {
        let deadline = Deadline::start();
        Ended { outcome, deadline }
    }
}

/// A function that was started.
#[derive(Debug)]
pub struct Running {
    pub(crate) stop: CancellationToken,
    pub(crate) task: JoinHandle<Ended>,
}

impl Running {
    /// Stops the function as SIGTERM does, and waits for its end.
    ///
    /// # Errors
    /// Why it ended, if it had not been asked to stop.
    pub async fn stop(self) -> Result<(), Fatal> {
        self.stop.cancel();
        self.ended().await
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// Why it ended, if it had not been asked to stop.
    pub async fn ended(self) -> Result<(), Fatal> {
        self.finished().await.outcome
    }

    pub(crate) async fn finished(self) -> Ended {
        self.task
            .await
            .unwrap_or_else(|error| Ended::now(Err(bad_end(&error))))
    }
}

/// Ends the process when stopping takes longer than it may: tokio itself would wait for ever for a
/// thread that is blocked.
pub(crate) fn kill_when_late(name: &'static str) {
    let seconds = KILL_AFTER.as_secs();
    let watching = std::thread::Builder::new()
        .name("stop-limit".to_owned())
        .spawn(move || {
            std::thread::sleep(KILL_AFTER);
            eprintln!("{name}: not stopped within {seconds} s; leaving without the rest");
            std::process::exit(1);
        });
    if let Err(error) = watching {
        tracing::warn!(%error, "no thread watches over stopping: a process that hangs will stay");
    }
}

/// Runs everything side by side until the function is asked to stop or the first failure, then
/// drains, flushes and closes.
pub(crate) async fn run_to_end(
    work: Vec<BoxFuture<'static, Result<(), Fatal>>>,
    mut failures: mpsc::UnboundedReceiver<Fatal>,
    shared: &Shared,
) -> Ended {
    let mut tasks: Vec<JoinHandle<Result<(), Fatal>>> =
        work.into_iter().map(tokio::spawn).collect();
    let outcome = tokio::select! {
        () = shared.stop.cancelled() => Ok(()),
        (first, index, _) = select_all(tasks.iter_mut()) => {
            tasks.swap_remove(index);
            flatten(first)
        }
        Some(fatal) = failures.recv() => Err(fatal),
        () = shared.nats.ended() => {
            Err(Fatal::new("the NATS client ended; leaving so that a fresh start can connect"))
        }
    };
    shared.stop.cancel();
    let deadline = Deadline::start();
    let outcome = outcome.and(drain(tasks, deadline).await);
    flush(shared, deadline).await;
    close(shared, deadline).await;
    Ended { outcome, deadline }
}

async fn drain(tasks: Vec<JoinHandle<Result<(), Fatal>>>, deadline: Deadline) -> Result<(), Fatal> {
    let limit = deadline.left_for(Step::Drain);
    match tokio::time::timeout(limit, join_all(tasks)).await {
        Ok(ends) => ends.into_iter().try_for_each(flatten),
        Err(_) => {
            tracing::warn!(
                "requests or work are still under way after {} s and are given up; \
                 their callers get no answer",
                limit.as_secs()
            );
            Ok(())
        }
    }
}

/// Fails or takes too long where NATS is away; the server notices by itself that we are gone.
async fn flush(shared: &Shared, deadline: Deadline) {
    let client = shared.nats.client();
    let mut limit = deadline.left_for(Step::Flush);
    if client.connection_state() != State::Connected {
        limit = limit.min(FLUSH_AWAY);
    }
    let _ = tokio::time::timeout(limit, client.flush()).await;
}

async fn close(shared: &Shared, deadline: Deadline) {
    let closing = {
        let mut closing = shared
            .closing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *closing)
    };
    let _ = tokio::time::timeout(deadline.left_for(Step::Close), join_all(closing)).await;
}

fn flatten(ended: Result<Result<(), Fatal>, JoinError>) -> Result<(), Fatal> {
    ended.unwrap_or_else(|error| Err(bad_end(&error)))
}

fn bad_end(error: &JoinError) -> Fatal {
    Fatal::new(format!("a task of this function panicked: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: [Step; 5] = [
        Step::Drain,
        Step::Flush,
        Step::Close,
        Step::Export,
        Step::Threads,
    ];

    #[test]
    fn steps_that_take_all_they_may_end_within_the_deadline() {
        let start = Instant::now();
        let deadline = Deadline(start + ALL_STEPS);
        let mut now = start;
        for step in STEPS {
            let left = deadline.left_at(now, step);
            assert!(
                left >= Duration::from_millis(500),
                "{step:?} has only {left:?}"
            );
            now += left;
        }
        assert_eq!(now - start, ALL_STEPS);
        assert!(
            KILL_AFTER >= ALL_STEPS + Duration::from_secs(2),
            "nothing is cut off"
        );
    }

    #[test]
    fn a_late_step_has_no_time_left() {
        let start = Instant::now();
        let deadline = Deadline(start + ALL_STEPS);
        assert_eq!(
            deadline.left_at(start + KILL_AFTER, Step::Export),
            Duration::ZERO
        );
        let most = deadline.left_at(start, Step::Export);
        assert_eq!(most, Duration::from_secs(2), "no longer than it needs");
    }
}
