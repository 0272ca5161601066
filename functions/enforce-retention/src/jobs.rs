//! The jobs: trimming the stream, and deleting expired messages.

use std::time::{Duration, Instant};

use crate::budget::StreamStatus;
use crate::expire::{Pass, Step};
use crate::state::State;
use crate::{clock, expire, trim};
use base::error::Result;
use protocol::subject::STREAM;
use service::ctx::Ctx;
use service::job::{Description, Done, Failure, Job, Next, Schedule, WakeUp};
use service::meter::Meter;

/// The stream is measured at least this often, whatever the interval: it may fill within a minute.
const MEASURE_INTERVAL: Duration = Duration::from_secs(1);

/// Trims the stream at the configured interval, and at once when it is nearly full.
pub struct Trim {
    trimmed_at: Option<Instant>,
}

impl Job<State> for Trim {
    const DESCRIPTION: Description = Description {
        name: "trim",
        subject: STREAM,
        about: "Trims the stream up to what is stored; requests are messages, errors are runs \
                that failed",
        failing: "the stream is not trimmed, so it keeps growing; trying again every second; if \
                  this stays, look at the server that the error names",
        recovered: "the stream is trimmed again",
    };

    fn start(ctx: &Ctx<State>) -> (Trim, Schedule) {
        let schedule = Schedule::every(MEASURE_INTERVAL.min(ctx.interval()));
        (Trim { trimmed_at: None }, schedule)
    }

    async fn run(&mut self, ctx: &Ctx<State>, meter: &Meter) -> Result<Done, Failure> {
        let trimmed = self
            .measure_and_trim(ctx, meter)
            .await
            .map_err(Failure::retry)?;
        if trimmed > 0 {
            tracing::info!(trimmed, "the stream was trimmed");
        }
        Ok(Done {
            handled: trimmed,
            next: Next::Idle,
        })
    }
}

impl Trim {
    async fn measure_and_trim(&mut self, ctx: &Ctx<State>, meter: &Meter) -> Result<u64> {
        let status = StreamStatus::read(ctx).await?;
        let rate = ctx.rate.lock().await.add(&status);
        let budget = status.budget(rate);
        meter.gauge("log_bytes", budget.bytes);
        meter.gauge("log_unstored_bytes", budget.unstored_bytes);
        meter.gauge("log_bytes_per_second", budget.bytes_per_second);
        if let Some(max_bytes) = budget.max_bytes {
            meter.gauge("log_max_bytes", max_bytes);
        }
        // A gauge cannot be infinite: while nothing is appended, it is a century.
        meter.gauge(
            "log_seconds_left",
            budget.seconds_left.unwrap_or(u64::from(u32::MAX)),
        );
        let is_due = self
            .trimmed_at
            .is_none_or(|at| at.elapsed() >= ctx.interval());
        if !is_due && !status.is_above_watermark() {
            return Ok(0);
        }
        let trimmed = trim::trim(ctx, false).await?;
        self.trimmed_at = Some(Instant::now());
        Ok(trimmed.unwrap_or(0))
    }
}

/// Deletes expired messages at the configured interval, step by step.
pub struct Expire {
    pass: Pass,
}

impl Job<State> for Expire {
    const DESCRIPTION: Description = Description {
        // STATS showed this name before expiring was called so.
        name: "sweep",
        subject: "messages",
        about: "Deletes expired messages; requests are messages, errors are runs that failed",
        failing: "expired messages are not deleted, although nobody can read them; trying again; \
                  if this stays, look at the server that the error names",
        recovered: "expired messages are deleted again",
    };

    fn start(ctx: &Ctx<State>) -> (Expire, Schedule) {
        let schedule =
            Schedule::every(ctx.interval()).wake_up(WakeUp::Notify(ctx.expire_now.clone()));
        let pass = Pass::default();
        (Expire { pass }, schedule)
    }

    async fn run(&mut self, ctx: &Ctx<State>, meter: &Meter) -> Result<Done, Failure> {
        let started = Instant::now();
        let step = self
            .prepare_and_step(ctx, meter)
            .await
            .map_err(Failure::retry)?;
        // Without a step, another replica deletes expired messages.
        let Some(step) = step else {
            return Ok(Done {
                handled: 0,
                next: Next::Idle,
            });
        };
        meter.count("moves", step.receipts);
        let next = if step.done {
            Next::Idle
        } else {
            Next::After(expire::pause_after(started.elapsed()))
        };
        Ok(Done {
            handled: step.expired,
            next,
        })
    }

    /// A request stopped in the middle of a pass, so we start a new one.
    fn woken(&mut self) {
        self.pass = Pass::default();
    }
}

impl Expire {
    /// One step, after the default retention and NATS' time are written where readers find them.
    async fn prepare_and_step(&mut self, ctx: &Ctx<State>, meter: &Meter) -> Result<Option<Step>> {
        expire::set_default(ctx).await?;
        let offset = clock::synchronize(ctx).await?;
        meter.gauge("clock_disagreement_s", offset.seconds_apart());
        offset.within(ctx.settings.clock_tolerance_hours)?;
        self.pass.step(ctx, false).await
    }
}
