//! Publishes the outbox to `CHAT_EVENTS`: what was stored, deleted, delivered and read, as events,
//! in the order of the stream.

mod error;
mod publish;
mod receipts;
mod relay;
mod round;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use relay::Relay;
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
        .job::<Relay>()
}
