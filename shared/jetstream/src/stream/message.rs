//! A message of a stream, and how the JSON API encodes it.

use async_nats::HeaderMap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::Deserialize;

use base::seq::Seq;
use base::time::parse_rfc3339_ms;
use nats::connection::ApiError;
use nats::headers::{MalformedHeaders, parse_headers};

/// A message of the stream.
#[derive(Debug, Clone)]
pub struct StreamMessage {
    /// Its sequence.
    pub seq: Seq,
    /// As published.
    pub subject: String,
    /// As published; `None` when there are none, or no client can parse them.
    pub headers: Option<HeaderMap>,
    /// As published.
    pub payload: Bytes,
    /// When the stream received it, in Unix milliseconds.
    pub received_ms: i64,
}

/// A message as the JSON API returns it, with its header block as stored.
#[derive(Debug, Clone)]
pub struct RawMessage {
    /// The message; without headers when they are malformed.
    pub message: StreamMessage,
    /// The header block as stored; empty when there is none.
    pub header_block: Vec<u8>,
    /// No client can parse its headers, or its subject is not UTF-8.
    pub malformed: bool,
}

/// The reply to `STREAM.MSG.GET`.
#[derive(Deserialize)]
pub struct GetReply {
    /// The message.
    pub message: StoredMessage,
}

/// A message as the JSON API encodes it.
#[derive(Deserialize)]
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
    /// Decodes it.
    ///
    /// # Errors
    /// It is not what JetStream sends.
    pub fn read(self) -> Result<RawMessage, ApiError> {
        let header_block = decode(&self.hdrs)?;
        let headers = if header_block.is_empty() {
            Ok(None)
        } else {
            parse_headers(&header_block).map(Some)
        };
        // JSON cannot contain a subject that is not UTF-8: the server writes U+FFFD instead.
        let malformed = headers.is_err() || self.subject.contains(char::REPLACEMENT_CHARACTER);
        let message = StreamMessage {
            seq: Seq::saturating(self.seq),
            subject: self.subject,
            headers: headers.unwrap_or_else(|MalformedHeaders| None),
            payload: decode(&self.data)?.into(),
            received_ms: parse_rfc3339_ms(&self.time)
                .ok_or_else(|| ApiError::Unreadable("no time".to_owned()))?,
        };
        Ok(RawMessage {
            message,
            header_block,
            malformed,
        })
    }
}

fn decode(base64: &str) -> Result<Vec<u8>, ApiError> {
    BASE64
        .decode(base64)
        .map_err(|_| ApiError::Unreadable("not base64".to_owned()))
}
