//! One message into the log, acknowledged.

use std::time::Duration;

use async_nats::header::HeaderMap;
use async_nats::{RequestErrorKind, StatusCode};
use bytes::Bytes;
use serde::Deserialize;

use base::error::{Code, Error};
use base::seq::Seq;
use nats::connection::Connection;
use nats::headers::MalformedHeaders;

/// JetStream's `err_code` of a message larger than the stream takes.
const TOO_LARGE: u64 = 10_054;
/// `err_code`s of a spent budget: the stream's, the account's, the server's.
const FULL: [u64; 4] = [10_077, 10_002, 10_047, 10_023];

/// Why the log did not take a message.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AppendError {
    /// The headers it came with cannot be sent.
    #[error(transparent)]
    MalformedHeaders(#[from] MalformedHeaders),
    /// Larger than the server or the stream takes; in whose words.
    #[error("{0}")]
    TooLarge(String),
    /// A disk budget is spent; in JetStream's words. It was not taken.
    #[error("{0}")]
    Full(String),
    /// JetStream refused it for another reason; in its words. It was not taken.
    #[error("{0}")]
    Refused(String),
    /// No stream listens on the subject now. It was not taken.
    #[error("the log does not acknowledge (no responders)")]
    NoStream,
    /// Nobody knows whether the log has it.
    #[error("the log does not acknowledge ({0})")]
    Unanswered(String),
}

impl From<AppendError> for Error {
    fn from(error: AppendError) -> Error {
        let (code, reason) = match &error {
            AppendError::MalformedHeaders(_) => {
                (Code::BadRequest, "no client can read the headers of this")
            }
            AppendError::TooLarge(_) => (Code::TooLarge, "this is larger than the log takes"),
            AppendError::Full(_) => (
                Code::Unavailable,
                "the log is full; try again when the operator has made room",
            ),
            AppendError::Refused(_) => (
                Code::Unavailable,
                "the log refuses this; the operator's log says why; try again",
            ),
            AppendError::NoStream => (
                Code::Unavailable,
                "the log is not there: JetStream is away, or being set up; try again",
            ),
            AppendError::Unanswered(_) => (
                Code::Unavailable,
                "the log does not acknowledge; it may have taken this all the same: try again",
            ),
        };
        Error::new(code, reason).with_detail(error)
    }
}

/// What JetStream answers to a publish.
#[derive(Debug, Deserialize)]
pub struct PublishAck {
    /// Which stream took it; empty when none did.
    #[serde(default)]
    pub stream: String,
    /// Where it stands there; of a batch, its last message.
    #[serde(default)]
    pub seq: Seq,
    /// The stream knew its `Nats-Msg-Id`: it stands where the first one does.
    #[serde(default)]
    pub duplicate: bool,
    /// How many messages a batch held.
    #[serde(default)]
    pub count: usize,
    /// Why it was not taken.
    pub error: Option<PublishError>,
}

/// Why JetStream did not take a publish.
#[derive(Debug, Deserialize)]
pub struct PublishError {
    /// JetStream's number for it.
    #[serde(default)]
    pub err_code: u64,
    /// In JetStream's words.
    #[serde(default)]
    pub description: String,
}

/// Appends a message to `stream`, waiting at most `limit`; where it stands. Known to JetStream under its `Nats-Msg-Id`, it
/// is not taken twice: that place is the first one's.
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
    let request = async_nats::Request::new()
        .headers(headers)
        .payload(payload)
        .timeout(Some(limit));
    let reply = nats
        .client()
        .send_request(subject.to_owned(), request)
        .await
        .map_err(|error| match error.kind() {
            RequestErrorKind::NoResponders => AppendError::NoStream,
            kind => AppendError::Unanswered(kind.to_string()),
        })?;
    if reply.status == Some(StatusCode::NO_RESPONDERS) {
        return Err(AppendError::NoStream);
    }
    let stranger = || AppendError::Unanswered("something else answered".to_owned());
    let ack: PublishAck = serde_json::from_slice(&reply.payload).map_err(|_| stranger())?;
    match ack.error {
        None if ack.stream == stream && ack.seq > Seq::ZERO => Ok(ack.seq),
        None => Err(stranger()),
        Some(PublishError {
            err_code: TOO_LARGE,
            description,
        }) => Err(AppendError::TooLarge(description)),
        Some(PublishError {
            err_code,
            description,
        }) if FULL.contains(&err_code) => Err(AppendError::Full(description)),
        Some(PublishError { description, .. }) => Err(AppendError::Refused(description)),
    }
}
