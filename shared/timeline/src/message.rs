//! Messages of the stream, parsed as `persist-message` parses them.

use async_nats::HeaderMap;

use jetstream::stream::StreamMessage;
use protocol::header;
use protocol::message::{Incoming, Limits};
use protocol::reason::Reason;

/// Parses a message of the stream.
///
/// # Errors
/// Why the message becomes a dead letter.
pub fn parse(message: &StreamMessage, limits: Limits) -> Result<Incoming, Reason> {
    Incoming::parse(
        &message.subject,
        message_id(message),
        &message.payload,
        message.seq,
        message.received_ms,
        limits,
    )
}

/// Parses a message of the stream whose text may have any length: `MAX_TEXT_BYTES` may have been
/// larger when the message was stored.
///
/// # Errors
/// As [`parse`].
pub fn parse_of_any_length(message: &StreamMessage) -> Result<Incoming, Reason> {
    // No text is longer than the payload it stands in.
    let limits = Limits {
        text_bytes: message.payload.len(),
    };
    parse(message, limits)
}

/// The `Nats-Msg-Id` that the message was first published with.
pub fn message_id(message: &StreamMessage) -> Option<&str> {
    message_id_in(message.headers.as_ref()?)
}

/// The `Nats-Msg-Id` that a message with these headers was first published with.
pub fn message_id_in(headers: &HeaderMap) -> Option<&str> {
    // A dead letter that is appended again has an id of ours there, and its own one beside it.
    headers
        .get(header::ORIGINAL_ID)
        .or_else(|| headers.get(header::MESSAGE_ID))
        .map(|id| id.as_str())
}
