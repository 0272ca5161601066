//! Answers `chat.history.{room}`: one page of a room, oldest first; the union of the log and its index.

mod encode;
mod index;
mod page;
mod tail;
#[cfg(test)]
mod tests;
mod together;

use std::process::ExitCode;

use index::Index;
use runtime::{Ctx, Error, Function, Reply, Request, Result, this};
use together::Together;
use wire::{HISTORY, HistoryRequest, Page};

/// What requests share.
struct Shared {
    index: Index,
    together: Together<HistoryRequest, Result<Reply<Page>>>,
}

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Shared> {
    Function::with(this!(), async |ctx| Ok(Shared { index: Index::new(ctx.database().clone()), together: Together::default() }))
        .answer(HISTORY, get_history)
}

async fn get_history(ctx: Ctx<Shared>, request: Request<HistoryRequest>) -> Result<Reply<Page>> {
    let read = {
        let (ctx, ask) = (ctx.clone(), request.ask.clone());
        move || read_page(ctx.clone(), ask.clone())
    };
    ctx.together.ask(request.ask, read).await.unwrap_or_else(|| Err(Error::internal("the shared reading ended badly")))
}

async fn read_page(ctx: Ctx<Shared>, ask: HistoryRequest) -> Result<Reply<Page>> {
    let max_payload = ctx.nats().client().server_info().max_payload;
    let page = page::read(ctx.log(), &ctx.index, &ask, ctx.settings().limits(), max_payload).await?;
    encode::encode(page, ask.cursor, max_payload)
}
