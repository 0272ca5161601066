//! Messages: as publishers send them ([`Incoming`]), and as readers get them ([`Message`]).

mod fields;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::reason::Reason;
use crate::subject::StreamSubject;
use base::seq::Seq;

use fields::{Body, check_text};
pub(crate) use fields::{Fields, Scalar};

/// The longest name of a user in a message, in bytes.
const MAX_USER_BYTES: usize = 255;
/// The longest client-supplied id, in bytes.
pub const MAX_ID_BYTES: usize = 128;
/// 1990-01-01T00:00:00Z. An earlier timestamp comes from a broken clock.
const EARLIEST_TIMESTAMP_MS: i64 = 631_152_000_000;
const DAY_MS: i64 = 86_400_000;
/// In JSON, one byte of text may take six: `\u0001`.
const WORST_ESCAPE: usize = 6;
/// Space for the other fields of a message, and for some unknown ones.
const ENVELOPE_BYTES: usize = 8 * 1024;

/// How large a message may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The longest text, in bytes of UTF-8.
    pub text_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            text_bytes: 64 * 1024,
        }
    }
}

impl Limits {
    /// The largest payload of a message whose text is within the limit.
    pub const fn payload_bytes(self) -> usize {
        self.text_bytes * WORST_ESCAPE + ENVELOPE_BYTES
    }
}

/// A message in the stream that can be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// Its position in the stream.
    pub seq: Seq,
    /// `general`, `__admin__` or `dm.alice.bob`.
    pub room: String,
    /// The sender. Of direct messages it is the one in the subject, whatever the body says.
    pub user: String,
    /// The recipient; only in direct messages.
    pub to: Option<String>,
    /// The client-supplied id. Without one, readers get an id derived from the position.
    pub id: Option<String>,
    /// The text.
    pub text: String,
    /// Unix milliseconds: the client's time if it is plausible, otherwise when the stream received
    /// the message.
    pub timestamp: i64,
    /// The body names another room or sender than the subject. The subject counts.
    pub mismatched: bool,
}

impl Incoming {
    /// Parses a message in the stream.
    ///
    /// `message_id` is the header `Nats-Msg-Id`. `received_ms` is when the stream received the
    /// message, in Unix milliseconds. The result depends on nothing else, so a worker, a redelivery
    /// and a reader of the tail all get the same message.
    ///
    /// # Errors
    /// The [`Reason`] why it can never be stored.
    pub fn parse(
        subject: &str,
        message_id: Option<&str>,
        payload: &[u8],
        seq: Seq,
        received_ms: i64,
        limits: Limits,
    ) -> Result<Incoming, Reason> {
        let published = StreamSubject::parse(subject)?;
        let body = Body::parse(payload, limits)?;
        let room = published.room();
        let same_room = body
            .room
            .is_none_or(|named| named == room || named == subject);
        let (user, to) = match published {
            StreamSubject::Direct { from, to } => (from.to_owned(), Some(to.to_owned())),
            StreamSubject::Chat(_) | StreamSubject::Admin => (body.user.clone(), None),
        };
        let mismatched = !same_room || user != body.user;
        let id = body
            .id
            .or_else(|| message_id.map(str::to_owned))
            .filter(|id| !id.is_empty());
        if let Some(id) = &id {
            check_text(id, MAX_ID_BYTES, Reason::IdTooLong, Reason::NulInId)?;
        }
        let timestamp = plausible_timestamp(body.timestamp, received_ms);
        Ok(Incoming {
            seq,
            room,
            user,
            to,
            id,
            text: body.text,
            timestamp,
            mismatched,
        })
    }

    /// The id that readers get.
    pub fn shown_id(&self) -> String {
        self.id.clone().unwrap_or_else(|| derived_id(self.seq))
    }

    /// The message as readers get it.
    pub fn into_message(self) -> Message {
        let id = self.shown_id();
        let status = self.to.is_some().then_some(Status::Sent);
        Message {
            id,
            seq: self.seq,
            room: self.room,
            user: self.user,
            text: self.text,
            timestamp: self.timestamp,
            to: self.to,
            status,
            delivered_at: None,
            read_at: None,
            deleted: false,
        }
    }
}

/// The client's timestamp, or `received_ms` if there is none or it is not plausible. Unix
/// milliseconds.
pub fn plausible_timestamp(claimed: Option<i64>, received_ms: i64) -> i64 {
    claimed
        .filter(|ms| (EARLIEST_TIMESTAMP_MS..=received_ms.saturating_add(DAY_MS)).contains(ms))
        .unwrap_or(received_ms)
}

/// The id of a message without a client-supplied one. It is the same at every delivery.
pub fn derived_id(seq: Seq) -> String {
    format!("seq:{seq}")
}

/// A message as history, sync and inbox return it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The client-supplied id, or one derived from the position.
    pub id: String,
    /// Its position in the stream.
    pub seq: Seq,
    /// `general`, `__admin__`, `dm.alice.bob`.
    pub room: String,
    /// The sender.
    pub user: String,
    /// The text; empty for a tombstone.
    pub text: String,
    /// Unix milliseconds. For display only: messages are sorted by `seq`.
    pub timestamp: i64,
    /// The recipient; only in direct messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Its status; only in direct messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    /// When the recipient's client confirmed it, in Unix milliseconds; only if the request asked
    /// for receipts.
    #[serde(
        default,
        rename = "deliveredAt",
        skip_serializing_if = "Option::is_none"
    )]
    pub delivered_at: Option<i64>,
    /// When the recipient read it, in Unix milliseconds; only if the request asked for receipts.
    #[serde(default, rename = "readAt", skip_serializing_if = "Option::is_none")]
    pub read_at: Option<i64>,
    /// This is a tombstone: the message was deleted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
}

/// The status of a direct message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The stream has it.
    Sent,
    /// The recipient's client has confirmed it.
    Delivered,
    /// The recipient has read it.
    Read,
}
