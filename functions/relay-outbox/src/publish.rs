//! Publishes to `CHAT_EVENTS`: each event once and in order, even while another replica also
//! believes that it holds the lock.

use std::time::Duration;

use async_nats::header::{HeaderMap, HeaderValue};
use bytes::Bytes;
use tracing::Span;

use crate::error::Error;
use base::seq::Seq;
use jetstream::batch::{self, publish_batch};
use jetstream::publish::{Message, PublishAck, PublishError, err_code, publish};
use nats::connection::Connection;
use nats::span::{send_span, set_attribute};
use nats::trace::{inject_trace, remote_parent};
use protocol::event::Event;
use protocol::header;
use protocol::subject::{EVENTS_STREAM, subject_template};
use timeline::published::EventsPosition;

const TRACEPARENT: &str = "traceparent";
const EXPECTED_LAST: &str = "Nats-Expected-Last-Sequence";

/// Up to this many events are published one by one: a batch costs the server as much as about a
/// dozen single publishes.
const MAX_SINGLE: usize = 8;
/// If another message gets into the stream before a batch, the batch is split into this many parts.
const SPLIT: usize = 8;
/// An acknowledgement takes milliseconds. Without one within this, we do not know whether the event
/// was stored.
const ACK_TIMEOUT: Duration = Duration::from_secs(3);

/// An event, ready to be published.
#[derive(Debug)]
pub struct Outgoing {
    subject: String,
    headers: HeaderMap,
    payload: Bytes,
    /// In the sender's trace; it ends when the event is published.
    _span: Option<Span>,
}

impl Outgoing {
    /// # Errors
    /// The event cannot be serialized. No event is known that causes this.
    pub fn new(event: &Event, time: &str, traceparent: Option<&str>) -> Result<Outgoing, Error> {
        let invalid = |what: String| {
            Error::Publish(format!("event {} cannot be written: {what}", event.id()))
        };
        let mut headers = HeaderMap::new();
        for (name, value) in event.headers(time, traceparent) {
            let value: HeaderValue =
                value
                    .parse()
                    .map_err(|error: async_nats::header::ParseHeaderValueError| {
                        invalid(error.to_string())
                    })?;
            headers.insert(name, value);
        }
        let payload = serde_json::to_vec(event)
            .map_err(|error| invalid(error.to_string()))?
            .into();
        let subject = event.subject();
        let span = headers
            .get(TRACEPARENT)
            .is_some()
            .then(|| event_span(&subject, event.seq(), &mut headers));
        Ok(Outgoing {
            subject,
            headers,
            payload,
            _span: span,
        })
    }

    /// For an event without a sequence of its own: says that everything up to `watermark` was
    /// published before.
    pub fn published_through(mut self, watermark: Seq) -> Outgoing {
        self.headers.insert(
            header::PUBLISHED_THROUGH,
            HeaderValue::from(watermark.get()),
        );
        self
    }

    fn message(&self) -> Message {
        Message {
            subject: self.subject.clone(),
            headers: self.headers.clone(),
            payload: self.payload.clone(),
        }
    }
}

/// A child of the span that sent the message, and the parent of what follows from the event.
fn event_span(subject: &str, seq: Seq, headers: &mut HeaderMap) -> Span {
    let span = send_span(&Span::none(), subject, subject_template(subject));
    remote_parent(&span, Some(headers));
    set_attribute(&span, "scrollback.seq", seq.as_i64());
    inject_trace(&span, headers);
    span
}

/// The state of the stream of events.
#[derive(Debug, Clone)]
struct Position {
    events: EventsPosition,
    /// Messages are published up to here, according to the events or to table `relayed`.
    watermark: Seq,
}

/// Publishes events.
#[derive(Debug)]
pub struct Publisher {
    nats: Connection,
    /// The state after our last publish or read. If another replica has published since, the stream
    /// refuses our next event.
    position: Option<Position>,
}

impl Publisher {
    pub fn new(nats: Connection) -> Publisher {
        Publisher {
            nats,
            position: None,
        }
    }

    /// Everything up to `seq` is published, including sequences that have no event.
    pub fn advance_watermark(&mut self, seq: Seq) {
        if let Some(position) = &mut self.position {
            position.watermark = position.watermark.max(seq);
        }
    }

    /// Up to where messages are published: what the last event says, or `relayed`, which is the
    /// table's value, in case the stream has dropped later events.
    ///
    /// # Errors
    /// JetStream does not answer, or has no such stream.
    pub async fn watermark(&mut self, relayed: Seq) -> Result<Seq, Error> {
        if let Some(position) = &self.position
            && position.watermark == relayed
        {
            return Ok(relayed);
        }
        let events = EventsPosition::find(&self.nats).await?;
        let watermark = events.watermark.max(relayed);
        self.position = Some(Position { events, watermark });
        Ok(watermark)
    }

    /// Publishes all of them in this order.
    ///
    /// # Errors
    /// [`Error::Superseded`] if another replica has published; [`Error::Publish`] if the stream
    /// does not accept them. Some may be published then, so the stream has to be read again.
    pub async fn publish(&mut self, events: &[Outgoing]) -> Result<(), Error> {
        let mut rest = events;
        let mut size = batch::MAX_MESSAGES;
        while !rest.is_empty() {
            let (next, later) = rest.split_at(rest.len().min(size));
            if next.len() <= MAX_SINGLE {
                self.publish_singly(next).await?;
            } else {
                match self.publish_batch(next).await {
                    Ok(true) => {}
                    Ok(false) => self.publish_singly(next).await?,
                    Err(Error::Superseded) => {
                        // A message that is not an event got in before the batch. A smaller batch
                        // takes less time, so it is more likely to get in between two of those.
                        self.skip_foreign_messages().await?;
                        size = next.len() / SPLIT;
                        continue;
                    }
                    Err(error) => return Err(error),
                }
            }
            size = (size * 2).clamp(MAX_SINGLE, batch::MAX_MESSAGES);
            rest = later;
        }
        Ok(())
    }

    async fn publish_singly(&mut self, events: &[Outgoing]) -> Result<(), Error> {
        for event in events {
            // The round's time limit ends this loop at the latest.
            while let Err(error) = self.publish_one(event).await {
                match error {
                    Error::Superseded => self.skip_foreign_messages().await?,
                    error => return Err(error),
                }
            }
        }
        Ok(())
    }

    async fn publish_one(&mut self, event: &Outgoing) -> Result<(), Error> {
        let mut message = event.message();
        message.headers.insert(EXPECTED_LAST, self.expected_last()?);
        let ack = publish(self.nats.client(), message, ACK_TIMEOUT).await?;
        let ack = from_events_stream(ack)?;
        // A duplicate was not stored again.
        if !ack.duplicate {
            self.set_last(ack.seq.get());
        }
        Ok(())
    }

    /// The stream has messages that we did not know of. Anybody who publishes to the chat stream
    /// can add some that are not events, by the reply subject; those are skipped. If there is an
    /// event among them, another replica has published.
    async fn skip_foreign_messages(&mut self) -> Result<(), Error> {
        let position = self.position.as_mut().ok_or(Error::Superseded)?;
        position.events = position
            .events
            .without_new_events(&self.nats)
            .await?
            .ok_or(Error::Superseded)?;
        Ok(())
    }

    /// Publishes all of them with one flush. Returns false, and publishes none, if the stream
    /// remembers one of them.
    async fn publish_batch(&mut self, events: &[Outgoing]) -> Result<bool, Error> {
        if events.is_empty() {
            return Ok(true);
        }
        let mut messages: Vec<Message> = events.iter().map(Outgoing::message).collect();
        if let Some(first) = messages.first_mut() {
            first.headers.insert(EXPECTED_LAST, self.expected_last()?);
        }
        match publish_batch(self.nats.client(), messages, ACK_TIMEOUT).await {
            Ok(ack) => {
                self.set_last(from_events_stream(ack)?.seq.get());
                Ok(true)
            }
            Err(error) if error.is(err_code::DUPLICATE_IN_BATCH) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The stream's last sequence, as far as we know.
    fn expected_last(&self) -> Result<HeaderValue, Error> {
        self.position
            .as_ref()
            .map(|position| HeaderValue::from(position.events.last))
            .ok_or(Error::Superseded)
    }

    fn set_last(&mut self, last: u64) {
        if let Some(position) = &mut self.position {
            position.events.last = last;
        }
    }
}

/// Checks that our stream acknowledged, and not another one that captures its subjects.
fn from_events_stream(ack: PublishAck) -> Result<PublishAck, Error> {
    if ack.stream == EVENTS_STREAM {
        Ok(ack)
    } else {
        Err(Error::Publish(format!(
            "stream {} took an event",
            ack.stream
        )))
    }
}

impl From<PublishError> for Error {
    fn from(error: PublishError) -> Error {
        let is_superseded = err_code::WRONG_LAST_SEQUENCE
            .iter()
            .any(|code| error.is(*code));
        if is_superseded {
            Error::Superseded
        } else {
            Error::Publish(error.to_string())
        }
    }
}
