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
mod settings;
mod state;
mod summary;
#[cfg(test)]
mod tests;
mod trim;

use std::process::ExitCode;

use jobs::{Expire, Trim};
use protocol::endpoints::{RETENTION_ERASE, RETENTION_RUN, RETENTION_STATUS};
use service::ctx::Ctx;
use service::function::Function;
use service::this;
use settings::Settings;
use state::State;
use timeline::settings::ChatSettings;

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<State> {
    Function::with(this!(protocol::PROJECT), async |ctx: Ctx| {
        let settings: Settings = ctx.read_settings()?;
        State::open(&ctx, settings)
    })
    .settings::<ChatSettings>()
    .settings::<Settings>()
    .answer(RETENTION_RUN, handler::run)
    .answer(RETENTION_STATUS, handler::status)
    .answer(RETENTION_ERASE, handler::erase)
    .job::<Trim>()
    .job::<Expire>()
}
