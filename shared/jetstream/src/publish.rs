//! Publishing one message and reading JetStream's acknowledgement.

use std::time::Duration;

use async_nats::header::HeaderMap;
use async_nats::{Client, Request, RequestErrorKind, StatusCode};
use bytes::Bytes;
use serde::Deserialize;

use base::seq::Seq;

/// `err_code`s with which JetStream refuses a publish.
pub mod err_code {
    /// The message is larger than the stream's `max_msg_size`.
    pub const TOO_LARGE: u64 = 10_054;
    /// A budget is spent: the stream's, the account's, the account's on this tier, the server's.
    pub const FULL: [u64; 4] = [10_077, 10_002, 10_047, 10_023];
    /// `Nats-Expected-Last-Msg-Id` names another message than the stream's last one.
    pub const WRONG_LAST_MESSAGE_ID: u64 = 10_070;
    /// `Nats-Expected-Last-Sequence` is not the stream's last sequence.
    pub const WRONG_LAST_SEQUENCE: [u64; 2] = [10_071, 10_164];
    /// The server is working on a message with the same id, or the stream elects a leader.
    pub const BUSY: [u64; 2] = [10_158, 10_008];
    /// The stream does not allow atomic batches.
    pub const BATCHES_DISABLED: u64 = 10_174;
    /// Part of the batch did not reach the server.
    pub const BATCH_INCOMPLETE: u64 = 10_176;
    /// A message of the batch has an id the stream remembers; nothing of the batch was stored.
    pub const DUPLICATE_IN_BATCH: u64 = 10_201;
    /// Too many batches are under way at once.
    pub const TOO_MANY_BATCHES: u64 = 10_210;
}

/// With this header the server stores the message only if the stream's last message has this id.
const EXPECTED_LAST_ID: &str = "Nats-Expected-Last-Msg-Id";
/// No message has this id.
const NEVER: &str = "no-message-has-this-id";

/// A message to publish.
#[derive(Debug, Clone)]
pub struct Message {
    /// Where to.
    pub subject: String,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub payload: Bytes,
}

/// JetStream's acknowledgement: the message, or the batch it ends, is stored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PublishAck {
    /// The stream that stored it.
    pub stream: String,
    /// Its sequence there; of a batch, that of the last message.
    pub seq: Seq,
    /// The stream remembers its `Nats-Msg-Id`: nothing was stored, `seq` is the first one's.
    pub duplicate: bool,
    /// How many messages the batch held.
    pub count: usize,
}

/// Why a message was not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// No stream has this subject, or JetStream is away. The message was not stored.
    #[error("JetStream or the stream is not there")]
    NoStream,
    /// There was no acknowledgement. The message may be stored all the same.
    #[error("{0}")]
    Unanswered(String),
    /// Something else answered: another service subscribes to the stream's subjects.
    #[error("what answers is not JetStream")]
    NotJetStream,
    /// JetStream refused it. The message was not stored.
    #[error("JetStream says: {description} ({err_code})")]
    Refused {
        /// JetStream's number for the reason; see [`err_code`].
        err_code: u64,
        /// The reason in JetStream's words.
        description: String,
    },
}

impl PublishError {
    /// Whether JetStream refused with this `err_code`.
    pub fn is(&self, wanted: u64) -> bool {
        matches!(self, PublishError::Refused { err_code, .. } if *err_code == wanted)
    }
}

/// Publishes `message` and waits at most `limit` for the acknowledgement.
///
/// # Errors
/// [`PublishError`].
pub async fn publish(
    client: &Client,
    message: Message,
    limit: Duration,
) -> Result<PublishAck, PublishError> {
    let request = Request::new()
        .headers(message.headers)
        .payload(message.payload)
        .timeout(Some(limit));
    match client.send_request(message.subject, request).await {
        Ok(reply) => read_ack(&reply),
        Err(error) if error.kind() == RequestErrorKind::NoResponders => Err(PublishError::NoStream),
        Err(error) => Err(PublishError::Unanswered(error.to_string())),
    }
}

/// Reads the reply to a publish.
///
/// # Errors
/// [`PublishError`].
pub fn read_ack(reply: &async_nats::Message) -> Result<PublishAck, PublishError> {
    if reply.status == Some(StatusCode::NO_RESPONDERS) {
        return Err(PublishError::NoStream);
    }
    parse_ack(&reply.payload)
}

/// Parses the body of the reply to a publish.
///
/// # Errors
/// [`PublishError::Refused`] or [`PublishError::NotJetStream`].
pub fn parse_ack(body: &[u8]) -> Result<PublishAck, PublishError> {
    // Not `#[serde(flatten)]`: that would buffer every acknowledgement before reading it.
    #[derive(Deserialize)]
    struct Reply {
        #[serde(default)]
        stream: String,
        #[serde(default)]
        seq: Seq,
        #[serde(default)]
        duplicate: bool,
        #[serde(default)]
        count: usize,
        error: Option<Refusal>,
    }
    #[derive(Deserialize)]
    struct Refusal {
        #[serde(default)]
        err_code: u64,
        #[serde(default)]
        description: String,
    }
    let reply: Reply = serde_json::from_slice(body).map_err(|_| PublishError::NotJetStream)?;
    match reply.error {
        None => Ok(PublishAck {
            stream: reply.stream,
            seq: reply.seq,
            duplicate: reply.duplicate,
            count: reply.count,
        }),
        Some(Refusal {
            err_code,
            description,
        }) => Err(PublishError::Refused {
            err_code,
            description,
        }),
    }
}

/// Turns a publish into a question: does the stream remember this `Nats-Msg-Id`?
///
/// The server compares the id before it checks what is expected. So a message that expects an id
/// nobody has is either answered "duplicate" or refused, and never stored. Pass the reply to
/// [`remembered`].
pub fn ask_whether_remembered(headers: &mut HeaderMap) {
    headers.insert(EXPECTED_LAST_ID, NEVER);
}

/// Reads the reply to a question ([`ask_whether_remembered`]): the sequence of the first message
/// with the id, or `None` when the stream does not remember the id.
///
/// # Errors
/// [`PublishError`]: nobody knows.
pub fn remembered(
    reply: Result<PublishAck, PublishError>,
) -> Result<Option<PublishAck>, PublishError> {
    match reply {
        Ok(ack) => Ok(ack.duplicate.then_some(ack)),
        Err(error) if error.is(err_code::WRONG_LAST_MESSAGE_ID) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledgement_is_distinguished_from_a_refusal_and_from_anything_else() {
        let ack = parse_ack(br#"{"stream":"S","seq":7,"batch":"b","count":3}"#).unwrap();
        assert_eq!(
            ack,
            PublishAck {
                stream: "S".to_owned(),
                seq: Seq::new(7).unwrap(),
                duplicate: false,
                count: 3,
            }
        );
        let refused = parse_ack(
            br#"{"error":{"code":503,"err_code":10077,"description":"full"},"stream":"S","seq":0}"#,
        );
        let refused = refused.unwrap_err();
        assert!(refused.is(10_077) && !refused.is(10_002), "{refused}");
        assert_eq!(refused.to_string(), "JetStream says: full (10077)");
        assert_eq!(parse_ack(b"pong"), Err(PublishError::NotJetStream));
    }

    #[test]
    fn a_question_is_answered_by_a_duplicate_or_a_refusal() {
        let duplicate = PublishAck {
            seq: Seq::new(4).unwrap(),
            duplicate: true,
            ..PublishAck::default()
        };
        assert_eq!(remembered(Ok(duplicate.clone())), Ok(Some(duplicate)));
        let refused = |err_code| PublishError::Refused {
            err_code,
            description: String::new(),
        };
        assert_eq!(
            remembered(Err(refused(err_code::WRONG_LAST_MESSAGE_ID))),
            Ok(None)
        );
        assert_eq!(
            remembered(Err(refused(err_code::BUSY[0]))),
            Err(refused(err_code::BUSY[0]))
        );
    }
}
