//! Publishing to `CHAT_EVENTS`, each event once and in order, whoever else believes to be the one who does.

use std::time::Duration;

use async_nats::header::{HeaderMap, HeaderValue};
use bytes::Bytes;
use tracing::Span;

use crate::trouble::Trouble;
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

/// A batch costs the server as much as about a dozen single publishes, one after the other.
const MOST_SINGLY: usize = 8;
/// A batch that something else came in front of is tried again in so many parts.
const SMALLER: usize = 8;
/// An acknowledgement takes milliseconds; after this nobody knows.
const ACK_TIMEOUT: Duration = Duration::from_secs(3);

/// An event, ready to be published.
#[derive(Debug)]
pub struct Outgoing {
    subject: String,
    headers: HeaderMap,
    payload: Bytes,
    /// In the sender's trace, until it is published.
    _span: Option<Span>,
}

impl Outgoing {
    /// # Errors
    /// It cannot be written, which no event is known to cause.
    pub fn new(event: &Event, time: &str, traceparent: Option<&str>) -> Result<Outgoing, Trouble> {
        let unwritable = |what: String| {
            Trouble::Publish(format!("event {} cannot be written: {what}", event.id()))
        };
        let mut headers = HeaderMap::new();
        for (name, value) in event.headers(time, traceparent) {
            headers.insert(
                name,
                value
                    .parse::<HeaderValue>()
                    .map_err(|error| unwritable(error.to_string()))?,
            );
        }
        let payload = serde_json::to_vec(event)
            .map_err(|error| unwritable(error.to_string()))?
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

    fn message(&self) -> Message {
        Message {
            subject: self.subject.clone(),
            headers: self.headers.clone(),
            payload: self.payload.clone(),
        }
    }

    /// For an event without a position of its own: says that everything up to `told` was told before.
    pub fn after(mut self, told: Seq) -> Outgoing {
        self.headers
            .insert(header::PUBLISHED_THROUGH, HeaderValue::from(told.get()));
        self
    }
}

/// Below whatever sent the message; what follows from the event stands below this.
fn event_span(subject: &str, seq: Seq, headers: &mut HeaderMap) -> Span {
    let span = send_span(&Span::none(), subject, subject_template(subject));
    remote_parent(&span, Some(headers));
    set_attribute(&span, "scrollback.seq", seq.as_i64());
    inject_trace(&span, headers);
    span
}

/// Where the stream stands.
#[derive(Debug, Clone)]
struct Position {
    events: EventsPosition,
    /// The log is published up to here: as the events say, or the table.
    watermark: Seq,
}

/// The one who publishes events.
#[derive(Debug)]
pub struct Publisher {
    nats: Connection,
    /// As it was when we last published or looked. Should another copy have published since, the stream refuses ours.
    at: Option<Position>,
}

impl Publisher {
    pub fn new(nats: Connection) -> Publisher {
        Publisher { nats, at: None }
    }

    /// The log is told up to `seq`, with what has no event.
    pub fn reached(&mut self, seq: Seq) {
        if let Some(at) = &mut self.at {
            at.watermark = at.watermark.max(seq);
        }
    }

    /// Up to where the log is told: as the last event says, or the table, whose word is `relayed`, if the stream has
    /// dropped what was told later.
    ///
    /// # Errors
    /// JetStream does not answer, or has no such stream.
    pub async fn watermark(&mut self, relayed: Seq) -> Result<Seq, Trouble> {
        match &self.at {
            Some(at) if at.watermark == relayed => Ok(relayed),
            Some(_) | None => {
                let events = EventsPosition::find(&self.nats).await?;
                let watermark = events.watermark.max(relayed);
                self.at = Some(Position { events, watermark });
                Ok(watermark)
            }
        }
    }

    /// Publishes all of them in this order.
    ///
    /// # Errors
    /// [`Trouble::Superseded`] when another copy has published; [`Trouble::Publish`] when the stream does not take them. Some
    /// may be published then: look again.
    pub async fn publish(&mut self, events: &[Outgoing]) -> Result<(), Trouble> {
        let (mut rest, mut size) = (events, batch::MAX_MESSAGES);
        while !rest.is_empty() {
            let (next, behind) = rest.split_at(rest.len().min(size));
            if next.len() <= MOST_SINGLY {
                self.singly(next).await?;
            } else {
                match self.batch(next).await {
                    Ok(true) => {}
                    Ok(false) => self.singly(next).await?,
                    Err(Trouble::Superseded) => {
                        // Something that is no event came in between. The shorter a batch takes, the likelier is a gap for it.
                        self.pass_over().await?;
                        size = next.len() / SMALLER;
                        continue;
                    }
                    Err(trouble) => return Err(trouble),
                }
            }
            size = (size * 2).clamp(MOST_SINGLY, batch::MAX_MESSAGES);
            rest = behind;
        }
        Ok(())
    }

    async fn singly(&mut self, events: &[Outgoing]) -> Result<(), Trouble> {
        for event in events {
            // Ends with the round's time at the latest.
            while let Err(trouble) = self.one(event).await {
                match trouble {
                    Trouble::Superseded => self.pass_over().await?,
                    trouble => return Err(trouble),
                }
            }
        }
        Ok(())
    }

    async fn one(&mut self, event: &Outgoing) -> Result<(), Trouble> {
        let mut message = event.message();
        message.headers.insert(EXPECTED_LAST, self.last()?);
        let ack = publish(self.nats.client(), message, ACK_TIMEOUT).await;
        let ack = of_events(ack?)?;
        // An event that is known stands where it stood, and moves nothing.
        if !ack.duplicate {
            self.moved(ack.seq.get());
        }
        Ok(())
    }

    /// The stream is not as we know it. Whoever publishes to the log can add messages to it that are no events, by their
    /// reply subject: those are passed over. With an event among them, another copy has published.
    async fn pass_over(&mut self) -> Result<(), Trouble> {
        let at = self.at.as_mut().ok_or(Trouble::Superseded)?;
        at.events = at
            .events
            .without_new_events(&self.nats)
            .await?
            .ok_or(Trouble::Superseded)?;
        Ok(())
    }

    /// All of them with one flush, or none, where one is known: false then.
    async fn batch(&mut self, events: &[Outgoing]) -> Result<bool, Trouble> {
        if events.is_empty() {
            return Ok(true);
        }
        let mut messages: Vec<Message> = events.iter().map(Outgoing::message).collect();
        if let Some(first) = messages.first_mut() {
            first.headers.insert(EXPECTED_LAST, self.last()?);
        }
        match publish_batch(self.nats.client(), messages, ACK_TIMEOUT).await {
            Ok(ack) => {
                self.moved(of_events(ack)?.seq.get());
                Ok(true)
            }
            Err(error) if error.is(err_code::DUPLICATE_IN_BATCH) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The stream's last sequence, as far as we know.
    fn last(&self) -> Result<HeaderValue, Trouble> {
        self.at
            .as_ref()
            .map(|at| HeaderValue::from(at.events.last))
            .ok_or(Trouble::Superseded)
    }

    fn moved(&mut self, last: u64) {
        if let Some(at) = &mut self.at {
            at.events.last = last;
        }
    }
}

/// An acknowledgement of our stream, not of another one that has taken its subjects.
fn of_events(ack: PublishAck) -> Result<PublishAck, Trouble> {
    if ack.stream == EVENTS_STREAM {
        Ok(ack)
    } else {
        Err(Trouble::Publish(format!(
            "stream {} took an event",
            ack.stream
        )))
    }
}

impl From<PublishError> for Trouble {
    fn from(error: PublishError) -> Trouble {
        if err_code::WRONG_LAST_SEQUENCE
            .iter()
            .any(|code| error.is(*code))
        {
            Trouble::Superseded
        } else {
            Trouble::Publish(error.to_string())
        }
    }
}
