//! A message's own id.

use async_nats::HeaderMap;

use jetstream::stream::StreamMessage;
use protocol::header;

/// The header `Nats-Msg-Id`, as the message came with it first.
pub fn message_id(headers: &HeaderMap) -> Option<&str> {
    // Appended again, a message has an id of our own in front of JetStream.
    headers
        .get(header::ORIGINAL_ID)
        .or_else(|| headers.get(header::MESSAGE_ID))
        .map(|id| id.as_str())
}

/// [`message_id`] of a message of the stream.
pub fn id_of(message: &StreamMessage) -> Option<&str> {
    message.headers.as_ref().and_then(message_id)
}
