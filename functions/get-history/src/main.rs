//! Answers `chat.history.{room}` and `dm.history.{u}.{peer}`: one page of a conversation, oldest first; the union of the log
//! and its index.

use timeline::chat::Chat;
use timeline::settings::ChatSettings;

mod encode;
mod index;
mod page;

#[cfg(test)]
mod tests;
mod together;

use std::process::ExitCode;
use std::sync::Arc;

use base::error::Result;
use base::seq::Seq;
use index::Index;
use protocol::change::Change;
use protocol::conversation::{Conversation, Direct};
use protocol::endpoints::{DM_HISTORY, HISTORY};
use protocol::history::{HistoryRequest, Page};
use service::ctx::Ctx;
use service::function::Function;
use service::request::{Reply, Request};
use service::this;
use timeline::tail::{few_changes, own_changes};
use together::Together;
use tokio::time::Instant;

/// What requests share.
struct Shared {
    chat: Chat,
    index: Index,
    pages: Together<HistoryRequest, Result<Reply<Page>>>,
    /// By floor: the changes above it, of all conversations, if they are few. Nearly always one read answers everybody that
    /// there are none.
    changes: Together<Seq, Result<Option<Arc<[Change]>>>>,
}

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Shared> {
    Function::with(this!(), async |ctx: Ctx| {
        let chat = Chat::open(&ctx)?;
        Ok(Shared {
            index: Index::new(chat.database().clone()),
            chat,
            pages: Together::default(),
            changes: Together::default(),
        })
    })
    .settings::<ChatSettings>()
    .answer(HISTORY, get_history)
    .answer(DM_HISTORY, get_direct_history)
}

async fn get_direct_history(
    ctx: Ctx<Shared>,
    request: Request<Direct<HistoryRequest>>,
) -> Result<Reply<Page>> {
    let Direct(ask) = request.body;
    get_history(ctx, Request { body: ask }).await
}

async fn get_history(ctx: Ctx<Shared>, request: Request<HistoryRequest>) -> Result<Reply<Page>> {
    let read = {
        let (ctx, ask) = (ctx.clone(), request.body.clone());
        move || read_page(ctx.clone(), ask.clone())
    };
    ctx.pages
        .ask(request.body, ctx.settings().request_deadline(), read)
        .await?
}

async fn read_page(ctx: Ctx<Shared>, ask: HistoryRequest) -> Result<Reply<Page>> {
    let max_payload = ctx.nats().client().server_info().max_payload;
    let page = page::read(&ctx, &ask, max_payload).await?;
    encode::encode(page, ask.cursor, max_payload)
}

/// The changes above `floor` that a page of the conversation has to know, perhaps with others. None are asked for
/// when there is nothing between `floor` and the stream's last sequence, `end`.
async fn changes_above(
    ctx: &Ctx<Shared>,
    of: &Conversation,
    floor: Seq,
    end: Seq,
    until: Instant,
) -> Result<Arc<[Change]>> {
    if end <= floor {
        return Ok(Arc::default());
    }
    let read = {
        let ctx = ctx.clone();
        move || {
            let ctx = ctx.clone();
            let until = Instant::now() + ctx.settings().request_deadline();
            async move {
                Ok(few_changes(ctx.chat.stream(), floor.next(), until)
                    .await?
                    .map(Arc::from))
            }
        }
    };
    let few = ctx
        .changes
        .ask(floor, ctx.settings().request_deadline(), read)
        .await??;
    match few {
        Some(few) => Ok(few),
        None => Ok(own_changes(
            ctx.chat.stream(),
            &[of.change_subject()],
            floor.next(),
            until,
        )
        .await?
        .into()),
    }
}
