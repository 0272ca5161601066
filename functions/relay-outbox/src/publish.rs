//! Publishing to `CHAT_EVENTS`, each event once and in order, whoever else believes to be the one who does.

use std::time::Duration;

use async_nats::header::{HeaderMap, HeaderValue};
use async_nats::{Request, RequestErrorKind, StatusCode};
use bytes::Bytes;
use tracing::Span;

use crate::trouble::Trouble;
use base::seq::Seq;
use jetstream::append::{PublishAck, PublishError};
use nats::connection::Connection;
use nats::trace::{inject_trace, remote_parent};
use protocol::event::Event;
use protocol::header;
use protocol::subject::EVENTS_STREAM;
use timeline::published::EventsPosition;

const BATCH_ID: &str = "Nats-Batch-Id";
const BATCH_SEQUENCE: &str = "Nats-Batch-Sequence";
const BATCH_COMMIT: &str = "Nats-Batch-Commit";
const TRACEPARENT: &str = "traceparent";
const EXPECTED_LAST: &str = "Nats-Expected-Last-Sequence";

/// The server refuses larger ones.
const LARGEST_BATCH: usize = 1_000;
/// A batch costs the server as much as about a dozen single publishes, one after the other.
const MOST_SINGLY: usize = 8;
/// A batch that something else came in front of is tried again in so many parts.
const SMALLER: usize = 8;
/// An acknowledgement takes milliseconds; after this nobody knows.
const ACK_TIMEOUT: Duration = Duration::from_secs(3);

/// `err_code`s of JetStream that decide what comes next.
mod code {
    /// The stream's last sequence is not the expected one.
    pub const WRONG_LAST_SEQUENCE: [u64; 2] = [10_071, 10_164];
    /// A batch holds an event the stream knows: nothing of it was stored.
    pub const KNOWN_EVENT: u64 = 10_201;
}

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
            .then(|| send_span(&subject, event.seq(), &mut headers));
        Ok(Outgoing {
            subject,
            headers,
            payload,
            _span: span,
        })
    }

    /// For an event without a position of its own: says that everything up to `told` was told before.
    pub fn after(mut self, told: Seq) -> Outgoing {
        self.headers
            .insert(header::PUBLISHED_THROUGH, HeaderValue::from(told.get()));
        self
    }
}

/// Below whatever sent the message; what follows from the event stands below this.
fn send_span(subject: &str, seq: Seq, headers: &mut HeaderMap) -> Span {
    let span = tracing::info_span!(
        parent: None,
        "send",
        otel.name = format!("send {}", protocol::subject::subject_template(subject)),
        otel.kind = "producer",
        messaging.system = "nats",
        messaging.operation.name = "send",
        messaging.operation.r#type = "send",
        messaging.destination.name = subject,
        messaging.destination.template = protocol::subject::subject_template(subject),
        scrollback.seq = seq.get(),
    );
    remote_parent(&span, Some(headers));
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
        let (mut rest, mut size) = (events, LARGEST_BATCH);
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
            size = (size * 2).clamp(MOST_SINGLY, LARGEST_BATCH);
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
        let mut headers = event.headers.clone();
        headers.insert(EXPECTED_LAST, self.last()?);
        let ack = self.ask(event, headers).await?;
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
        let Some((last, before)) = events.split_last() else {
            return Ok(true);
        };
        let client = self.nats.client().clone();
        let id = client
            .new_inbox()
            .rsplit('.')
            .next()
            .unwrap_or_default()
            .to_owned();
        let mut expected = Some(self.last()?);
        let mut headers = |event: &Outgoing, sequence: usize| {
            let mut headers = event.headers.clone();
            headers.insert(BATCH_ID, id.as_str());
            headers.insert(BATCH_SEQUENCE, HeaderValue::from(sequence));
            if let Some(last) = expected.take() {
                headers.insert(EXPECTED_LAST, last);
            }
            headers
        };
        for (index, event) in before.iter().enumerate() {
            let sent = client.publish_with_headers(
                event.subject.clone(),
                headers(event, index + 1),
                event.payload.clone(),
            );
            sent.await
                .map_err(|error| Trouble::Publish(error.to_string()))?;
        }
        let mut commit = headers(last, events.len());
        commit.insert(BATCH_COMMIT, HeaderValue::from(1));
        let ack = self.ask(last, commit).await?;
        if ack.duplicate {
            return Ok(false);
        }
        if ack.count != events.len() {
            return Err(Trouble::Publish(format!(
                "a batch of {} was acknowledged as {}",
                events.len(),
                ack.count
            )));
        }
        self.moved(ack.seq.get());
        Ok(true)
    }

    async fn ask(&self, event: &Outgoing, headers: HeaderMap) -> Result<PublishAck, Trouble> {
        let request = Request::new()
            .headers(headers)
            .payload(event.payload.clone())
            .timeout(Some(ACK_TIMEOUT));
        match self
            .nats
            .client()
            .send_request(event.subject.clone(), request)
            .await
        {
            Ok(reply) if reply.status == Some(StatusCode::NO_RESPONDERS) => Err(no_stream()),
            Ok(reply) => read(&reply.payload),
            Err(error) if error.kind() == RequestErrorKind::NoResponders => Err(no_stream()),
            Err(error) => Err(Trouble::Publish(error.to_string())),
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

fn no_stream() -> Trouble {
    Trouble::Publish("JetStream or the stream is not there".to_owned())
}

/// Reads JetStream's answer; a batch with a known event reads as a duplicate.
fn read(payload: &[u8]) -> Result<PublishAck, Trouble> {
    let mut ack: PublishAck = serde_json::from_slice(payload)
        .map_err(|_| Trouble::Publish("what answers is not JetStream".to_owned()))?;
    match ack.error.take() {
        None if ack.stream == EVENTS_STREAM => Ok(ack),
        None => Err(Trouble::Publish(format!(
            "stream {} took an event",
            ack.stream
        ))),
        Some(error) if error.err_code == code::KNOWN_EVENT => Ok(PublishAck {
            duplicate: true,
            ..ack
        }),
        Some(error) if code::WRONG_LAST_SEQUENCE.contains(&error.err_code) => {
            Err(Trouble::Superseded)
        }
        Some(PublishError {
            err_code,
            description,
        }) => Err(Trouble::Publish(format!(
            "JetStream says: {description} ({err_code})"
        ))),
    }
}
