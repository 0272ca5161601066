//! Trims the stream from its beginning, up to what is stored.

use serde::Deserialize;
use serde_json::json;

use crate::budget::StreamStatus;
use crate::lock::{database_error, with_lock};
use crate::state::State;
use base::error::Result;
use base::seq::Seq;
use jetstream::stream::StreamError;
use protocol::js_api;
use service::ctx::Ctx;
use timeline::highest_known_seq;

/// stream-bootstrap's advisory lock. While it advances sequences or replays the stream, the range
/// of stored messages may shrink, so nothing is trimmed then.
pub const BOOTSTRAP_LOCK: i64 = 0x0073_6372_6f6c_6c62;
const ANY_SUBJECT: &str = ">";
const DAY_MS: i64 = 24 * 60 * 60 * 1_000;

/// A database that was lost knows no sequence, and needs the whole stream.
const STORED: &str = concat!("select ", highest_known_seq!());

/// Trims what may be removed; returns how many messages. `None` while another replica or
/// stream-bootstrap holds the lock. A dry run returns the most that would be removed, because it
/// counts sequences whose message was erased.
///
/// # Errors
/// A server does not answer.
pub async fn trim(ctx: &Ctx<State>, dry_run: bool) -> Result<Option<u64>> {
    with_lock(ctx, BOOTSTRAP_LOCK, async |connection| {
        let stored: i64 = sqlx::query_scalar(STORED)
            .fetch_one(connection)
            .await
            .map_err(database_error)?;
        let stream = StreamStatus::read(ctx).await?;
        let first_kept = first_kept(ctx, &stream, Seq::from_i64(stored)).await?;
        if first_kept <= stream.first || stream.messages == 0 {
            return Ok(0);
        }
        if dry_run {
            Ok((first_kept.get() - stream.first.get()).min(stream.messages))
        } else {
            purge(ctx, first_kept).await
        }
    })
    .await
}

/// The sequence that becomes the stream's first one.
async fn first_kept(ctx: &Ctx<State>, stream: &StreamStatus, stored: Seq) -> Result<Seq> {
    let first_unstored = stream.stored_through.min(stored).min(stream.last).next();
    // The stream has gaps where messages were erased, so this removes too few rather than too many;
    // the next run removes the rest.
    let from_first = |count: u64| {
        Seq::new(stream.first.get().saturating_add(count))
            .unwrap_or(Seq::MAX)
            .min(first_unstored)
    };
    let by_count = from_first(
        stream
            .messages
            .saturating_sub(ctx.settings.trim_keep_messages),
    );
    let keep_since_ms = stream
        .now_ms
        .saturating_sub(i64::from(ctx.settings.trim_keep_days) * DAY_MS);
    let by_age = first_received_since(ctx, stream.first, by_count, keep_since_ms).await?;
    // A stream that is nearly full keeps less: otherwise it would soon refuse new messages.
    Ok(by_age.max(from_first(stream.surplus())))
}

/// A binary search for the first sequence from `first` on, and at most `end`, whose message was
/// received at `since_ms` or later.
async fn first_received_since(
    ctx: &Ctx<State>,
    first: Seq,
    end: Seq,
    since_ms: i64,
) -> Result<Seq> {
    let mut low = first;
    let mut high = end;
    // The first probe is the first message: it is nearly always young enough, and then one read
    // suffices.
    let mut probe = first;
    while low < high {
        match ctx.chat.stream().next(ANY_SUBJECT, probe).await? {
            Some(raw) if raw.message.seq < high && raw.message.received_ms < since_ms => {
                low = raw.message.seq.next();
            }
            Some(_) | None => high = probe,
        }
        probe = Seq::new(low.get().midpoint(high.get())).unwrap_or(high);
    }
    Ok(low)
}

async fn purge(ctx: &Ctx<State>, first_kept: Seq) -> Result<u64> {
    #[derive(Deserialize)]
    struct Purged {
        purged: u64,
    }
    let purged: Purged = ctx
        .nats()
        .api(js_api::STREAM_PURGE, &json!({ "seq": first_kept }))
        .await
        .map_err(StreamError::from)?;
    Ok(purged.purged)
}
