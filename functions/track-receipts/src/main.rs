//! Answers `chat.delivered.{u}`, `chat.read.{u}.{room}` and `dm.read.{u}.{peer}`: moves the marks of how far people have got, and never
//! back; and `chat.unread.{u}`: counts what lies above them.

use timeline::chat::Chat;
use timeline::settings::ChatSettings;

mod delivered;
mod mark;
mod read;
mod rooms;

#[cfg(test)]
mod tests;
mod unread;

use std::process::ExitCode;

use base::error::Result;
use base::seq::Seq;
use protocol::conversation::Direct;
use protocol::endpoints::{DELIVERED, DM_READ, READ, UNREAD};
use protocol::receipt::{DeliveredRequest, ReadRequest, ReceiptAck, Unread, UnreadRequest};
use protocol::subject::OUTBOX_WAKE;
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
        .answer(DELIVERED, mark_delivered)
        .answer(READ, mark_room_read)
        .answer(DM_READ, mark_direct_read)
        .answer(UNREAD, count_unread)
}

async fn mark_delivered(
    ctx: Ctx<Chat>,
    request: Request<DeliveredRequest>,
) -> Result<Reply<ReceiptAck>> {
    let DeliveredRequest { user, through } = request.body;
    let marked = delivered::mark(&ctx, &user, existing(&ctx, through).await?).await?;
    tell(&ctx, marked).await
}

async fn mark_room_read(
    ctx: Ctx<Chat>,
    request: Request<ReadRequest>,
) -> Result<Reply<ReceiptAck>> {
    mark_read(ctx, request.body).await
}

async fn mark_direct_read(
    ctx: Ctx<Chat>,
    request: Request<Direct<ReadRequest>>,
) -> Result<Reply<ReceiptAck>> {
    let Direct(ask) = request.body;
    mark_read(ctx, ask).await
}

async fn mark_read(ctx: Ctx<Chat>, ask: ReadRequest) -> Result<Reply<ReceiptAck>> {
    let through = existing(&ctx, ask.through).await?;
    let marked = read::mark(&ctx, &ask, through).await?;
    tell(&ctx, marked).await
}

async fn count_unread(ctx: Ctx<Chat>, request: Request<UnreadRequest>) -> Result<Reply<Unread>> {
    Reply::json(&unread::count(&ctx, &request.body.user).await?)
}

/// No further than the log goes: what is not there yet cannot have been read.
async fn existing(ctx: &Ctx<Chat>, through: Seq) -> Result<Seq> {
    let (_, last) = ctx.stream().range().await?;
    Ok(through.min(last))
}

/// Answers, and tells relay-outbox that there is something to relay. Should that be lost, it looks by itself after a while.
async fn tell(ctx: &Ctx<Chat>, marked: ReceiptAck) -> Result<Reply<ReceiptAck>> {
    if marked.moved
        && let Err(error) = ctx.nats().client().publish(OUTBOX_WAKE, "".into()).await
    {
        tracing::debug!(%error, "relay-outbox was not woken");
    }
    Reply::json(&marked)
}
