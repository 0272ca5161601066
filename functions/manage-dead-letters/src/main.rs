//! Answers `deadletters.list`, `.show`, `.retry` and `.drop`, for operators only: which messages
//! could not be stored, and what is done about them. No row of `dead_letters` is ever deleted here;
//! a dead letter gets an outcome.

mod dead_letter;
mod drop;
mod list;
mod outcome;
mod retry;
mod show;

#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::time::Duration;

use protocol::endpoints::{
    DEADLETTERS_DROP, DEADLETTERS_LIST, DEADLETTERS_RETRY, DEADLETTERS_SHOW,
};
use service::ctx::Ctx;
use service::function::Function;
use service::this;
use timeline::chat::Chat;
use timeline::settings::ChatSettings;

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Chat> {
    Function::with(this!(protocol::PROJECT), async |ctx: Ctx| Chat::open(&ctx))
        .settings::<ChatSettings>()
        .answer(DEADLETTERS_LIST, list::list)
        .answer(DEADLETTERS_SHOW, show::show)
        .answer(DEADLETTERS_RETRY, retry::retry)
        .answer(DEADLETTERS_DROP, drop::drop_dead_letter)
}

/// The part of a request's time that PostgreSQL may take, and watching for an outcome: our own
/// reply then says what is wrong, before the framework's deadline ends the request.
fn time_limit(ctx: &Ctx<Chat>) -> Duration {
    ctx.settings().request_deadline().mul_f64(0.8)
}
