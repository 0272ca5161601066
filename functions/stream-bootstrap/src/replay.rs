//! Replay: delivers the stream again, so that it is stored again.

use std::time::Duration;

use serde_json::json;
use sqlx::postgres::PgConnection;

use crate::error::Error;
use crate::sequence_guard;
use base::seq::Seq;
use jetstream::info::ConsumerInfo;
use jetstream::stream::StreamReader;
use nats::connection::Connection;
use protocol::audit::Replayed;
use protocol::js_api;
use protocol::subject::{STREAM, WORKER};

/// How long the consumer stays paused if this process dies before it resumes it. The reset takes
/// far less.
const PAUSE: Duration = Duration::from_secs(60);

/// Resets the shared consumer to `from` (0: the stream's first sequence), but not to a sequence
/// higher than the first one that is not acknowledged or not stored: messages that are not stored
/// yet would be skipped.
///
/// The consumer is paused meanwhile, so that messages delivered before can be acknowledged. The
/// server ignores an acknowledgement that arrives after the reset only while the message is not
/// delivered again (`sseq >= o.sseq` in nats-server's consumer.go). Later it counts for the second
/// delivery, although the first one may have been stored in a database that is lost, and the second
/// one is not stored yet.
///
/// # Errors
/// [`Error::Refused`] if `from` is beyond the stream's last sequence; or a server does not answer.
pub async fn replay(
    stream: &StreamReader,
    nats: &Connection,
    connection: &mut PgConnection,
    from: Seq,
) -> Result<Replayed, Error> {
    let (_, last) = stream.range().await?;
    if from > last {
        return Err(Error::Refused(format!(
            "from {from} is beyond the stream's last sequence, {last}; 0 means from its first"
        )));
    }
    let paused = sequence_guard::pause_consumer(nats, PAUSE).await?;
    let outcome = reset(stream, nats, connection, from).await;
    if paused {
        sequence_guard::resume_consumer(nats).await?;
    }
    outcome
}

async fn reset(
    stream: &StreamReader,
    nats: &Connection,
    connection: &mut PgConnection,
    from: Seq,
) -> Result<Replayed, Error> {
    let stored = sequence_guard::highest_stored(connection)
        .await?
        .unwrap_or(Seq::ZERO);
    let (first, through) = stream.range().await?;
    let consumer = ConsumerInfo::fetch(nats, STREAM, WORKER).await?;
    let from = from
        .min(consumer.acknowledged_through().next())
        .min(stored.next())
        .max(first);
    let _: ConsumerInfo = nats
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
