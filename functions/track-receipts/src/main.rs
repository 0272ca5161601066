//! Answers `chat.delivered.{u}`, `chat.read.{u}.{room}` and `dm.read.{u}.{peer}`: moves the marks of how far people have got, and never
//! back; and `chat.unread.{u}`: counts what lies above them.

mod delivered;
mod mark;
mod read;
mod rooms;
#[cfg(test)]
mod tests;
mod unread;

use std::process::ExitCode;

use runtime::{Ctx, Function, Reply, Request, Result, this};
use wire::{
    DELIVERED, DM_READ, DeliveredRequest, Direct, Marked, OUTBOX_WAKE, READ, ReadRequest, Seq,
    UNREAD, Unread, UnreadRequest,
};

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function {
    Function::new(this!())
        .answer(DELIVERED, mark_delivered)
        .answer(READ, mark_room_read)
        .answer(DM_READ, mark_direct_read)
        .answer(UNREAD, count_unread)
}

async fn mark_delivered(ctx: Ctx, request: Request<DeliveredRequest>) -> Result<Reply<Marked>> {
    let DeliveredRequest { user, through } = request.ask;
    let marked = delivered::mark(&ctx, &user, existing(&ctx, through).await?).await?;
    tell(&ctx, marked).await
}

async fn mark_room_read(ctx: Ctx, request: Request<ReadRequest>) -> Result<Reply<Marked>> {
    mark_read(ctx, request.ask).await
}

async fn mark_direct_read(
    ctx: Ctx,
    request: Request<Direct<ReadRequest>>,
) -> Result<Reply<Marked>> {
    let Direct(ask) = request.ask;
    mark_read(ctx, ask).await
}

async fn mark_read(ctx: Ctx, ask: ReadRequest) -> Result<Reply<Marked>> {
    let through = existing(&ctx, ask.through).await?;
    let marked = read::mark(&ctx, &ask, through).await?;
    tell(&ctx, marked).await
}

async fn count_unread(ctx: Ctx, request: Request<UnreadRequest>) -> Result<Reply<Unread>> {
    Reply::json(&unread::count(&ctx, &request.ask.user).await?)
}

/// No further than the log goes: what is not there yet cannot have been read.
async fn existing(ctx: &Ctx, through: Seq) -> Result<Seq> {
    let (_, last) = ctx.log().range().await?;
    Ok(through.min(last))
}

/// Answers, and tells relay-outbox that there is something to relay. Should that be lost, it looks by itself after a while.
async fn tell(ctx: &Ctx, marked: Marked) -> Result<Reply<Marked>> {
    if marked.moved
        && let Err(error) = ctx.nats().client().publish(OUTBOX_WAKE, "".into()).await
    {
        tracing::debug!(%error, "relay-outbox was not woken");
    }
    Reply::json(&marked)
}
