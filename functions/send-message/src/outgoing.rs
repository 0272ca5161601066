//! A message on its way into the log.

use std::sync::Arc;

use async_nats::header::{HeaderMap, HeaderValue};
use bytes::Bytes;
use serde_json::json;
use uuid::Uuid;

use crate::secret::Secret;
use protocol::header;
use protocol::message::{Incoming, plausible_timestamp};
use protocol::name::User;
use protocol::send::Draft;

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
    /// With `Nats-Msg-Id` where the id was made, else [`named_by`](Outgoing::named_by) adds it; the caller adds the trace.
    pub headers: HeaderMap,
    /// The body.
    pub payload: Bytes,
}

impl Outgoing {
    /// Stamps the sender, an id where there is none, and `now_ms` where the client's time is not believable.
    pub fn new(user: User, subject: String, room: String, draft: Draft, now_ms: i64) -> Outgoing {
        let given = draft.id.is_some();
        let id = draft.id.unwrap_or_else(|| Uuid::now_v7().to_string());
        let timestamp = plausible_timestamp(draft.timestamp, now_ms);
        let payload =
            json!({"user": user.as_str(), "text": draft.text, "timestamp": timestamp, "id": id})
                .to_string()
                .into();
        let mut headers = HeaderMap::new();
        if !given {
            // Nobody knew it a moment ago.
            headers.insert(header::MESSAGE_ID, value(format!("{}:{id}", user.as_str())));
        }
        Outgoing {
            user: user.as_str().to_owned(),
            id,
            given,
            room,
            text: draft.text,
            subject,
            headers,
            payload,
        }
    }

    /// Adds the `Nats-Msg-Id` of a message with an id of the sender's own. A publisher may choose any `Nats-Msg-Id`: this
    /// one nobody can guess, so nobody can have used it before.
    pub fn named_by(&mut self, secret: &Secret) {
        if self.given {
            self.headers.insert(
                header::MESSAGE_ID,
                value(secret.message_id(&self.user, &self.id)),
            );
        }
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
        stored.user == self.user
            && stored.id.as_deref() == Some(&self.id)
            && self.says(&stored.room, &stored.text)
    }

    /// Whether a message of the same sender and id, in this room and with this text, is the same.
    pub fn says(&self, room: &str, text: &str) -> bool {
        self.room == room && self.text == text
    }
}

/// Of printable ASCII, which a header can hold; anything else makes an empty one.
pub fn value(text: impl ToString) -> HeaderValue {
    text.to_string().parse().unwrap_or_default()
}
