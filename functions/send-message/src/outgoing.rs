//! A message on its way to the stream.

use std::sync::Arc;

use async_nats::header::{HeaderMap, HeaderValue};
use bytes::Bytes;
use serde_json::json;
use uuid::Uuid;

use crate::secret::Secret;
use jetstream::publish::Message;
use protocol::header;
use protocol::message::{Incoming, plausible_timestamp};
use protocol::name::User;
use protocol::send::Draft;

/// The most that the protocol line and the headers of a batch add to a message.
const HEADER_ROOM: usize = 1024;

/// A message to append.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// Who sends it.
    pub user: String,
    /// The client-supplied id, or a generated one.
    pub id: String,
    /// The client supplied the id, so this may be a resend.
    pub client_supplied_id: bool,
    /// As stored: `general`, `dm.alice.bob`.
    pub room: String,
    /// The text, for comparing it with what is stored under the same id.
    pub text: String,
    /// Where it is published.
    pub subject: String,
    /// With `Nats-Msg-Id` if the id is generated; otherwise
    /// [`set_message_id`](Outgoing::set_message_id) adds it. The caller adds the trace.
    pub headers: HeaderMap,
    /// The body.
    pub payload: Bytes,
}

impl Outgoing {
    /// Adds the sender, an id if the draft has none, and `now_ms` if the client's time is not
    /// plausible.
    pub fn new(user: User, subject: String, room: String, draft: Draft, now_ms: i64) -> Outgoing {
        let client_supplied_id = draft.id.is_some();
        let id = draft.id.unwrap_or_else(|| Uuid::now_v7().to_string());
        let timestamp = plausible_timestamp(draft.timestamp, now_ms);
        let user = user.as_str().to_owned();
        let body = json!({"user": user, "text": draft.text, "timestamp": timestamp, "id": id});
        let mut headers = HeaderMap::new();
        if !client_supplied_id {
            // Nobody can have guessed a random id.
            headers.insert(header::MESSAGE_ID, value(format!("{user}:{id}")));
        }
        Outgoing {
            user,
            id,
            client_supplied_id,
            room,
            text: draft.text,
            subject,
            headers,
            payload: body.to_string().into(),
        }
    }

    /// Adds the `Nats-Msg-Id` of a message with a client-supplied id. Publishers may choose any
    /// `Nats-Msg-Id`; nobody can guess this one, so nobody can have used it before.
    pub fn set_message_id(&mut self, secret: &Secret) {
        if self.client_supplied_id {
            let message_id = secret.message_id(&self.user, &self.id);
            self.headers.insert(header::MESSAGE_ID, value(message_id));
        }
    }

    /// As it is published.
    pub fn publication(&self) -> Message {
        Message {
            subject: self.subject.clone(),
            headers: self.headers.clone(),
            payload: self.payload.clone(),
        }
    }

    /// What identifies it: sender and id.
    pub fn key(&self) -> (String, String) {
        (self.user.clone(), self.id.clone())
    }

    /// The queue in whose order it is appended: its sender's messages to its room.
    pub fn queue(&self) -> Arc<str> {
        // No name contains a space.
        format!("{} {}", self.user, self.room).into()
    }

    /// The most bytes it takes on the wire.
    pub fn max_wire_size(&self) -> usize {
        self.payload.len() + self.subject.len() + HEADER_ROOM
    }

    /// Whether `stored` is this message, and not another one with the same id. The time is not
    /// compared: a client that sends none gets another one each time.
    pub fn is_same(&self, stored: &Incoming) -> bool {
        stored.user == self.user
            && stored.id.as_deref() == Some(&self.id)
            && self.has_content(&stored.room, &stored.text)
    }

    /// Whether it has this room and text.
    pub fn has_content(&self, room: &str, text: &str) -> bool {
        self.room == room && self.text == text
    }
}

/// A header's value of printable ASCII; any other text becomes an empty value.
fn value(text: String) -> HeaderValue {
    text.parse().unwrap_or_default()
}
