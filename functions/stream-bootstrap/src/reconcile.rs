//! Applies the desired state at start and at an interval.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bootstrap::Bootstrap;
use crate::desired::Desired;
use crate::error::Error;
use crate::handler::log_done;
use crate::settings::Settings;
use crate::state::State;
use base::backoff::Backoff;
use base::error::Fatal;
use service::ctx::Ctx;
use service::job::{Description, Done, Failure, Job, Next, Schedule, until_success};
use service::meter::Meter;
use timeline::chat::Chat;

/// Between attempts at start, while a server is down or another replica applies.
const START_PAUSE: Duration = Duration::from_millis(250);
/// What a failed attempt means, for the operators' log.
const FAILING: &str = "streams, consumers and schema are not applied yet; trying again until they \
                       are; if this stays, look at what the error names";

/// Applies the desired state before the function registers; keeps trying while that may help.
///
/// # Errors
/// The configuration is wrong, or an operator has to fix what the line names.
pub async fn apply_at_start(ctx: Ctx) -> Result<State, Fatal> {
    let chat = Chat::open(&ctx)?;
    let settings: Settings = ctx.read_settings()?;
    let interval = Duration::from_millis(settings.bootstrap_interval_ms);
    let desired = Desired::read(
        settings.bootstrap_config.as_deref(),
        settings.bootstrap_allow_replicas,
    )?;
    let bootstrap = Arc::new(Bootstrap::new(ctx.with_state(chat.clone()), desired));
    until_success(&ctx, FAILING, Backoff::fixed(START_PAUSE), || {
        apply_once(&bootstrap)
    })
    .await?;
    Ok(State {
        chat,
        bootstrap,
        interval,
    })
}

async fn apply_once(bootstrap: &Bootstrap) -> Result<(), Failure> {
    match bootstrap.apply().await {
        Ok(done) => log_done(&done),
        // For instance because the stream is full. An operator who makes space should find this
        // function registered; the job tries again.
        Err(error @ Error::DeadLettersWaiting(_)) => tracing::warn!("{FAILING}: {error}"),
        Err(error) if error.is_transient() => return Err(retry(&error)),
        Err(error) => return Err(Failure::Fatal(error.into())),
    }
    Ok(())
}

/// The job: applies what differs, at the configured interval.
pub struct Reconcile;

impl Job<State> for Reconcile {
    const DESCRIPTION: Description = Description {
        name: "reconcile",
        subject: "timer",
        about: "Compares everything with the desired state at an interval, and applies what \
                differs",
        failing: FAILING,
        recovered: "streams, consumers and schema are applied again",
    };

    fn start(ctx: &Ctx<State>) -> (Reconcile, Schedule) {
        // The first run waits, because the start has just applied everything.
        (Reconcile, Schedule::every(ctx.interval).delayed())
    }

    async fn run(&mut self, ctx: &Ctx<State>, meter: &Meter) -> Result<Done, Failure> {
        let started = Instant::now();
        match ctx.bootstrap.reconcile().await {
            Ok(done) => log_done(&done),
            // Another replica applies what differs.
            Err(Error::Busy) => {}
            Err(error) => {
                // STATS counts every run of this job, also one that failed.
                meter.handled(1, started.elapsed());
                return Err(retry(&error));
            }
        }
        Ok(Done {
            handled: 1,
            next: Next::Idle,
        })
    }
}

fn retry(error: &Error) -> Failure {
    Failure::retry_about(error, error.topic())
}
