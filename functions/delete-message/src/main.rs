//! Answers `chat.delete.{u}.{room}` and `dm.delete.{u}.{peer}`: finds the message, checks who asks,
//! and appends the deletion to the stream. It answers as soon as the stream has the deletion;
//! `persist-message` applies it to PostgreSQL later.

mod find;
mod handler;
mod query;
mod settings;
mod target;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::process::ExitCode;

use base::error::{Fatal, Result};
use protocol::endpoints::{DELETE, DM_DELETE};
use protocol::name::User;
use service::ctx::Ctx;
use service::function::Function;
use service::this;
use settings::Settings;
use timeline::chat::Chat;
use timeline::settings::ChatSettings;

/// What requests share.
struct Shared {
    chat: Chat,
    moderators: HashSet<String>,
}

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Shared> {
    Function::with(this!(protocol::PROJECT), async |ctx: Ctx| {
        let settings: Settings = ctx.read_settings()?;
        let names = settings
            .delete_moderators
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty());
        let moderators = names
            .map(moderator)
            .collect::<Result<HashSet<String>, Fatal>>()?;
        Ok(Shared {
            chat: Chat::open(&ctx)?,
            moderators,
        })
    })
    .settings::<ChatSettings>()
    .settings::<Settings>()
    .answer(DELETE, handler::delete_in_room)
    .answer(DM_DELETE, handler::delete_direct)
}

fn moderator(name: &str) -> Result<String, Fatal> {
    let wrong = |_| {
        Fatal::new(format!(
            "configuration: DELETE_MODERATORS names {name:?}, and a user is 1 to 64 of A-Z a-z \
             0-9 _ -"
        ))
    };
    User::parse(name)
        .map(|user| user.as_str().to_owned())
        .map_err(wrong)
}
