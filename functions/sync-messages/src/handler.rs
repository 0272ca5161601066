//! The three endpoints.

use crate::{encode, inbox, page};
use base::error::Result;
use protocol::conversation::Direct;
use protocol::receipt::InboxRequest;
use protocol::sync::{SyncPage, SyncRequest};
use service::ctx::Ctx;
use service::request::{Reply, Request};
use timeline::chat::Chat;

pub async fn sync_room(ctx: Ctx<Chat>, request: Request<SyncRequest>) -> Result<Reply<SyncPage>> {
    sync(ctx, request.body).await
}

pub async fn sync_direct(
    ctx: Ctx<Chat>,
    request: Request<Direct<SyncRequest>>,
) -> Result<Reply<SyncPage>> {
    let Direct(body) = request.body;
    sync(ctx, body).await
}

async fn sync(ctx: Ctx<Chat>, request: SyncRequest) -> Result<Reply<SyncPage>> {
    let max_payload = ctx.nats().client().server_info().max_payload;
    let page = page::load(&ctx, &request, max_payload).await?;
    encode::encode(page, request.limit as usize, max_payload)
}

pub async fn read_inbox(ctx: Ctx<Chat>, request: Request<InboxRequest>) -> Result<Reply<SyncPage>> {
    let max_payload = ctx.nats().client().server_info().max_payload;
    let page = inbox::load(&ctx, &request.body, max_payload).await?;
    encode::encode(page, request.body.limit as usize, max_payload)
}
