//! Answers `chat.sync.{room}` and `dm.sync.{u}.{peer}`: what happened in a conversation after a cursor, so that a client that was
//! away ends up with what everyone else sees; and `chat.inbox.{u}`: the direct messages that wait for somebody.

use timeline::chat::Chat;
use timeline::settings::ChatSettings;

mod encode;
mod inbox;
mod index;
mod page;

#[cfg(test)]
mod tests;

use std::process::ExitCode;

use base::error::Result;
use protocol::conversation::Direct;
use protocol::endpoints::{DM_INBOX, DM_SYNC, SYNC};
use protocol::receipt::InboxRequest;
use protocol::sync::{SyncPage, SyncRequest};
use service::ctx::Ctx;
use service::function::Function;
use service::request::{Reply, Request};
use service::this;

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Chat> {
    Function::with(this!(), async |ctx: Ctx| Chat::open(&ctx))
        .settings::<ChatSettings>()
        .answer(SYNC, sync_room)
        .answer(DM_SYNC, sync_direct)
        .answer(DM_INBOX, read_inbox)
}

async fn sync_room(ctx: Ctx<Chat>, request: Request<SyncRequest>) -> Result<Reply<SyncPage>> {
    sync(ctx, request.body).await
}

async fn sync_direct(
    ctx: Ctx<Chat>,
    request: Request<Direct<SyncRequest>>,
) -> Result<Reply<SyncPage>> {
    let Direct(ask) = request.body;
    sync(ctx, ask).await
}

async fn read_inbox(ctx: Ctx<Chat>, request: Request<InboxRequest>) -> Result<Reply<SyncPage>> {
    let max_payload = ctx.nats().client().server_info().max_payload;
    let found = inbox::read(&ctx, &request.body, max_payload).await?;
    encode::encode(found, request.body.limit as usize, max_payload)
}

async fn sync(ctx: Ctx<Chat>, ask: SyncRequest) -> Result<Reply<SyncPage>> {
    let max_payload = ctx.nats().client().server_info().max_payload;
    let found = page::read(&ctx, &ask, max_payload).await?;
    encode::encode(found, ask.limit as usize, max_payload)
}
