//! Answers `chat.sync.{room}` and `dm.sync.{u}.{peer}`: what happened in a conversation after a
//! cursor, so that a client that was away ends up with what everybody else sees. Answers
//! `chat.inbox.{u}`: the direct messages that a user has not received yet.

mod encode;
mod handler;
mod inbox;
mod page;
mod query;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use protocol::endpoints::{DM_INBOX, DM_SYNC, SYNC};
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
        .answer(SYNC, handler::sync_room)
        .answer(DM_SYNC, handler::sync_direct)
        .answer(DM_INBOX, handler::read_inbox)
}
