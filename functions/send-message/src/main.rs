//! Answers `chat.send.{u}.{room}` and `dm.send.{u}.{peer}`: checks a message, appends it to the
//! stream together with whatever else is waiting, and replies when the stream has stored it.

mod append;
mod batch;
mod committer;
mod dedup;
mod duplicate;
mod handler;
mod lookup;
mod outgoing;
mod pending;
mod pipeline;
mod query;
mod rate_limit;
mod secret;
mod sequencer;
mod settings;

#[cfg(test)]
mod tests;

use std::process::ExitCode;

use committer::Committer;
use protocol::endpoints::{DM_SEND, SEND};
use rate_limit::RateLimit;
use service::ctx::Ctx;
use service::function::Function;
use service::this;
use settings::Settings;
use timeline::chat::Chat;
use timeline::settings::ChatSettings;

/// What requests share.
struct Shared {
    chat: Chat,
    rate_limit: RateLimit,
    committer: Committer,
}

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Shared> {
    Function::with(this!(protocol::PROJECT), async |ctx: Ctx| {
        let settings: Settings = ctx.read_settings()?;
        let chat = Chat::open(&ctx)?;
        let chat_ctx = ctx.with_state(chat.clone());
        let rate_limit = RateLimit::new(settings.send_rate_per_second, settings.send_burst);
        Ok(Shared {
            chat,
            rate_limit,
            committer: Committer::start(chat_ctx, settings.send_min_batch.max(2)),
        })
    })
    .settings::<ChatSettings>()
    .settings::<Settings>()
    .answer(SEND, handler::send_to_room)
    .answer(DM_SEND, handler::send_to_user)
}
