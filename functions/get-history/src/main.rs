//! Answers `chat.history.{room}` and `dm.history.{u}.{peer}`: one page of a conversation, oldest first; the union of the log
//! and its index.

mod encode;
mod index;
mod page;
#[cfg(test)]
mod tests;
mod together;

use std::process::ExitCode;
use std::sync::Arc;

use index::Index;
use runtime::{Ctx, Error, Function, Reply, Request, Result, this};
use together::Together;
use wire::{CHANGES, Change, DM_HISTORY, Direct, HISTORY, HistoryRequest, Page, Seq};

/// What requests share.
struct Shared {
    index: Index,
    pages: Together<HistoryRequest, Result<Reply<Page>>>,
    /// By ack floor: the changes above it, of all conversations. There are few, so nearly always one question answers that there are none.
    changes: Together<Seq, Result<Arc<[Change]>>>,
}

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Shared> {
    Function::with(this!(), async |ctx| {
        Ok(Shared { index: Index::new(ctx.database().clone()), pages: Together::default(), changes: Together::default() })
    })
    .answer(HISTORY, get_history)
    .answer(DM_HISTORY, get_direct_history)
}

async fn get_direct_history(ctx: Ctx<Shared>, request: Request<Direct<HistoryRequest>>) -> Result<Reply<Page>> {
    let Direct(ask) = request.ask;
    get_history(ctx, Request { ask }).await
}

async fn get_history(ctx: Ctx<Shared>, request: Request<HistoryRequest>) -> Result<Reply<Page>> {
    let read = {
        let (ctx, ask) = (ctx.clone(), request.ask.clone());
        move || read_page(ctx.clone(), ask.clone())
    };
    ctx.pages.ask(request.ask, read).await.unwrap_or_else(|| Err(ended_badly()))
}

async fn read_page(ctx: Ctx<Shared>, ask: HistoryRequest) -> Result<Reply<Page>> {
    let max_payload = ctx.nats().client().server_info().max_payload;
    let page = page::read(&ctx, &ask, max_payload).await?;
    encode::encode(page, ask.cursor, max_payload)
}

/// The changes above `floor`.
async fn changes_above(ctx: &Ctx<Shared>, floor: Seq) -> Result<Arc<[Change]>> {
    let read = {
        let ctx = ctx.clone();
        move || {
            let ctx = ctx.clone();
            async move {
                Ok(runtime::changes(
                    ctx.log(),
                    CHANGES,
                    floor.next(),
                    runtime::Limit::within(10_000, 8 << 20, ctx.settings().request_deadline()),
                )
                .await?
                .into())
            }
        }
    };
    ctx.changes.ask(floor, read).await.unwrap_or_else(|| Err(ended_badly()))
}

fn ended_badly() -> Error {
    Error::internal("the shared reading ended badly")
}
