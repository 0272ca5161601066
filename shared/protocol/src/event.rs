//! `events.v1.chat.{room}`, `events.v1.dm.{a}.{b}`: what was stored, deleted, delivered and read,
//! as CloudEvents. Events never contain the text of a message.

use serde::{Deserialize, Serialize};

use crate::change::{Mode, event_subject};
use crate::header;
use base::seq::Seq;

/// `ce-source` of every event: the stream that has the message or the deletion.
const SOURCE: &str = "/scrollback/CHAT_MESSAGES";
/// The digits of the largest [`Seq`]. With leading zeros, positions sort as strings.
const SEQUENCE_DIGITS: usize = 19;

/// A message was stored: from now on it is in history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredEvent {
    /// The message's position in the stream.
    pub seq: Seq,
    /// The message's id.
    pub id: String,
    /// `general`, `__admin__`, `dm.alice.bob`.
    pub room: String,
    /// The sender.
    pub user: String,
    /// The recipient; only in direct messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// The message's timestamp, in Unix milliseconds.
    pub timestamp: i64,
}

/// A message was deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletedEvent {
    /// The deletion's own position in the stream.
    pub seq: Seq,
    /// The message's position.
    pub target: Seq,
    /// The message's id.
    pub id: String,
    /// The message's room.
    pub room: String,
    /// The sender.
    pub user: String,
    /// Soft or hard.
    pub mode: Mode,
    /// Who deleted it: the sender, or a moderator.
    pub by: String,
}

/// A user's delivered or read cursor in a conversation has moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptEvent {
    /// Whose cursor it is.
    pub user: String,
    /// The conversation.
    pub room: String,
    /// Every message of the conversation up to here is delivered, or read.
    pub through: Seq,
}

/// An event. Serialized, it is the event's data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Event {
    /// `scrollback.message.stored`.
    Stored(StoredEvent),
    /// `scrollback.message.deleted`.
    Deleted(DeletedEvent),
    /// `scrollback.receipt.delivered`.
    Delivered(ReceiptEvent),
    /// `scrollback.receipt.read`.
    Read(ReceiptEvent),
}

impl Event {
    /// The event's position in the stream. A receipt has none, so it gets that of its cursor and
    /// comes after the message there.
    pub fn seq(&self) -> Seq {
        match self {
            Event::Stored(event) => event.seq,
            Event::Deleted(event) => event.seq,
            Event::Delivered(event) | Event::Read(event) => event.through,
        }
    }

    /// The room it is about.
    pub fn room(&self) -> &str {
        match self {
            Event::Stored(event) => &event.room,
            Event::Deleted(event) => &event.room,
            Event::Delivered(event) | Event::Read(event) => &event.room,
        }
    }

    /// The subject it is published to.
    pub fn subject(&self) -> String {
        event_subject(self.room())
    }

    /// `ce-id`, which is also JetStream's deduplication id. Every replica makes the same id for the
    /// same event.
    pub fn id(&self) -> String {
        match self {
            Event::Stored(event) => format!("stored:{}", event.seq),
            Event::Deleted(event) => format!("deleted:{}", event.seq),
            Event::Delivered(event) => event.id("delivered"),
            Event::Read(event) => event.id("read"),
        }
    }

    /// `ce-type`.
    pub const fn kind(&self) -> &'static str {
        match self {
            Event::Stored(_) => "scrollback.message.stored",
            Event::Deleted(_) => "scrollback.message.deleted",
            Event::Delivered(_) => "scrollback.receipt.delivered",
            Event::Read(_) => "scrollback.receipt.read",
        }
    }

    /// The headers of a CloudEvent 1.0 in binary mode. Every value is printable ASCII. `time` is
    /// RFC 3339. `traceparent` is the sender's; we leave it out when it is malformed.
    pub fn headers(&self, time: &str, traceparent: Option<&str>) -> Vec<(&'static str, String)> {
        let mut headers = vec![
            (header::MESSAGE_ID, self.id()),
            ("ce-specversion", "1.0".to_owned()),
            ("ce-id", self.id()),
            ("ce-source", SOURCE.to_owned()),
            ("ce-type", self.kind().to_owned()),
            ("ce-subject", percent_encoded(self.room())),
            ("ce-time", time.to_owned()),
            ("ce-datacontenttype", "application/json".to_owned()),
        ];
        if !matches!(self, Event::Delivered(_) | Event::Read(_)) {
            headers.push((
                header::SEQUENCE,
                format!("{:0SEQUENCE_DIGITS$}", self.seq().get()),
            ));
        }
        if let Some(traceparent) = traceparent.filter(|value| is_traceparent(value)) {
            headers.extend(
                ["ce-traceparent", "traceparent"].map(|name| (name, traceparent.to_owned())),
            );
        }
        headers
    }
}

impl ReceiptEvent {
    /// A cursor reaches each position once, so the id is unique.
    fn id(&self, kind: &str) -> String {
        format!(
            "{kind}:{}:{}:{}",
            percent_encoded(&self.user),
            percent_encoded(&self.room),
            self.through
        )
    }
}

/// The position up to which all events are published, once the event with these headers is: its own
/// position, or for a receipt, which has none, the one in its header. `None` for other messages.
pub fn published_through<'a>(header: impl Fn(&'static str) -> Option<&'a str>) -> Option<Seq> {
    header(header::SEQUENCE)
        .or_else(|| header(header::PUBLISHED_THROUGH))
        .and_then(sequence)
}

/// Parses the value of the header `ce-sequence`.
fn sequence(value: &str) -> Option<Seq> {
    value.parse().ok().and_then(Seq::new)
}

/// Encodes an attribute for a header as CloudEvents' HTTP binding does.
fn percent_encoded(value: &str) -> String {
    let mut encoded = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'"' | b'%' => encoded.push_str(&format!("%{byte:02X}")),
            b'!'..=b'~' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// Whether `value` has the form of W3C's header: lower-case hexadecimal digits and hyphens. We
/// check it because the sender of the message wrote it.
fn is_traceparent(value: &str) -> bool {
    value.len() == 55
        && value
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(room: &str) -> Event {
        Event::Stored(StoredEvent {
            seq: Seq::new(17).unwrap(),
            id: "a-1".to_owned(),
            room: room.to_owned(),
            user: "ann".to_owned(),
            to: None,
            timestamp: 1_700_000_000_000,
        })
    }

    fn value(event: &Event, traceparent: Option<&str>, name: &str) -> Option<String> {
        event
            .headers("2026-11-21T12:00:00Z", traceparent)
            .into_iter()
            .find(|(found, _)| *found == name)
            .map(|(_, value)| value)
    }

    #[test]
    fn data_has_the_form_of_the_contract() {
        assert_eq!(
            serde_json::to_string(&stored("general")).unwrap(),
            r#"{"seq":17,"id":"a-1","room":"general","user":"ann","timestamp":1700000000000}"#
        );
        let text = concat!(
            r#"{"seq":18,"target":17,"id":"a-1","room":"general","#,
            r#""user":"ann","mode":"hard","by":"root"}"#
        );
        let deleted = Event::Deleted(serde_json::from_str(text).unwrap());
        assert_eq!(serde_json::to_string(&deleted).unwrap(), text);
        assert_eq!(
            (deleted.id().as_str(), deleted.kind()),
            ("deleted:18", "scrollback.message.deleted")
        );
    }

    #[test]
    fn a_receipt_has_no_position() {
        let receipt = ReceiptEvent {
            user: "bob".to_owned(),
            room: "dm.\r.bob".to_owned(),
            through: Seq::new(7).unwrap(),
        };
        let read = Event::Read(receipt.clone());
        assert_eq!(
            serde_json::to_string(&read).unwrap(),
            r#"{"user":"bob","room":"dm.\r.bob","through":7}"#
        );
        assert_eq!(
            (read.kind(), value(&read, None, header::SEQUENCE)),
            ("scrollback.receipt.read", None)
        );
        assert_eq!(
            value(&read, None, header::MESSAGE_ID).unwrap(),
            "read:bob:dm.%0D.bob:7"
        );
        assert_eq!(Event::Delivered(receipt).id(), "delivered:bob:dm.%0D.bob:7");
    }

    #[test]
    fn any_room_name_makes_a_valid_header() {
        for (room, encoded) in [
            ("general", "general"),
            ("a%b", "a%25b"),
            ("\"", "%22"),
            ("müsli ☕", "m%C3%BCsli%20%E2%98%95"),
            ("\u{7f}\u{1}~!", "%7F%01~!"),
        ] {
            assert_eq!(
                value(&stored(room), None, "ce-subject").unwrap(),
                encoded,
                "{room}"
            );
        }
    }

    #[test]
    fn positions_sort_as_strings() {
        let written = value(&stored("general"), None, header::SEQUENCE).unwrap();
        assert_eq!(written, "0000000000000000017");
        assert_eq!(sequence(&written), Seq::new(17));
        assert_eq!(Seq::MAX.get().to_string().len(), SEQUENCE_DIGITS);
        assert_eq!((sequence(""), sequence("seventeen")), (None, None));
    }

    #[test]
    fn an_event_states_up_to_where_events_are_published() {
        let through_by = |headers: &[(&str, &'static str)]| {
            published_through(|name| {
                headers
                    .iter()
                    .find(|(found, _)| *found == name)
                    .map(|(_, value)| *value)
            })
            .map(Seq::get)
        };
        assert_eq!(
            through_by(&[
                (header::SEQUENCE, "0000000000000000017"),
                (header::PUBLISHED_THROUGH, "3")
            ]),
            Some(17)
        );
        assert_eq!(through_by(&[(header::PUBLISHED_THROUGH, "3")]), Some(3));
        assert_eq!(
            (through_by(&[]), through_by(&[(header::SEQUENCE, "x")])),
            (None, None)
        );
    }

    #[test]
    fn a_malformed_traceparent_is_left_out() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(
            value(&stored("a"), Some(good), "traceparent").as_deref(),
            Some(good)
        );
        assert_eq!(
            value(&stored("a"), Some(good), "ce-traceparent").as_deref(),
            Some(good)
        );
        let broken = good.replace('b', "\r");
        for wrong in ["", "00", broken.as_str(), &good.to_uppercase()] {
            assert_eq!(
                value(&stored("a"), Some(wrong), "traceparent"),
                None,
                "{wrong}"
            );
        }
    }
}
