//! Appending to the stream: one message, a batch with one flush for all, and the question whether
//! an id is remembered.

use std::time::Duration;

use async_nats::Client;
use bytes::Bytes;
use tokio::time::Instant;

use crate::outgoing::Outgoing;
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::batch::publish_batch;
use jetstream::publish::{
    Message, PublishAck, PublishError, ask_whether_remembered, err_code, publish, remembered,
};
use protocol::subject::STREAM;

/// A batch that takes longer is asked about message by message.
const BATCH_TIMEOUT: Duration = Duration::from_secs(2);

/// Where a message is in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Its sequence; if the stream remembers its id, that of the first message with the id.
    pub seq: Seq,
    /// The stream remembers its id, and stored nothing.
    pub duplicate: bool,
}

/// Why an attempt failed.
#[derive(Debug)]
pub enum AppendError {
    /// A batch contains an id that the stream remembers; nothing of it was stored.
    DuplicateInBatch,
    /// Worth another attempt: there was no acknowledgement, or the server is busy.
    Transient(String),
    /// Not worth another attempt now.
    Final(Error),
}

impl AppendError {
    /// The reply when there is no time left for another attempt.
    pub fn into_error(self) -> Error {
        match self {
            AppendError::Final(error) => error,
            AppendError::DuplicateInBatch => unacknowledged("a batch with a remembered id"),
            AppendError::Transient(why) => unacknowledged(why),
        }
    }
}

fn unacknowledged(detail: impl std::fmt::Display) -> Error {
    let reason = "the stream does not acknowledge; it may have stored the message all the same: \
                  try again with the same id";
    Error::new(Code::Unavailable, reason).with_detail(detail)
}

/// Appends to the stream.
#[derive(Debug)]
pub struct Appender {
    client: Client,
}

impl Appender {
    pub fn new(client: Client) -> Appender {
        Appender { client }
    }

    /// Appends one message by itself.
    ///
    /// # Errors
    /// [`AppendError`]; the stream may have stored it when that is [`AppendError::Transient`].
    pub async fn one(&self, message: &Outgoing, until: Instant) -> Result<Appended, AppendError> {
        let ack = self.publish(message.publication(), until).await?;
        let ack = of_stream(ack)?;
        Ok(Appended {
            seq: ack.seq,
            duplicate: ack.duplicate,
        })
    }

    /// The sequence under which the stream remembers this message's id, if it does; stores nothing.
    ///
    /// # Errors
    /// [`AppendError`].
    pub async fn find_remembered(
        &self,
        message: &Outgoing,
        until: Instant,
    ) -> Result<Option<Seq>, AppendError> {
        let mut question = message.publication();
        question.payload = Bytes::new();
        ask_whether_remembered(&mut question.headers);
        let reply = self.publish(question, until).await;
        let first = remembered(reply)?.map(of_stream).transpose()?;
        Ok(first.map(|ack| ack.seq))
    }

    /// Appends all of them in this order with one flush, or none; the sequence of the first one.
    ///
    /// The server stores a batch without anything in between, so its acknowledgement, which names
    /// the last sequence only, gives all of them.
    ///
    /// # Errors
    /// [`AppendError`]; the stream may have stored all of them when that is
    /// [`AppendError::Transient`].
    pub async fn batch(&self, messages: &[&Outgoing], until: Instant) -> Result<Seq, AppendError> {
        let batch: Vec<Message> = messages
            .iter()
            .map(|message| message.publication())
            .collect();
        let limit = until
            .saturating_duration_since(Instant::now())
            .min(BATCH_TIMEOUT);
        let ack = of_stream(publish_batch(&self.client, batch, limit).await?)?;
        let first = (ack.seq.get() + 1).checked_sub(messages.len() as u64);
        first.and_then(Seq::new).ok_or_else(|| {
            AppendError::Transient(format!("a batch of {} ends at {}", messages.len(), ack.seq))
        })
    }

    async fn publish(&self, message: Message, until: Instant) -> Result<PublishAck, PublishError> {
        let limit = until.saturating_duration_since(Instant::now());
        publish(&self.client, message, limit).await
    }
}

/// An acknowledgement of our stream, not of another one that has taken its subjects.
fn of_stream(ack: PublishAck) -> Result<PublishAck, AppendError> {
    if ack.stream == STREAM {
        return Ok(ack);
    }
    let detail = format!("stream {} took a message of {STREAM}", ack.stream);
    Err(AppendError::Final(Error::internal(detail)))
}

impl From<PublishError> for AppendError {
    fn from(error: PublishError) -> AppendError {
        const NO_STREAM: &str = "the stream is not there: JetStream is away, or being set up; \
                                 nothing was stored, try again";
        const NOT_JETSTREAM: &str =
            "what answers is not JetStream: another service listens on the stream's subjects";
        match error {
            PublishError::NoStream => AppendError::Final(Error::new(Code::Unavailable, NO_STREAM)),
            PublishError::NotJetStream => AppendError::Final(Error::internal(NOT_JETSTREAM)),
            PublishError::Unanswered(why) => AppendError::Transient(why),
            PublishError::Refused {
                err_code: err_code::DUPLICATE_IN_BATCH,
                ..
            } => AppendError::DuplicateInBatch,
            PublishError::Refused { err_code, .. } => refused(err_code, &error.to_string()),
        }
    }
}

fn refused(err_code: u64, detail: &str) -> AppendError {
    if err_code::BUSY.contains(&err_code) {
        return AppendError::Transient(detail.to_owned());
    }
    let (code, reason) = if err_code::FULL.contains(&err_code) {
        let reason =
            "the stream is full; nothing was stored, try again when the operator has made room";
        (Code::Unavailable, reason)
    } else if err_code == err_code::TOO_LARGE {
        (
            Code::TooLarge,
            "this message is larger than the stream takes",
        )
    } else {
        tracing::warn!(
            detail,
            "the stream refused a message; its sender got a 503. If this stays, compare the \
             stream's configuration with the one in nats/streams"
        );
        let reason = "the stream refuses the message; the operator's log says why; try again";
        (Code::Unavailable, reason)
    };
    AppendError::Final(Error::new(code, reason).with_detail(detail))
}
