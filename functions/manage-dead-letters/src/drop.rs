//! Drops a dead letter: operators need not look at it any more.

use crate::dead_letter::{has_outcome, not_found};
use crate::time_limit;
use base::error::Result;
use protocol::dead_letters::{DeadLetterOutcome, DropDeadLetter, DroppedDeadLetter};
use service::ctx::Ctx;
use service::request::{Reply, Request};
use timeline::chat::Chat;

const DROP: &str = "
    update dead_letters set outcome = 'dropped', outcome_at = now()
     where id = $1 and outcome is null";

const OUTCOME: &str = "select outcome, outcome_seq from dead_letters where id = $1";

/// `deadletters.drop`
pub async fn drop_dead_letter(
    ctx: Ctx<Chat>,
    request: Request<DropDeadLetter>,
) -> Result<Reply<DroppedDeadLetter>> {
    let DropDeadLetter(id) = request.body;
    // Two statements: the first waits for a retry in progress, and only the second sees its
    // outcome.
    let found = ctx.database().run(time_limit(&ctx), async |connection| {
        let update = sqlx::query(DROP).bind(id.get());
        let dropped = update.execute(&mut *connection).await?.rows_affected();
        if dropped > 0 {
            tracing::info!(dead_letter = id.get(), "an operator dropped a dead letter");
        }
        sqlx::query_as(OUTCOME)
            .bind(id.get())
            .fetch_optional(connection)
            .await
    });
    let found: Option<(String, Option<i64>)> = found.await?;
    let (outcome, outcome_seq) = found.ok_or_else(|| not_found(id))?;
    if DeadLetterOutcome::parse(&outcome) != Some(DeadLetterOutcome::Dropped) {
        return Err(has_outcome(id, &outcome, outcome_seq));
    }
    Reply::json(&DroppedDeadLetter {
        id,
        outcome: DeadLetterOutcome::Dropped,
    })
}
