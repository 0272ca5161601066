//! Applies the desired state at start and at an interval.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bootstrap::{Bootstrap, Own};
use crate::desired::Desired;
use crate::error::Error;
use crate::handler::{State, log_done};
use base::error::Fatal;
use service::ctx::Ctx;
use service::meter::Meter;
use timeline::chat::Chat;

/// Between attempts at start, while a server is down or another replica applies.
const START_PAUSE: Duration = Duration::from_millis(250);

/// Applies the desired state before the function registers; keeps trying while that may help.
///
/// # Errors
/// The configuration is wrong, or an operator has to fix what the line names.
pub async fn apply_at_start(ctx: Ctx) -> Result<State, Fatal> {
    let chat = Chat::open(&ctx)?;
    let own: Own = ctx.vars().read()?;
    let interval = own.interval()?;
    let desired = Desired::read(
        own.bootstrap_config.as_deref(),
        own.bootstrap_allow_replicas,
    )?;
    let bootstrap = Arc::new(Bootstrap::new(ctx.with_state(chat.clone()), desired));
    let state = State {
        chat,
        bootstrap: bootstrap.clone(),
        interval,
    };
    let mut logged = String::new();
    loop {
        match bootstrap.apply().await {
            Ok(done) => {
                log_done(&done);
                return Ok(state);
            }
            // For instance because the stream is full. An operator who makes space should find this
            // function registered; the job tries again.
            Err(error @ Error::DeadLettersWaiting(_)) => {
                log_once(&error, &mut logged);
                return Ok(state);
            }
            Err(error) if error.is_transient() => log_once(&error, &mut logged),
            Err(error) => return Err(error.into()),
        }
        if let Some(objection) = ctx.nats().refused() {
            return Err(Fatal::new(format!(
                "NATS refuses this user what it needs: {objection}; check nats/accounts.conf"
            )));
        }
        tokio::select! {
            () = tokio::time::sleep(START_PAUSE) => {}
            () = ctx.stop().cancelled() => {
                return Err(Fatal::new(format!("stopped while waiting for {logged}")));
            }
        }
    }
}

/// The job: applies what differs, at the configured interval.
pub async fn reconcile(ctx: Ctx<State>, meter: Meter) -> Result<(), Fatal> {
    let mut logged = String::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(ctx.interval) => {}
            () = ctx.stop().cancelled() => return Ok(()),
        }
        let started = Instant::now();
        match ctx.bootstrap.reconcile().await {
            Ok(done) => {
                log_done(&done);
                logged.clear();
            }
            Err(Error::Busy) => {}
            Err(error) => {
                meter.refused(error.to_string());
                log_once(&error, &mut logged);
            }
        }
        meter.handled(1, started.elapsed());
    }
}

/// One line for an error, however often it happens.
fn log_once(error: &Error, logged: &mut String) {
    if *logged != error.topic() {
        tracing::warn!(
            "streams, consumers and schema are not applied yet; trying again until they are; if \
             this stays, somebody has to fix what is named: {error}"
        );
        *logged = error.topic();
    }
}
