//! The four endpoints.

use crate::{delivered, read, unread};
use base::error::Result;
use base::seq::Seq;
use protocol::conversation::Direct;
use protocol::receipt::{DeliveredRequest, ReadRequest, ReceiptAck, Unread, UnreadRequest};
use protocol::subject::OUTBOX_WAKE;
use service::ctx::Ctx;
use service::request::{Reply, Request};
use timeline::chat::Chat;

pub async fn mark_delivered(
    ctx: Ctx<Chat>,
    request: Request<DeliveredRequest>,
) -> Result<Reply<ReceiptAck>> {
    let DeliveredRequest { user, through } = request.body;
    let through = at_most_end(&ctx, through).await?;
    let ack = delivered::advance(&ctx, &user, through).await?;
    reply(&ctx, ack).await
}

pub async fn mark_room_read(
    ctx: Ctx<Chat>,
    request: Request<ReadRequest>,
) -> Result<Reply<ReceiptAck>> {
    mark_read(ctx, request.body).await
}

pub async fn mark_direct_read(
    ctx: Ctx<Chat>,
    request: Request<Direct<ReadRequest>>,
) -> Result<Reply<ReceiptAck>> {
    let Direct(body) = request.body;
    mark_read(ctx, body).await
}

async fn mark_read(ctx: Ctx<Chat>, request: ReadRequest) -> Result<Reply<ReceiptAck>> {
    let through = at_most_end(&ctx, request.through).await?;
    let ack = read::advance(&ctx, &request, through).await?;
    reply(&ctx, ack).await
}

pub async fn count_unread(
    ctx: Ctx<Chat>,
    request: Request<UnreadRequest>,
) -> Result<Reply<Unread>> {
    let unread = unread::count(&ctx, &request.body.user).await?;
    Reply::json(&unread)
}

/// At most the stream's last sequence: a message that is not there yet cannot have been read.
async fn at_most_end(ctx: &Ctx<Chat>, through: Seq) -> Result<Seq> {
    let (_, last) = ctx.stream().range().await?;
    Ok(through.min(last))
}

/// Wakes relay-outbox when a cursor moved, and replies. If the wake-up is lost, relay-outbox finds
/// the receipt at its next interval.
async fn reply(ctx: &Ctx<Chat>, ack: ReceiptAck) -> Result<Reply<ReceiptAck>> {
    if ack.moved
        && let Err(error) = ctx.nats().client().publish(OUTBOX_WAKE, "".into()).await
    {
        tracing::debug!(%error, "relay-outbox was not woken; it looks at its next interval");
    }
    Reply::json(&ack)
}
