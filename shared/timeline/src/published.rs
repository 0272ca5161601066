//! Up to where the log is published as events, as `CHAT_EVENTS` itself knows.
//!
//! Not everything in that stream is an event. Whoever may publish to the log may name a reply subject, the server does
//! not check it, and JetStream's acknowledgement of the message goes there: `events.v1.x` puts it into the stream. An
//! event of ours carries a position in its headers, an acknowledgement has none; it is passed over.

use std::ops::ControlFlow;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};
use serde::Deserialize;
use serde_json::{Value, json};

use base::seq::Seq;
use jetstream::api;
use jetstream::stream::GetReply;
use nats::connection::{ApiError, Connection};
use protocol::subject::{EVENTS, EVENTS_STREAM};

/// Positions looked at together, from the stream's end towards its beginning.
const CHUNK: u64 = 256;
/// Requests in flight.
const CONCURRENCY: usize = 32;
/// Messages passed over in search of an event; with more behind the last event, nobody knows which it was.
const MOST_PASSED_OVER: usize = 50_000;

/// Where `CHAT_EVENTS` stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventsPosition {
    /// The stream's own last sequence.
    pub last: u64,
    /// The log is published up to here: as the last event says. 0 where there is none.
    pub watermark: Seq,
    /// When the stream was made; another one begins at 1 again.
    created: String,
}

impl EventsPosition {
    /// Looks for the last event.
    ///
    /// # Errors
    /// JetStream does not answer, or there is no such stream.
    pub async fn find(nats: &Connection) -> Result<EventsPosition, ApiError> {
        // In this order: an event that comes in between lies above `last`, and the stream refuses whoever expects that.
        let Info { created, state } = info(nats).await?;
        let watermark = last_event(nats, 0, state.last_seq)
            .await?
            .unwrap_or(Seq::ZERO);
        Ok(EventsPosition {
            last: state.last_seq,
            watermark,
            created,
        })
    }

    /// The position now, when no event was added since; `None` when there was one, or nobody can tell.
    ///
    /// # Errors
    /// As [`find`](EventsPosition::find).
    pub async fn without_new_events(
        &self,
        nats: &Connection,
    ) -> Result<Option<EventsPosition>, ApiError> {
        let Info {
            created,
            state: State {
                first_seq,
                last_seq: last,
            },
        } = info(nats).await?;
        // What has left the stream at its beginning may have been an event.
        let same = created == self.created && last >= self.last && first_seq <= self.last + 1;
        if !same || last_event(nats, self.last, last).await?.is_some() {
            return Ok(None);
        }
        Ok(Some(EventsPosition {
            last,
            ..self.clone()
        }))
    }
}

/// Up to where events are published: as the last one in the stream says. 0 where there is none, or no stream yet.
///
/// # Errors
/// JetStream does not answer.
pub async fn told(nats: &Connection) -> Result<Seq, ApiError> {
    match EventsPosition::find(nats).await {
        Ok(position) => Ok(position.watermark),
        Err(error) if error.is(ApiError::NO_STREAM) => Ok(Seq::ZERO),
        Err(error) => Err(error),
    }
}

/// Which of the newest messages of `CHAT_EVENTS` above `above` are no events, newest first; and the last position looked
/// at. At most `most` messages are looked at. Nothing, where there is no stream.
///
/// # Errors
/// JetStream does not answer.
pub async fn foreign_events(
    nats: &Connection,
    above: u64,
    most: usize,
) -> Result<(Vec<u64>, u64), ApiError> {
    let last = match info(nats).await {
        Ok(info) => info.state.last_seq,
        Err(error) if error.is(ApiError::NO_STREAM) => return Ok((Vec::new(), 0)),
        Err(error) => return Err(error),
    };
    // A stream that was made anew begins below.
    let above = if above > last { 0 } else { above };
    let (mut foreign, mut looked_at) = (Vec::new(), 0);
    scan_back(nats, above, last, |position, event| {
        foreign.extend(event.is_none().then_some(position));
        looked_at += 1;
        if looked_at < most {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    })
    .await?;
    Ok((foreign, last))
}

#[derive(Deserialize)]
struct Info {
    #[serde(default)]
    created: String,
    state: State,
}

#[derive(Deserialize)]
struct State {
    first_seq: u64,
    last_seq: u64,
}

async fn info(nats: &Connection) -> Result<Info, ApiError> {
    nats.api(&api::stream("INFO", EVENTS_STREAM), &json!({}))
        .await
}

/// What the last event between two positions says, the first excluded.
async fn last_event(nats: &Connection, above: u64, last: u64) -> Result<Option<Seq>, ApiError> {
    let (mut found, mut passed_over) = (None, 0);
    scan_back(nats, above, last, |_, event| {
        found = event;
        passed_over += 1;
        if found.is_none() && passed_over < MOST_PASSED_OVER {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    })
    .await?;
    if found.is_none() && passed_over == MOST_PASSED_OVER {
        tracing::warn!(
            "the newest {passed_over} messages of {EVENTS_STREAM} are no events; is stream-bootstrap running? It removes them"
        );
    }
    Ok(found)
}

/// Shows every message of the stream between two positions, the first excluded, from the last one towards the
/// first: its position, and what it says if it is an event.
async fn scan_back(
    nats: &Connection,
    above: u64,
    last: u64,
    mut show: impl FnMut(u64, Option<Seq>) -> ControlFlow<()>,
) -> Result<(), ApiError> {
    // Nearly always the last one is an event, and this is the only request.
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
        // Of what was removed only a gap is left, which may be long: one request for a whole chunk of it.
        let first = get(nats, &json!({ "seq": begin, "next_by_subj": EVENTS })).await?;
        if let Some((first, _)) = first.filter(|(first, _)| *first <= end) {
            let asked: Vec<BoxFuture<'_, Found>> = (first..=end)
                .rev()
                .map(|position| get_at(nats, position).boxed())
                .collect();
            let mut answers = stream::iter(asked).buffered(CONCURRENCY);
            while let Some(answer) = answers.next().await {
                if let Some((position, event)) = answer?
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

/// A message's position, and what it says if it is an event. `None` where there is none.
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
