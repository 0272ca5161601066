//! Delivering the log again, to be stored again.

use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use sqlx::postgres::PgConnection;

use crate::fence;
use crate::trouble::Trouble;
use base::seq::Seq;
use jetstream::stream::StreamReader;
use nats::connection::Connection;
use protocol::audit::Replayed;
use protocol::js_api;

/// Nothing is delivered for so long, should we die before we resume. Longer than the reset takes, by far.
const PAUSE: Duration = Duration::from_secs(60);

#[derive(Debug, Deserialize)]
struct Consumer {
    ack_floor: Floor,
}

#[derive(Debug, Deserialize)]
struct Floor {
    stream_seq: u64,
}

/// Begins the shared consumer anew at `from` (0: where the log begins). Never behind what is not acknowledged or not
/// stored: what nobody stored yet would be skipped.
///
/// Nothing is delivered meanwhile, and what was delivered before gets the time to be acknowledged. An acknowledgement
/// that comes after the reset is ignored by the server as long as the message was not delivered again (`sseq >= o.sseq`
/// in nats-server's consumer.go), but counts for the second delivery once it was: for a message whose first
/// delivery went into a database that is gone, and whose second one nobody has stored yet.
///
/// # Errors
/// [`Trouble::Refused`] when `from` is beyond the log's last sequence; a server does not answer.
pub async fn replay(
    log: &StreamReader,
    nats: &Connection,
    connection: &mut PgConnection,
    from: Seq,
) -> Result<Replayed, Trouble> {
    let (_, last) = log.range().await?;
    if from > last {
        return Err(Trouble::Refused(format!(
            "from {from} is beyond the log's last sequence, {last}; 0 means from its first"
        )));
    }
    let paused = fence::pause(nats, PAUSE).await?;
    let outcome = reset(log, nats, connection, from).await;
    if paused {
        fence::resume(nats).await?;
    }
    outcome
}

async fn reset(
    log: &StreamReader,
    nats: &Connection,
    connection: &mut PgConnection,
    from: Seq,
) -> Result<Replayed, Trouble> {
    let stored = fence::stored(connection).await?.unwrap_or(Seq::ZERO);
    let (first, through) = log.range().await?;
    let Consumer { ack_floor } = nats.api(js_api::CONSUMER_INFO, &json!({})).await?;
    let floor = Seq::new(ack_floor.stream_seq).unwrap_or(Seq::MAX);
    let from = from.min(floor.next()).min(stored.next()).max(first);
    let _: Consumer = nats
        .api(js_api::CONSUMER_RESET, &json!({ "seq": from.get().max(1) }))
        .await?;
    let lost = (stored < first.previous()).then(|| (stored.next(), first.previous()));
    Ok(Replayed {
        from,
        through,
        stored,
        lost,
    })
}
