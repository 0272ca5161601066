//! Trimming the log from its beginning, behind what is stored.

use serde::Deserialize;
use serde_json::json;

use crate::Own;
use crate::alone::{alone, refused};
use crate::budget::Look;
use base::error::Result;
use base::seq::Seq;
use jetstream::stream::StreamError;
use protocol::js_api;
use service::ctx::Ctx;

/// stream-bootstrap's advisory lock: while it lifts sequences or has the log delivered again, what counts as stored may go
/// back, so nothing is trimmed then.
pub const BOOTSTRAP_LOCK: i64 = 0x0073_6372_6f6c_6c62;
const EVERYTHING: &str = ">";
const DAY_MS: i64 = 24 * 60 * 60 * 1_000;

/// The highest position the index knows. A database that was lost, and knows nothing yet, needs the log.
const STORED: &str = "
    select greatest((select max(seq) from messages), (select max(seq) from dead_letters),
                    (select max(seq) from changes), (select max(seq) from duplicates), (select seq from swept), 0)";

/// Trims what may go; how many messages. `None` while another copy, or stream-bootstrap, is at work. In a dry run what would
/// go at most: positions that were erased count then.
///
/// # Errors
/// A server does not answer.
pub async fn trim(ctx: &Ctx<Own>, dry_run: bool) -> Result<Option<u64>> {
    alone(ctx, BOOTSTRAP_LOCK, async |connection| {
        let stored: i64 = sqlx::query_scalar(STORED)
            .fetch_one(connection)
            .await
            .map_err(refused)?;
        let look = Look::now(ctx).await?;
        let begin = begin(ctx, &look, Seq::from_i64(stored)).await?;
        if begin <= look.first || look.messages == 0 {
            return Ok(0);
        }
        if dry_run {
            Ok((begin.get() - look.first.get()).min(look.messages))
        } else {
            purge(ctx, begin).await
        }
    })
    .await
}

/// Where the log is to begin.
async fn begin(ctx: &Ctx<Own>, look: &Look, stored: Seq) -> Result<Seq> {
    let stored = look.floor.min(stored).min(look.last).next();
    // A log has holes where texts were erased, so this leaves rather too many; the next round finds them.
    let from_first = |count: u64| {
        Seq::new(look.first.get().saturating_add(count))
            .unwrap_or(Seq::MAX)
            .min(stored)
    };
    let by_count = from_first(
        look.messages
            .saturating_sub(ctx.settings.trim_keep_messages),
    );
    let keep_ms = look
        .now_ms
        .saturating_sub(i64::from(ctx.settings.trim_keep_days) * DAY_MS);
    let kept = received_since(ctx, look.first, by_count, keep_ms).await?;
    // What would be kept yields to what would be refused.
    Ok(kept.max(from_first(look.surplus())))
}

/// The first position from `first` on, and `end` at most, whose message was received at `since_ms` or later.
async fn received_since(ctx: &Ctx<Own>, first: Seq, end: Seq, since_ms: i64) -> Result<Seq> {
    let (mut low, mut high, mut look_at) = (first, end, first);
    while low < high {
        match ctx.chat.stream().next(EVERYTHING, look_at).await? {
            Some(raw) if raw.message.seq < high && raw.message.received_ms < since_ms => {
                low = raw.message.seq.next()
            }
            Some(_) | None => high = look_at,
        }
        // Its beginning first: nearly always that is young enough, and one question does.
        look_at = Seq::new(low.get().midpoint(high.get())).unwrap_or(high);
    }
    Ok(low)
}

async fn purge(ctx: &Ctx<Own>, begin: Seq) -> Result<u64> {
    #[derive(Deserialize)]
    struct Purged {
        purged: u64,
    }
    let purged: Purged = ctx
        .nats()
        .api(js_api::STREAM_PURGE, &json!({ "seq": begin }))
        .await
        .map_err(StreamError::from)?;
    Ok(purged.purged)
}
