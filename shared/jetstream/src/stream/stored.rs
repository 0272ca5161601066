//! What JetStream's JSON API answers: messages, consumers, streams.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{RawMessage, StreamMessage};
use base::seq::Seq;
use nats::connection::ApiError;
use nats::headers::{MalformedHeaders, parse_headers};

pub(super) fn unix_ms(rfc3339: &str) -> Option<i64> {
    let at = OffsetDateTime::parse(rfc3339, &Rfc3339).ok()?;
    i64::try_from(at.unix_timestamp_nanos() / 1_000_000).ok()
}

#[derive(Deserialize)]
/// The reply to a `MSG.GET`.
pub struct GetReply {
    /// The message.
    pub message: StoredMessage,
}

#[derive(Deserialize)]
/// A message as the JSON API gives it.
pub struct StoredMessage {
    subject: String,
    seq: u64,
    #[serde(default)]
    hdrs: String,
    #[serde(default)]
    data: String,
    time: String,
}

impl StoredMessage {
    /// # Errors
    /// It is not what JetStream answers.
    pub fn read(self) -> Result<RawMessage, ApiError> {
        let decode = |text: &str| {
            BASE64
                .decode(text)
                .map_err(|_| ApiError::Unreadable("not base64".to_owned()))
        };
        let header_block = decode(&self.hdrs)?;
        let headers = if header_block.is_empty() {
            Ok(None)
        } else {
            parse_headers(&header_block).map(Some)
        };
        // JSON cannot carry a subject that is not UTF-8: the server writes U+FFFD in its place.
        let malformed = headers.is_err() || self.subject.contains(char::REPLACEMENT_CHARACTER);
        let message = StreamMessage {
            seq: Seq::new(self.seq).unwrap_or(Seq::MAX),
            subject: self.subject,
            headers: headers.unwrap_or_else(|MalformedHeaders| None),
            payload: decode(&self.data)?.into(),
            received_ms: unix_ms(&self.time)
                .ok_or_else(|| ApiError::Unreadable("no time".to_owned()))?,
        };
        Ok(RawMessage {
            message,
            header_block,
            malformed,
        })
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct ConsumerInfo {
    pub ack_floor: Position,
    pub delivered: Position,
    #[serde(default)]
    pub num_ack_pending: u64,
    #[serde(default)]
    pub num_pending: u64,
    /// An operator has paused it: it delivers nothing, and nothing is wrong.
    #[serde(default)]
    pub paused: bool,
    #[serde(default)]
    pub config: ConsumerConfig,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct ConsumerConfig {
    /// In nanoseconds.
    #[serde(default)]
    pub ack_wait: u64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Position {
    pub stream_seq: u64,
}

#[derive(Deserialize)]
pub(super) struct StreamInfo {
    pub state: StreamState,
}

#[derive(Deserialize)]
pub(super) struct StreamState {
    pub first_seq: u64,
    pub last_seq: u64,
}
