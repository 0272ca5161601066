//! Keeps messages no longer than they are to be kept: trims the log from its beginning behind what is stored, sweeps what has
//! expired from the index, and erases what a user wrote when an operator asks for it.

use timeline::chat::Chat;

mod alone;
mod budget;
mod clock;
mod erase;
mod letters;
mod moves;
mod sweep;
mod swept;

#[cfg(test)]
mod tests;
mod trim;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use base::error::{Error, Fatal, Result};
use budget::{Look, Rate};
use protocol::bootstrap::EmptyRequest;
use protocol::endpoints::{RETENTION_ERASE, RETENTION_RUN, RETENTION_STATUS};
use protocol::retention::{Budget, EraseRequest, Erased, RetentionReport, RetentionRequest};
use protocol::subject::STREAM;
use serde::Deserialize;
use service::ctx::Ctx;
use service::function::Function;
use service::meter::Meter;
use service::request::{Reply, Request};
use service::this;
use sweep::{Step, Sweep};
use tokio::sync::{Mutex, Notify};

/// The log is looked at this often, whatever the interval: it may fill up in a minute.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Between attempts of a request while the timer's work, or another copy, is in the middle of a step.
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// Of the request's deadline, in percent: the rest is for the step under way and the way back.
const PART_OF_DEADLINE: u32 = 60;

/// What this function reads beyond what every function reads.
#[derive(Debug, Deserialize)]
struct Settings {
    /// `TRIM_KEEP_MESSAGES`: so many of the newest messages stay in the log.
    #[serde(default = "default_keep_messages")]
    trim_keep_messages: u64,
    /// `TRIM_KEEP_DAYS`: and those of so many days.
    #[serde(default = "default_keep_days")]
    trim_keep_days: u32,
    /// `RETENTION_INTERVAL_MS`: how often the log is trimmed and the index swept.
    #[serde(default = "default_interval_ms")]
    retention_interval_ms: u64,
    /// `CLOCK_TOLERANCE_HOURS`: nothing is swept while the clocks of PostgreSQL and NATS are further apart.
    #[serde(default = "default_tolerance_hours")]
    clock_tolerance_hours: u32,
}

const fn default_keep_messages() -> u64 {
    10_000
}
const fn default_keep_days() -> u32 {
    7
}
const fn default_interval_ms() -> u64 {
    60_000
}

const fn default_tolerance_hours() -> u32 {
    6
}
/// A year: more would guard against nothing.
const MAX_TOLERANCE_HOURS: u32 = 8_760;

/// What requests and work share.
struct Own {
    chat: Chat,
    settings: Settings,
    rate: Mutex<Rate>,
    /// Somebody wants to have it swept now.
    sweep_now: Notify,
}

impl Own {
    fn interval(&self) -> Duration {
        Duration::from_millis(self.settings.retention_interval_ms)
    }
}

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Own> {
    Function::with(this!(), async |ctx: Ctx| {
        let settings: Settings = ctx.vars().read()?;
        if settings.retention_interval_ms == 0 {
            return Err(Fatal::new("configuration: RETENTION_INTERVAL_MS must be at least 1"));
        }
        if !(1..=MAX_TOLERANCE_HOURS).contains(&settings.clock_tolerance_hours) {
            return Err(Fatal::new(format!("configuration: CLOCK_TOLERANCE_HOURS must be from 1 to {MAX_TOLERANCE_HOURS}")));
        }
        Ok(Own { chat: Chat::open(&ctx)?, settings, rate: Mutex::default(), sweep_now: Notify::new() })
    })
    .settings(
        "
  TRIM_KEEP_MESSAGES       so many of the newest messages stay in the log (10000)
  TRIM_KEEP_DAYS           and those of so many days (7)
  RETENTION_INTERVAL_MS    how often the log is trimmed and the index swept (60000)
  CLOCK_TOLERANCE_HOURS    nothing is swept while the clocks of PostgreSQL and NATS are further apart (6)",
    )
    .answer(RETENTION_RUN, run)
    .answer(RETENTION_STATUS, status)
    .answer(RETENTION_ERASE, erase_user)
    .work("trim", STREAM, "Trims the log behind what is stored; requests are messages, errors are attempts that failed", keep_trimming)
    .work("sweep", "messages", "Sweeps what has expired; requests are messages, errors are attempts that failed", keep_sweeping)
}

async fn status(ctx: Ctx<Own>, _: Request<EmptyRequest>) -> Result<Reply<Budget>> {
    let look = Look::now(&ctx).await?;
    Reply::json(&look.budget(ctx.rate.lock().await.note(&look)))
}

async fn run(ctx: Ctx<Own>, request: Request<RetentionRequest>) -> Result<Reply<RetentionReport>> {
    let (dry_run, enough) = (
        request.body.dry_run,
        Instant::now() + part_of_deadline(&ctx),
    );
    if !dry_run {
        sweep::note_default(&ctx).await?;
        clock::note(&ctx).await?;
    }
    let (mut sweep, mut trimmed, mut expired, mut moves) = (Sweep::default(), None, 0, 0);
    while Instant::now() < enough {
        if trimmed.is_none() {
            trimmed = trim::trim(&ctx, dry_run).await?;
        }
        match sweep.step(&ctx, dry_run).await? {
            Some(step) => {
                (expired, moves) = (expired + step.expired, moves + step.moves);
                if let (true, Some(trimmed)) = (step.done, trimmed) {
                    return Reply::json(&RetentionReport {
                        trimmed,
                        expired,
                        moves,
                        more: false,
                        dry_run,
                    });
                }
            }
            None => tokio::time::sleep(BUSY_PAUSE).await,
        }
    }
    // The work goes on where this left off, at its own pace.
    if !dry_run {
        ctx.sweep_now.notify_one();
    }
    Reply::json(&RetentionReport {
        trimmed: trimmed.unwrap_or(0),
        expired,
        moves,
        more: true,
        dry_run,
    })
}

async fn erase_user(ctx: Ctx<Own>, request: Request<EraseRequest>) -> Result<Reply<Erased>> {
    Reply::json(&erase::erase(&ctx, &request.body, Instant::now() + part_of_deadline(&ctx)).await?)
}

fn part_of_deadline(ctx: &Ctx<Own>) -> Duration {
    ctx.settings().request_deadline() * PART_OF_DEADLINE / 100
}

async fn keep_trimming(ctx: Ctx<Own>, meter: Meter) -> Result<(), Fatal> {
    let (mut last, mut told) = (None::<Instant>, String::new());
    loop {
        let begun = Instant::now();
        match look_and_trim(&ctx, &meter, &mut last).await {
            Ok(trimmed) => {
                told.clear();
                if trimmed > 0 {
                    meter.handled(trimmed, begun.elapsed());
                    tracing::info!(trimmed, "the log was trimmed");
                }
            }
            Err(error) => failed(&ctx, &meter, "the log is not trimmed", &error, &mut told)?,
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_INTERVAL.min(ctx.interval())) => {}
            () = ctx.stop().cancelled() => return Ok(()),
        }
    }
}

/// Trims when it is time to, or at once when the log is nearly full.
async fn look_and_trim(ctx: &Ctx<Own>, meter: &Meter, last: &mut Option<Instant>) -> Result<u64> {
    let look = Look::now(ctx).await?;
    let budget = look.budget(ctx.rate.lock().await.note(&look));
    meter.gauge("log_bytes", budget.bytes);
    meter.gauge("log_unstored_bytes", budget.unstored_bytes);
    meter.gauge("log_bytes_per_second", budget.bytes_per_second);
    if let Some(max_bytes) = budget.max_bytes {
        meter.gauge("log_max_bytes", max_bytes);
    }
    // A gauge has no "for ever": while nothing is appended, it is a century.
    meter.gauge(
        "log_seconds_left",
        budget.seconds_left.unwrap_or(u64::from(u32::MAX)),
    );
    if !look.is_pressed() && last.is_some_and(|last| last.elapsed() < ctx.interval()) {
        return Ok(0);
    }
    let trimmed = trim::trim(ctx, false).await?;
    *last = Some(Instant::now());
    Ok(trimmed.unwrap_or(0))
}

async fn keep_sweeping(ctx: Ctx<Own>, meter: Meter) -> Result<(), Fatal> {
    let (mut sweep, mut told) = (Sweep::default(), String::new());
    loop {
        let begun = Instant::now();
        let step = prepare_and_sweep(&ctx, &meter, &mut sweep).await;
        let pause = match step {
            Ok(Some(step)) => {
                told.clear();
                if step.expired > 0 {
                    meter.handled(step.expired, begun.elapsed());
                }
                meter.count("moves", step.moves);
                if step.done {
                    ctx.interval()
                } else {
                    sweep::pause_after(begun.elapsed())
                }
            }
            Ok(None) => ctx.interval(),
            Err(error) => {
                failed(
                    &ctx,
                    &meter,
                    "expired messages are not swept",
                    &error,
                    &mut told,
                )?;
                ctx.interval()
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = ctx.sweep_now.notified() => sweep = Sweep::default(),
            () = ctx.stop().cancelled() => return Ok(()),
        }
    }
}

/// One step, after what it goes by is written to where readers find it.
async fn prepare_and_sweep(
    ctx: &Ctx<Own>,
    meter: &Meter,
    sweep: &mut Sweep,
) -> Result<Option<Step>> {
    sweep::note_default(ctx).await?;
    let ahead = clock::note(ctx).await?;
    meter.gauge("clock_disagreement_s", ahead.seconds_apart());
    ahead.within(ctx.settings.clock_tolerance_hours)?;
    sweep.step(ctx, false).await
}

/// The same trouble is worth one line, however often it is met.
fn failed(
    ctx: &Ctx<Own>,
    meter: &Meter,
    what: &str,
    error: &Error,
    told: &mut String,
) -> Result<(), Fatal> {
    let line = error.to_string();
    if *told != line {
        tracing::warn!("{what}: {line}");
        told.clone_from(&line);
    }
    meter.refused(line);
    match ctx.nats().refused() {
        Some(objection) => Err(Fatal::new(format!(
            "NATS refuses this user what it needs: {objection}; check nats/accounts.conf"
        ))),
        None => Ok(()),
    }
}
