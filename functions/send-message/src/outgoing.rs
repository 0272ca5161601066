//! A message on its way into the log.

use std::fmt::Write as _;
use std::sync::Arc;

use async_nats::header::{HeaderMap, HeaderValue};
use bytes::Bytes;
use serde_json::json;
use uuid::Uuid;
use wire::{Draft, Incoming, User, believable, header};

/// What the protocol line and the headers of a batch may add to a message.
const HEADER_ROOM: usize = 1024;

/// A message as it is published.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// Who sends it.
    pub user: String,
    /// The sender's id, or the one that was made.
    pub id: String,
    /// The sender gave the id, so this may be a resend.
    pub given: bool,
    /// As stored: `general`, `dm.alice.bob`.
    pub room: String,
    /// The text, for comparing it with what the log has under the same id.
    pub text: String,
    /// Where it is published.
    pub subject: String,
    /// With `Nats-Msg-Id`; the caller adds the trace.
    pub headers: HeaderMap,
    /// The body.
    pub payload: Bytes,
}

impl Outgoing {
    /// Stamps the sender, an id where there is none, and `now_ms` where the client's time is not believable.
    pub fn new(user: User, subject: String, room: String, draft: Draft, now_ms: i64) -> Outgoing {
        let given = draft.id.is_some();
        let id = draft.id.unwrap_or_else(|| Uuid::now_v7().to_string());
        let timestamp = believable(draft.timestamp, now_ms);
        let payload = json!({"user": user.as_str(), "text": draft.text, "timestamp": timestamp, "id": id}).to_string().into();
        let mut headers = HeaderMap::new();
        headers.insert(header::MESSAGE_ID, value(log_id(user.as_str(), &id)));
        Outgoing { user: user.as_str().to_owned(), id, given, room, text: draft.text, subject, headers, payload }
    }

    /// What makes it one message: sender and id.
    pub fn key(&self) -> (String, String) {
        (self.user.clone(), self.id.clone())
    }

    /// Whose messages it stays in order with: those of its sender to its room.
    pub fn queue(&self) -> Arc<str> {
        // No name holds a space.
        format!("{} {}", self.user, self.room).into()
    }

    /// How many bytes it may take on the wire, at most.
    pub fn weight(&self) -> usize {
        self.payload.len() + self.subject.len() + HEADER_ROOM
    }

    /// Whether what the log has is this very message, and not another one under the same id. Its time is not looked
    /// at: a client that gives none sends another one each time.
    pub fn is(&self, stored: &Incoming) -> bool {
        stored.user == self.user && stored.id.as_deref() == Some(&self.id) && self.says(&stored.room, &stored.text)
    }

    /// Whether a message of the same sender and id, in this room and with this text, is the same.
    pub fn says(&self, room: &str, text: &str) -> bool {
        self.room == room && self.text == text
    }
}

/// JetStream's deduplication id: `{user}:{id}`, so that nobody can take another's. What no header can hold, or what somebody might
/// trim, is written as `%` and its number; so is `%` itself, and two ids never become one.
fn log_id(user: &str, id: &str) -> String {
    let mut text = format!("{user}:");
    for byte in id.bytes() {
        if byte.is_ascii_graphic() && byte != b'%' {
            text.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

/// Of printable ASCII, which a header can hold; anything else makes an empty one.
pub fn value(text: impl ToString) -> HeaderValue {
    text.to_string().parse().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_fits_a_header_and_stays_itself() {
        for (id, header) in [
            ("a-1", "ann:a-1"),
            ("a:b", "ann:a:b"),
            (" a ", "ann:%20a%20"),
            ("a\r\nNats-Rollup: all", "ann:a%0D%0ANats-Rollup:%20all"),
            ("100%", "ann:100%25"),
            ("\u{e9}", "ann:%C3%A9"),
        ] {
            assert_eq!(log_id("ann", id), header);
            assert_eq!(value(log_id("ann", id)).as_str(), header, "{id:?}");
        }
        assert!(log_id(&"u".repeat(64), &"\n".repeat(wire::MAX_ID_BYTES)).len() < HEADER_ROOM / 2);
    }
}
