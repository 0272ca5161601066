//! The endpoints: status, run and erase.

use std::time::{Duration, Instant};

use crate::budget::StreamStatus;
use crate::expire::Pass;
use crate::state::State;
use crate::{clock, erase, expire, trim};
use base::error::Result;
use protocol::bootstrap::EmptyRequest;
use protocol::retention::{Budget, EraseRequest, Erased, RetentionReport, RetentionRequest};
use service::ctx::Ctx;
use service::request::{Reply, Request};

/// Between attempts of a request while a job or another replica does a step.
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// Percent of the request's deadline after which no new step starts. The rest is for the step under
/// way and for the reply.
const PART_OF_DEADLINE: u32 = 60;

/// `retention.status`.
pub async fn status(ctx: Ctx<State>, _: Request<EmptyRequest>) -> Result<Reply<Budget>> {
    let status = StreamStatus::read(&ctx).await?;
    let rate = ctx.rate.lock().await.add(&status);
    Reply::json(&status.budget(rate))
}

/// `retention.run`.
pub async fn run(
    ctx: Ctx<State>,
    request: Request<RetentionRequest>,
) -> Result<Reply<RetentionReport>> {
    let dry_run = request.body.dry_run;
    let time_limit = Instant::now() + part_of_deadline(&ctx);
    if !dry_run {
        expire::set_default(&ctx).await?;
        clock::synchronize(&ctx).await?;
    }
    let mut pass = Pass::default();
    let mut trimmed = None;
    let mut report = RetentionReport {
        trimmed: 0,
        expired: 0,
        moves: 0,
        more: true,
        dry_run,
    };
    while report.more && Instant::now() < time_limit {
        if trimmed.is_none() {
            trimmed = trim::trim(&ctx, dry_run).await?;
        }
        match pass.step(&ctx, dry_run).await? {
            Some(step) => {
                report.expired += step.expired;
                report.moves += step.receipts;
                report.more = !(step.done && trimmed.is_some());
            }
            None => tokio::time::sleep(BUSY_PAUSE).await,
        }
    }
    report.trimmed = trimmed.unwrap_or(0);
    // The job continues where this request stops, at its own pace.
    if report.more && !dry_run {
        ctx.expire_now.notify_one();
    }
    Reply::json(&report)
}

/// `retention.erase`.
pub async fn erase(ctx: Ctx<State>, request: Request<EraseRequest>) -> Result<Reply<Erased>> {
    let time_limit = Instant::now() + part_of_deadline(&ctx);
    Reply::json(&erase::erase(&ctx, &request.body, time_limit).await?)
}

fn part_of_deadline(ctx: &Ctx<State>) -> Duration {
    ctx.settings().request_deadline() * PART_OF_DEADLINE / 100
}
