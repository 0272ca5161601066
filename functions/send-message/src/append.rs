//! Appending to the log: one message, a batch with one flush for all, and the question whether an id is known.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::{Client, Request, RequestErrorKind, StatusCode};
use bytes::Bytes;
use tokio::time::Instant;

use crate::outgoing::{Outgoing, value};
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::append::{PublishAck, PublishError};
use protocol::subject::STREAM;

const BATCH_ID: &str = "Nats-Batch-Id";
const BATCH_SEQUENCE: &str = "Nats-Batch-Sequence";
const BATCH_COMMIT: &str = "Nats-Batch-Commit";
const EXPECTED_LAST_ID: &str = "Nats-Expected-Last-Msg-Id";
/// No message has this id. The server looks whether it knows a message's id before it looks at what is expected, so
/// a message that expects this is answered "duplicate" or refused, and never stored.
const NEVER: &str = "send-message-asks-whether-it-is-there";

/// `err_code`s of JetStream that decide what comes next.
mod code {
    /// A batch holds a message the log knows: nothing of it was stored.
    pub const KNOWN_MESSAGE: u64 = 10_201;
    /// The answer to a question that is never stored: the id is new.
    pub const NOT_EXPECTED: u64 = 10_070;
    /// The server is busy with the same id, or electing a leader.
    pub const PASSING: [u64; 2] = [10_158, 10_008];
    /// The stream's budget is spent; the account's; the server's.
    pub const FULL: [u64; 4] = [10_077, 10_002, 10_047, 10_023];
    pub const TOO_LARGE: u64 = 10_054;
}

/// A batch that takes longer is asked about message by message.
const BATCH_TIMEOUT: Duration = Duration::from_secs(2);

/// Where a message stands in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Its place in the one order; of a message the log knew, the first one's.
    pub seq: Seq,
    /// The log knew its id.
    pub known: bool,
}

/// Why an attempt did not succeed.
#[derive(Debug)]
pub enum Trouble {
    /// A batch holds an id the log knows; nothing of it was stored.
    Known,
    /// Worth another attempt: nobody knows whether it was stored, or the server is busy.
    Passing(String),
    /// No use trying again now.
    Final(Error),
}

impl Trouble {
    /// What the sender is told when there is no time left for another attempt.
    pub fn into_error(self) -> Error {
        match self {
            Trouble::Final(error) => error,
            Trouble::Known => away("a batch with a known id"),
            Trouble::Passing(why) => away(why),
        }
    }
}

fn away(detail: impl std::fmt::Display) -> Error {
    let reason = "the log does not acknowledge; it may have taken the message all the same: try again with the same id";
    Error::new(Code::Unavailable, reason).with_detail(detail)
}

/// Appends to the log.
#[derive(Debug)]
pub struct Appender {
    client: Client,
    /// Different for every copy and start.
    name: String,
    batches: AtomicU64,
}

impl Appender {
    pub fn new(client: Client) -> Appender {
        let name = client
            .new_inbox()
            .rsplit('.')
            .next()
            .unwrap_or_default()
            .to_owned();
        Appender {
            client,
            name,
            batches: AtomicU64::new(0),
        }
    }

    /// Appends one message by itself.
    ///
    /// # Errors
    /// [`Trouble`]; the log may have taken it when that is [`Trouble::Passing`].
    pub async fn one(&self, message: &Outgoing, until: Instant) -> Result<Appended, Trouble> {
        let ack = self
            .ask(
                message,
                message.headers.clone(),
                message.payload.clone(),
                until,
            )
            .await?;
        Ok(Appended {
            seq: ack.seq,
            known: ack.duplicate,
        })
    }

    /// Where the log has this message's id, as long as it remembers; stores nothing.
    ///
    /// # Errors
    /// [`Trouble`].
    pub async fn known(&self, message: &Outgoing, until: Instant) -> Result<Option<Seq>, Trouble> {
        let mut headers = message.headers.clone();
        headers.insert(EXPECTED_LAST_ID, value(NEVER));
        let ack = self.ask(message, headers, Bytes::new(), until).await?;
        Ok(ack.duplicate.then_some(ack.seq))
    }

    /// Appends all of them in this order with one flush, or none; where the first one stands.
    ///
    /// The server takes a committed batch without anything in between, so its acknowledgement, which names the last
    /// sequence only, tells all of them.
    ///
    /// # Errors
    /// [`Trouble`]; the log may have taken all of them when that is [`Trouble::Passing`].
    pub async fn batch(&self, messages: &[&Outgoing], until: Instant) -> Result<Seq, Trouble> {
        let Some((last, before)) = messages.split_last() else {
            return Err(Trouble::Passing("nothing to append".to_owned()));
        };
        let id = value(format!(
            "{}-{}",
            self.name,
            self.batches.fetch_add(1, Ordering::Relaxed)
        ));
        let headers = |message: &Outgoing, sequence: usize| {
            let mut headers = message.headers.clone();
            headers.insert(BATCH_ID, id.clone());
            headers.insert(BATCH_SEQUENCE, value(sequence));
            headers
        };
        for (index, message) in before.iter().enumerate() {
            let sent = self.client.publish_with_headers(
                message.subject.clone(),
                headers(message, index + 1),
                message.payload.clone(),
            );
            sent.await
                .map_err(|error| Trouble::Passing(error.to_string()))?;
        }
        let mut commit = headers(last, messages.len());
        commit.insert(BATCH_COMMIT, value(1));
        let ack = self
            .ask(
                last,
                commit,
                last.payload.clone(),
                until.min(Instant::now() + BATCH_TIMEOUT),
            )
            .await?;
        let first = (ack.seq.get() + 1)
            .checked_sub(messages.len() as u64)
            .and_then(Seq::new);
        match first {
            Some(first) if ack.count == messages.len() => Ok(first),
            _ => Err(Trouble::Passing(format!(
                "a batch of {} was acknowledged as {}",
                messages.len(),
                ack.count
            ))),
        }
    }

    async fn ask(
        &self,
        message: &Outgoing,
        headers: async_nats::HeaderMap,
        payload: Bytes,
        until: Instant,
    ) -> Result<PublishAck, Trouble> {
        let time = until.saturating_duration_since(Instant::now());
        let request = Request::new()
            .headers(headers)
            .payload(payload)
            .timeout(Some(time));
        let reply = self
            .client
            .send_request(message.subject.clone(), request)
            .await;
        let reply = match reply {
            Ok(reply) if reply.status == Some(StatusCode::NO_RESPONDERS) => return Err(no_stream()),
            Ok(reply) => reply,
            Err(error) if error.kind() == RequestErrorKind::NoResponders => return Err(no_stream()),
            Err(error) => return Err(Trouble::Passing(error.to_string())),
        };
        read(&reply.payload)
    }
}

fn no_stream() -> Trouble {
    let reason =
        "the log is not there: JetStream is away, or being set up; nothing was stored, try again";
    Trouble::Final(Error::new(Code::Unavailable, reason))
}

/// Reads JetStream's answer; one that refuses what was only asked for is no trouble.
fn read(payload: &[u8]) -> Result<PublishAck, Trouble> {
    let ack: PublishAck = serde_json::from_slice(payload).map_err(|_| {
        Trouble::Final(Error::internal(
            "what answers is not JetStream: another service listens on the log's subjects",
        ))
    })?;
    match &ack.error {
        None if ack.stream == STREAM => Ok(ack),
        None => Err(Trouble::Final(Error::internal(format!(
            "stream {} took a message of the log",
            ack.stream
        )))),
        Some(PublishError {
            err_code: code::NOT_EXPECTED,
            ..
        }) => Ok(ack),
        Some(PublishError {
            err_code: code::KNOWN_MESSAGE,
            ..
        }) => Err(Trouble::Known),
        Some(PublishError {
            err_code,
            description,
        }) => Err(refused(*err_code, description)),
    }
}

fn refused(err_code: u64, description: &str) -> Trouble {
    let detail = format!("JetStream says: {description} ({err_code})");
    if code::FULL.contains(&err_code) {
        let reason =
            "the log is full; nothing was stored, try again when the operator has made room";
        Trouble::Final(Error::new(Code::Unavailable, reason).with_detail(detail))
    } else if err_code == code::TOO_LARGE {
        Trouble::Final(
            Error::new(Code::TooLarge, "this message is larger than the log takes")
                .with_detail(detail),
        )
    } else if code::PASSING.contains(&err_code) {
        Trouble::Passing(detail)
    } else {
        tracing::warn!(detail, "the log refuses a message");
        let reason = "the log refuses the message; the operator's log says why; try again";
        Trouble::Final(Error::new(Code::Unavailable, reason).with_detail(detail))
    }
}
