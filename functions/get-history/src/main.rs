//! Answers `chat.history.{room}` and `dm.history.{u}.{peer}`: one page of a conversation, oldest
//! first, merged from the stream and PostgreSQL.

mod encode;
mod handler;
mod page;
mod query;
mod singleflight;
#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::sync::Arc;

use base::error::Result;
use base::seq::Seq;
use protocol::change::Change;
use protocol::endpoints::{DM_HISTORY, HISTORY};
use protocol::history::{HistoryRequest, Page};
use service::ctx::Ctx;
use service::function::Function;
use service::request::Reply;
use service::this;
use singleflight::Singleflight;
use timeline::chat::Chat;
use timeline::settings::ChatSettings;

/// What requests share.
struct Shared {
    chat: Chat,
    /// Identical requests share one page.
    pages: Singleflight<HistoryRequest, Result<Reply<Page>>>,
    /// The changes of all conversations above a sequence, if they are few. Nearly always there are
    /// none, and all requests share the one read that says so.
    changes: Singleflight<Seq, Result<Option<Arc<[Change]>>>>,
}

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Shared> {
    Function::with(this!(protocol::PROJECT), async |ctx: Ctx| {
        Ok(Shared {
            chat: Chat::open(&ctx)?,
            pages: Singleflight::default(),
            changes: Singleflight::default(),
        })
    })
    .settings::<ChatSettings>()
    .answer(HISTORY, handler::get_history)
    .answer(DM_HISTORY, handler::get_direct_history)
}
