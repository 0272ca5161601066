//! Keeps the log, its consumer and the database schema as shipped, and sequences above what is stored.
//! Answers `bootstrap.check` and `bootstrap.apply`, and does both by itself at start and from time to time;
//! `bootstrap.audit` and `bootstrap.replay` when asked.

use timeline::chat::Chat;

mod audit;
mod bootstrap;
mod compare;
mod deletions;
mod events;
mod fence;
mod letters;
mod object;
mod replay;
mod schema;
mod shipped;

#[cfg(test)]
mod tests;
mod trouble;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base::error::{Error, Fatal, Result};
use bootstrap::{Bootstrap, Own};
use protocol::audit::{Audit, AuditRequest, ReplayRequest, Replayed};
use protocol::bootstrap::{Applied, Check, EmptyRequest};
use protocol::endpoints::{BOOTSTRAP_APPLY, BOOTSTRAP_AUDIT, BOOTSTRAP_CHECK, BOOTSTRAP_REPLAY};
use service::ctx::Ctx;
use service::function::Function;
use service::meter::Meter;
use service::request::{Reply, Request};
use service::this;
use shipped::Shipped;
use trouble::Trouble;

/// Between attempts while something is away, or another copy is applying.
const PAUSE: Duration = Duration::from_millis(250);

/// What one copy has.
struct State {
    chat: Chat,
    bootstrap: Arc<Bootstrap>,
    interval: Duration,
}

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<State> {
    let function = Function::with(this!(), apply_at_start)
        .settings(
            "
  BOOTSTRAP_CONFIG         a directory with streams/ and consumers/, instead of what is shipped
  BOOTSTRAP_INTERVAL_MS    how often everything is looked at (30000)
  BOOTSTRAP_ALLOW_REPLICAS true: num_replicas above 1 are taken, although reads may then miss what was acknowledged (false)",
        )
        .answer(BOOTSTRAP_CHECK, check)
        .answer(BOOTSTRAP_APPLY, apply)
        .answer(BOOTSTRAP_AUDIT, audit_log)
        .answer(BOOTSTRAP_REPLAY, replay_log);
    function.work(
        "reconcile",
        "timer",
        "Looks from time to time, and mends what differs",
        reconcile,
    )
}

async fn apply_at_start(ctx: Ctx) -> Result<State, Fatal> {
    let chat = Chat::open(&ctx)?;
    let own: Own = ctx.vars().read()?;
    let interval = own.interval()?;
    let shipped = Shipped::read(
        own.bootstrap_config.as_deref(),
        own.bootstrap_allow_replicas,
    )?;
    let bootstrap = Arc::new(Bootstrap::new(ctx.with_state(chat.clone()), shipped));
    let mut told = String::new();
    loop {
        match bootstrap.apply().await {
            Ok(done) => {
                tell(&done);
                return Ok(State {
                    chat,
                    bootstrap,
                    interval,
                });
            }
            // A full log, for instance. Whoever has to make room should find us registered; the timer goes on.
            Err(trouble @ Trouble::LettersWait(_)) => {
                tell_once(&trouble, &mut told);
                return Ok(State {
                    chat,
                    bootstrap,
                    interval,
                });
            }
            Err(trouble) if trouble.passes() => tell_once(&trouble, &mut told),
            Err(trouble) => return Err(trouble.into()),
        }
        if let Some(objection) = ctx.nats().refused() {
            return Err(Fatal::new(format!(
                "NATS refuses this user what it needs: {objection}; check nats/accounts.conf"
            )));
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = ctx.stop().cancelled() => return Err(Fatal::new(format!("stopped while waiting for {told}"))),
        }
    }
}

async fn check(ctx: Ctx<State>, _: Request<EmptyRequest>) -> Result<Reply<Check>> {
    Reply::json(&ctx.bootstrap.check().await?)
}

async fn apply(ctx: Ctx<State>, _: Request<EmptyRequest>) -> Result<Reply<Applied>> {
    let done = to_the_end(&ctx, |bootstrap| async move { bootstrap.apply().await }).await?;
    tell(&done);
    Reply::json(&Applied { done })
}

async fn audit_log(ctx: Ctx<State>, request: Request<AuditRequest>) -> Result<Reply<Audit>> {
    Reply::json(&audit::audit(&ctx, request.body).await?)
}

async fn replay_log(ctx: Ctx<State>, request: Request<ReplayRequest>) -> Result<Reply<Replayed>> {
    let from = request.body.from;
    let (done, replayed) = to_the_end(&ctx, move |bootstrap| async move {
        bootstrap.replay(from).await
    })
    .await?;
    tell(&done);
    tracing::info!(from = %replayed.from, through = %replayed.through, "the log is delivered again");
    Reply::json(&replayed)
}

/// Waits while another copy is at it. On its own: a fence or a replay that is half done must not be left so because
/// a caller's deadline has passed.
async fn to_the_end<T, W, F>(ctx: &Ctx<State>, work: W) -> Result<T>
where
    T: Send + 'static,
    W: Fn(Arc<Bootstrap>) -> F + Send + 'static,
    F: Future<Output = Result<T, Trouble>> + Send,
{
    let (bootstrap, stop) = (ctx.bootstrap.clone(), ctx.stop().clone());
    let working = tokio::spawn(async move {
        loop {
            match work(bootstrap.clone()).await {
                Err(Trouble::Busy) if !stop.is_cancelled() => tokio::time::sleep(PAUSE).await,
                outcome => return outcome,
            }
        }
    });
    Ok(working.await.map_err(Error::internal)??)
}

async fn reconcile(ctx: Ctx<State>, meter: Meter) -> Result<(), Fatal> {
    let mut told = String::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(ctx.interval) => {}
            () = ctx.stop().cancelled() => return Ok(()),
        }
        let begun = Instant::now();
        match mend(&ctx.bootstrap).await {
            Ok(done) => {
                tell(&done);
                told.clear();
            }
            Err(Trouble::Busy) => {}
            Err(trouble) => {
                meter.refused(trouble.to_string());
                tell_once(&trouble, &mut told);
            }
        }
        meter.handled(1, begun.elapsed());
    }
}

async fn mend(bootstrap: &Bootstrap) -> Result<Vec<String>, Trouble> {
    if bootstrap.check().await?.ok {
        Ok(Vec::new())
    } else {
        bootstrap.apply().await
    }
}

fn tell(done: &[String]) {
    for sentence in done {
        tracing::info!("{sentence}");
    }
}

/// The same trouble is worth one line, however often it is met.
fn tell_once(trouble: &Trouble, told: &mut String) {
    if *told != trouble.topic() {
        tracing::warn!("not applied yet: {trouble}");
        *told = trouble.topic();
    }
}
