//! Keeps messages no longer than they are to be kept.
//!
//! It trims the stream from its beginning up to what is stored, deletes expired messages from
//! PostgreSQL, and erases what a user wrote when an operator asks for it.

mod budget;
mod clock;
mod dead_letters;
mod erase;
mod expire;
mod handler;
mod jobs;
mod lock;
mod receipt_history;
mod summary;
#[cfg(test)]
mod tests;
mod trim;

use std::process::ExitCode;

use base::error::Fatal;
use handler::State;
use jobs::{Expire, Trim};
use protocol::endpoints::{RETENTION_ERASE, RETENTION_RUN, RETENTION_STATUS};
use serde::Deserialize;
use service::ctx::Ctx;
use service::function::Function;
use service::this;

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
    /// `CLOCK_TOLERANCE_HOURS`: nothing is swept while the clocks of PostgreSQL and NATS are
    /// further apart.
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

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<State> {
    Function::with(this!(), async |ctx: Ctx| {
        let settings: Settings = ctx.vars().read()?;
        if settings.retention_interval_ms == 0 {
            return Err(Fatal::new("configuration: RETENTION_INTERVAL_MS must be at least 1"));
        }
        if !(1..=MAX_TOLERANCE_HOURS).contains(&settings.clock_tolerance_hours) {
            return Err(Fatal::new(format!("configuration: CLOCK_TOLERANCE_HOURS must be from 1 to {MAX_TOLERANCE_HOURS}")));
        }
        State::open(&ctx, settings)
    })
    .settings(
        "
  TRIM_KEEP_MESSAGES       so many of the newest messages stay in the log (10000)
  TRIM_KEEP_DAYS           and those of so many days (7)
  RETENTION_INTERVAL_MS    how often the log is trimmed and the index swept (60000)
  CLOCK_TOLERANCE_HOURS    nothing is swept while the clocks of PostgreSQL and NATS are further apart (6)",
    )
    .answer(RETENTION_RUN, handler::run)
    .answer(RETENTION_STATUS, handler::status)
    .answer(RETENTION_ERASE, handler::erase)
    .job::<Trim>()
    .job::<Expire>()
}
