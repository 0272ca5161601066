//! Up to where the stream is published as events. The stream of the events, `CHAT_EVENTS`, says so
//! itself.
//!
//! Not every message in `CHAT_EVENTS` is an event. A client that publishes a chat message may name
//! any reply subject, the server does not check it, and JetStream sends its acknowledgement there:
//! with `events.v1.x` the acknowledgement lands in `CHAT_EVENTS`. Our events have a position in
//! their headers and acknowledgements have none, so we skip them.

use std::ops::ControlFlow;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};
use serde_json::{Value, json};

use base::seq::Seq;
use jetstream::api;
use jetstream::info::StreamInfo;
use jetstream::stream::GetReply;
use nats::connection::{ApiError, Connection};
use protocol::subject::{EVENTS, EVENTS_STREAM};

/// So many positions are read together, from the stream's end towards its beginning.
const CHUNK: u64 = 256;
/// Requests in flight.
const CONCURRENCY: usize = 32;
/// So many messages are skipped in search of an event. With more of them after the last event, we
/// do not know which it was.
const MOST_SKIPPED: usize = 50_000;

/// Where `CHAT_EVENTS` stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventsPosition {
    /// The stream's own last sequence.
    pub last: u64,
    /// Chat messages are published up to here, as the last event says; 0 without an event.
    pub watermark: Seq,
    /// When the stream was created. A recreated stream begins at 1 again.
    created: String,
}

impl EventsPosition {
    /// Searches for the last event.
    ///
    /// # Errors
    /// JetStream does not answer, or there is no such stream.
    pub async fn find(nats: &Connection) -> Result<EventsPosition, ApiError> {
        // In this order: an event that is published in between lies above `last`, and the stream
        // refuses a publisher that expects `last`.
        let StreamInfo { created, state, .. } = StreamInfo::fetch(nats, EVENTS_STREAM).await?;
        let watermark = last_event(nats, 0, state.last_seq)
            .await?
            .unwrap_or(Seq::ZERO);
        Ok(EventsPosition {
            last: state.last_seq,
            watermark,
            created,
        })
    }

    /// The position now, when no event was added since; `None` when there was one, or when we
    /// do not know.
    ///
    /// # Errors
    /// As [`find`](EventsPosition::find).
    pub async fn without_new_events(
        &self,
        nats: &Connection,
    ) -> Result<Option<EventsPosition>, ApiError> {
        let info = StreamInfo::fetch(nats, EVENTS_STREAM).await?;
        let last = info.state.last_seq;
        // A message that was removed at the stream's beginning may have been an event.
        let is_same = info.created == self.created
            && last >= self.last
            && info.state.first_seq <= self.last + 1;
        if !is_same || last_event(nats, self.last, last).await?.is_some() {
            return Ok(None);
        }
        Ok(Some(EventsPosition {
            last,
            ..self.clone()
        }))
    }
}

/// Up to where events are published, as the last one says; 0 without an event or without the
/// stream.
///
/// # Errors
/// JetStream does not answer.
pub async fn published_through(nats: &Connection) -> Result<Seq, ApiError> {
    match EventsPosition::find(nats).await {
        Ok(position) => Ok(position.watermark),
        Err(error) if error.is(ApiError::NO_STREAM) => Ok(Seq::ZERO),
        Err(error) => Err(error),
    }
}

/// Which of the newest messages of `CHAT_EVENTS` above `above` are no events, newest first; and the
/// stream's last position. At most `most` messages are read. Nothing, where there is no stream.
///
/// # Errors
/// JetStream does not answer.
pub async fn foreign_events(
    nats: &Connection,
    above: u64,
    most: usize,
) -> Result<(Vec<u64>, u64), ApiError> {
    let last = match StreamInfo::fetch(nats, EVENTS_STREAM).await {
        Ok(info) => info.state.last_seq,
        Err(error) if error.is(ApiError::NO_STREAM) => return Ok((Vec::new(), 0)),
        Err(error) => return Err(error),
    };
    // A recreated stream begins below `above`.
    let above = if above > last { 0 } else { above };
    let mut foreign = Vec::new();
    let mut read = 0;
    scan_back(nats, above, last, |position, event| {
        foreign.extend(event.is_none().then_some(position));
        read += 1;
        if read < most {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    })
    .await?;
    Ok((foreign, last))
}

/// What the last event above `above` and up to `last` says.
async fn last_event(nats: &Connection, above: u64, last: u64) -> Result<Option<Seq>, ApiError> {
    let mut found = None;
    let mut skipped = 0;
    scan_back(nats, above, last, |_, event| {
        found = event;
        skipped += 1;
        if found.is_none() && skipped < MOST_SKIPPED {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    })
    .await?;
    if found.is_none() && skipped == MOST_SKIPPED {
        tracing::warn!(
            "the newest {skipped} messages of {EVENTS_STREAM} are no events, so its last event is \
             not known; if this stays, check that stream-bootstrap runs: it removes them"
        );
    }
    Ok(found)
}

/// Calls `show` for each message of the stream above `above` and up to `last`, the last one first:
/// with its position, and with what it says if it is an event.
async fn scan_back(
    nats: &Connection,
    above: u64,
    last: u64,
    mut show: impl FnMut(u64, Option<Seq>) -> ControlFlow<()>,
) -> Result<(), ApiError> {
    // Nearly always the last message is an event, and this is the only request.
    let Some((position, event)) = get(nats, &json!({ "last_by_subj": EVENTS })).await? else {
        return Ok(());
    };
    let mut end = last;
    if position <= last {
        if position <= above || show(position, event).is_break() {
            return Ok(());
        }
        end = position - 1;
    }
    while end > above {
        let begin = above.max(end.saturating_sub(CHUNK)) + 1;
        // Removed messages leave gaps, which may be long: one request skips a gap within the chunk.
        let first = get(nats, &json!({ "seq": begin, "next_by_subj": EVENTS })).await?;
        if let Some((first, _)) = first.filter(|(first, _)| *first <= end) {
            let requests: Vec<BoxFuture<'_, Found>> = (first..=end)
                .rev()
                .map(|position| get_at(nats, position).boxed())
                .collect();
            let mut replies = stream::iter(requests).buffered(CONCURRENCY);
            while let Some(reply) = replies.next().await {
                if let Some((position, event)) = reply?
                    && show(position, event).is_break()
                {
                    return Ok(());
                }
            }
        }
        end = begin - 1;
    }
    Ok(())
}

/// A message's position, and what it says if it is an event; `None` where there is no message.
type Found = Result<Option<(u64, Option<Seq>)>, ApiError>;

async fn get_at(nats: &Connection, position: u64) -> Found {
    get(nats, &json!({ "seq": position })).await
}

async fn get(nats: &Connection, request: &Value) -> Found {
    let reply: GetReply = match nats
        .api(&api::stream("MSG.GET", EVENTS_STREAM), request)
        .await
    {
        Ok(reply) => reply,
        Err(error) if error.is(ApiError::NO_MESSAGE) => return Ok(None),
        Err(error) => return Err(error),
    };
    let message = reply.message.read()?.message;
    let value = |name| {
        message
            .headers
            .as_ref()?
            .get(name)
            .map(|value| value.as_str())
    };
    Ok(Some((
        message.seq.get(),
        protocol::event::published_through(value),
    )))
}
