//! Answers `chat.sync.{room}` and `dm.sync.{u}.{peer}`: what happened in a conversation after a cursor, so that a client that was
//! away ends up with what everyone else sees; and `chat.inbox.{u}`: the direct messages that wait for somebody.

mod encode;
mod inbox;
mod index;
mod page;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use runtime::{Ctx, Function, Reply, Request, Result, this};
use wire::{DM_INBOX, DM_SYNC, Direct, InboxRequest, SYNC, SyncPage, SyncRequest};

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function {
    Function::new(this!())
        .answer(SYNC, sync_room)
        .answer(DM_SYNC, sync_direct)
        .answer(DM_INBOX, read_inbox)
}

async fn sync_room(ctx: Ctx, request: Request<SyncRequest>) -> Result<Reply<SyncPage>> {
    sync(ctx, request.ask).await
}

async fn sync_direct(ctx: Ctx, request: Request<Direct<SyncRequest>>) -> Result<Reply<SyncPage>> {
    let Direct(ask) = request.ask;
    sync(ctx, ask).await
}

async fn read_inbox(ctx: Ctx, request: Request<InboxRequest>) -> Result<Reply<SyncPage>> {
    let max_payload = ctx.nats().client().server_info().max_payload;
    let found = inbox::read(&ctx, &request.ask, max_payload).await?;
    encode::encode(found, request.ask.limit as usize, max_payload)
}

async fn sync(ctx: Ctx, ask: SyncRequest) -> Result<Reply<SyncPage>> {
    let max_payload = ctx.nats().client().server_info().max_payload;
    let found = page::read(&ctx, &ask, max_payload).await?;
    encode::encode(found, ask.limit as usize, max_payload)
}
