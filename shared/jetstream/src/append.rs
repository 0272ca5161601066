//! One message appended to one stream, and an error that a request handler can return as it is.

use std::time::Duration;

use async_nats::header::HeaderMap;
use bytes::Bytes;

use crate::publish::{Message, PublishError, err_code, publish};
use base::error::{Code, Error};
use base::seq::Seq;
use nats::connection::Connection;
use nats::headers::MalformedHeaders;

/// Why a message was not appended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AppendError {
    /// Its headers cannot be sent.
    #[error(transparent)]
    MalformedHeaders(#[from] MalformedHeaders),
    /// It is larger than the server or the stream takes; in JetStream's words.
    #[error("{0}")]
    TooLarge(String),
    /// A disk budget is spent; in JetStream's words. The message was not stored.
    #[error("{0}")]
    Full(String),
    /// JetStream refused it for another reason; in its words. The message was not stored.
    #[error("{0}")]
    Refused(String),
    /// No stream has this subject now. The message was not stored.
    #[error("the stream does not acknowledge (no responders)")]
    NoStream,
    /// There was no acknowledgement. The message may be stored all the same.
    #[error("the stream does not acknowledge ({0})")]
    Unanswered(String),
}

impl From<PublishError> for AppendError {
    fn from(error: PublishError) -> AppendError {
        match error {
            PublishError::NoStream => AppendError::NoStream,
            PublishError::Unanswered(why) => AppendError::Unanswered(why),
            PublishError::NotJetStream => AppendError::Unanswered(SOMETHING_ELSE.to_owned()),
            PublishError::Refused {
                err_code: err_code::TOO_LARGE,
                description,
            } => AppendError::TooLarge(description),
            PublishError::Refused {
                err_code,
                description,
            } if err_code::FULL.contains(&err_code) => AppendError::Full(description),
            PublishError::Refused { description, .. } => AppendError::Refused(description),
        }
    }
}

impl From<AppendError> for Error {
    fn from(error: AppendError) -> Error {
        let (code, reason) = match &error {
            AppendError::MalformedHeaders(_) => {
                (Code::BadRequest, "no client can read the headers of this")
            }
            AppendError::TooLarge(_) => (Code::TooLarge, "this is larger than the stream takes"),
            AppendError::Full(_) => (
                Code::Unavailable,
                "the stream is full; try again when the operator has made room",
            ),
            AppendError::Refused(_) => (
                Code::Unavailable,
                "the stream refuses this; the operator's log says why; try again",
            ),
            AppendError::NoStream => (
                Code::Unavailable,
                "the stream is not there: JetStream is away, or being set up; try again",
            ),
            AppendError::Unanswered(_) => (
                Code::Unavailable,
                "the stream does not acknowledge; it may have taken this all the same: try again",
            ),
        };
        Error::new(code, reason).with_detail(error)
    }
}

const SOMETHING_ELSE: &str = "something else answered";

/// Appends a message to `stream` and waits at most `limit`; its sequence. If the stream remembers
/// its `Nats-Msg-Id`, nothing is stored, and the sequence is that of the first message with the id.
///
/// # Errors
/// [`AppendError`].
pub async fn append(
    nats: &Connection,
    stream: &str,
    subject: &str,
    headers: HeaderMap,
    payload: Bytes,
    limit: Duration,
) -> Result<Seq, AppendError> {
    let message = Message {
        subject: subject.to_owned(),
        headers,
        payload,
    };
    let ack = publish(nats.client(), message, limit).await?;
    if ack.stream == stream && ack.seq > Seq::ZERO {
        Ok(ack.seq)
    } else {
        Err(AppendError::Unanswered(SOMETHING_ELSE.to_owned()))
    }
}
