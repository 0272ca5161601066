//! A letter need not be looked at any more.

use crate::{missing, patience, settled};
use base::error::Result;
use protocol::dead_letters::{DeadLetterOutcome, DropDeadLetter, DroppedDeadLetter};
use service::ctx::Ctx;
use service::request::{Reply, Request};
use timeline::chat::Chat;

const DROP: &str = "
    update dead_letters set outcome = 'dropped', outcome_at = now() where id = $1 and outcome is null";

const OUTCOME: &str = "select outcome, outcome_seq from dead_letters where id = $1";

pub async fn discard(
    ctx: Ctx<Chat>,
    request: Request<DropDeadLetter>,
) -> Result<Reply<DroppedDeadLetter>> {
    let DropDeadLetter(id) = request.body;
    // Two statements: a letter that is being retried is waited for, and only a new look tells what became of it.
    let found = ctx.database().run(patience(&ctx), async |connection| {
        let dropped = sqlx::query(DROP)
            .bind(id.get())
            .execute(&mut *connection)
            .await?
            .rows_affected();
        if dropped > 0 {
            tracing::info!(letter = id.get(), "a dead letter was dropped");
        }
        sqlx::query_as(OUTCOME)
            .bind(id.get())
            .fetch_optional(connection)
            .await
    });
    let found: Option<(String, Option<i64>)> = found.await?;
    let (outcome, outcome_seq) = found.ok_or_else(|| missing(id))?;
    if DeadLetterOutcome::parse(&outcome) != Some(DeadLetterOutcome::Dropped) {
        return Err(settled(id, &outcome, outcome_seq));
    }
    Reply::json(&DroppedDeadLetter {
        id,
        outcome: DeadLetterOutcome::Dropped,
    })
}
