//! The two endpoints. Identical requests that arrive together share one page.

use crate::{Shared, encode, page};
use base::error::Result;
use protocol::conversation::Direct;
use protocol::history::{HistoryRequest, Page};
use service::ctx::Ctx;
use service::request::{Reply, Request};

pub async fn get_history(
    ctx: Ctx<Shared>,
    request: Request<HistoryRequest>,
) -> Result<Reply<Page>> {
    let limit = ctx.settings().request_deadline();
    let load = {
        let ctx = ctx.clone();
        let request = request.body.clone();
        move || load_page(ctx.clone(), request.clone())
    };
    ctx.pages.run(request.body, limit, load).await?
}

pub async fn get_direct_history(
    ctx: Ctx<Shared>,
    request: Request<Direct<HistoryRequest>>,
) -> Result<Reply<Page>> {
    let Direct(body) = request.body;
    get_history(ctx, Request { body }).await
}

async fn load_page(ctx: Ctx<Shared>, request: HistoryRequest) -> Result<Reply<Page>> {
    let max_payload = ctx.nats().client().server_info().max_payload;
    let page = page::load(&ctx, &request, max_payload).await?;
    encode::encode(page, request.cursor, max_payload)
}
