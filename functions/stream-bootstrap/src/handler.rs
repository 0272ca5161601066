//! The endpoints: check, apply, audit and replay.

use std::sync::Arc;
use std::time::Duration;

use crate::audit;
use crate::bootstrap::Bootstrap;
use crate::error::Error;
use crate::state::State;
use base::error::Result;
use protocol::audit::{Audit, AuditRequest, ReplayRequest, Replayed};
use protocol::bootstrap::{Applied, Check, EmptyRequest};
use service::ctx::Ctx;
use service::request::{Reply, Request};

/// Between attempts while another replica applies.
const BUSY_PAUSE: Duration = Duration::from_millis(250);

/// `bootstrap.check`.
pub async fn check(ctx: Ctx<State>, _: Request<EmptyRequest>) -> Result<Reply<Check>> {
    Reply::json(&ctx.bootstrap.check().await?)
}

/// `bootstrap.apply`.
pub async fn apply(ctx: Ctx<State>, _: Request<EmptyRequest>) -> Result<Reply<Applied>> {
    let done = to_the_end(&ctx, |bootstrap| async move { bootstrap.apply().await }).await?;
    log_done(&done);
    Reply::json(&Applied { done })
}

/// `bootstrap.audit`.
pub async fn audit(ctx: Ctx<State>, request: Request<AuditRequest>) -> Result<Reply<Audit>> {
    Reply::json(&audit::audit(&ctx, request.body).await?)
}

/// `bootstrap.replay`.
pub async fn replay(ctx: Ctx<State>, request: Request<ReplayRequest>) -> Result<Reply<Replayed>> {
    let from = request.body.from;
    let (done, replayed) = to_the_end(&ctx, move |bootstrap| async move {
        bootstrap.replay(from).await
    })
    .await?;
    log_done(&done);
    tracing::info!(
        from = %replayed.from,
        through = %replayed.through,
        "replay: the stream is being delivered again and stored again"
    );
    Reply::json(&replayed)
}

/// Runs `work` in a task of its own, and again while another replica applies. A sequence guard or
/// a replay must not be interrupted halfway because the caller's deadline has passed.
async fn to_the_end<T, W, F>(ctx: &Ctx<State>, work: W) -> Result<T>
where
    T: Send + 'static,
    W: Fn(Arc<Bootstrap>) -> F + Send + 'static,
    F: Future<Output = Result<T, Error>> + Send,
{
    let bootstrap = ctx.bootstrap.clone();
    let stop = ctx.stop().clone();
    let task = tokio::spawn(async move {
        loop {
            match work(bootstrap.clone()).await {
                Err(Error::Busy) if !stop.is_cancelled() => tokio::time::sleep(BUSY_PAUSE).await,
                outcome => return outcome,
            }
        }
    });
    Ok(task.await.map_err(base::error::Error::internal)??)
}

/// One line for each thing that was done.
pub fn log_done(done: &[String]) {
    for message in done {
        tracing::info!("applied: {message}");
    }
}
