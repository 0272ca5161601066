//! Answers `chat.delivered.{u}`, `chat.read.{u}.{room}` and `dm.read.{u}.{peer}`: moves a user's
//! delivered and read cursors, which never move back. Answers `chat.unread.{u}`: counts the
//! messages above the cursors.

mod delivered;
mod handler;
mod read;
mod store;
#[cfg(test)]
mod tests;
mod unread;

use std::process::ExitCode;

use protocol::endpoints::{DELIVERED, DM_READ, READ, UNREAD};
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
        .answer(DELIVERED, handler::mark_delivered)
        .answer(READ, handler::mark_room_read)
        .answer(DM_READ, handler::mark_direct_read)
        .answer(UNREAD, handler::count_unread)
}
