//! Changes to messages: `change.chat.{room}`, `change.dm.{a}.{b}`. They are ordered in the stream
//! like messages.

use serde::{Deserialize, Serialize};

use crate::conversation::direct_name;
use crate::message::{MAX_ID_BYTES, Message, Status, derived_id};
use crate::reason::Reason;
use base::seq::Seq;

/// The longest name of a room or a user in a change, in bytes: the same as in messages.
const MAX_NAME_BYTES: usize = 255;

/// How thoroughly a message is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The text is no longer shown to anybody.
    Soft,
    /// The text is erased from the stream and from the database as well.
    Hard,
}

impl Mode {
    /// As on the wire and in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            Mode::Soft => "soft",
            Mode::Hard => "hard",
        }
    }

    /// From the wire or the table.
    pub fn parse(mode: &str) -> Option<Mode> {
        [Mode::Soft, Mode::Hard]
            .into_iter()
            .find(|known| known.as_str() == mode)
    }
}

/// What kind of change; the only kind so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangeType {
    /// A message was deleted.
    Delete,
}

/// A deletion as it is in the stream, and as live readers get it. It has everything of the message
/// but the text. So a reader who gets it before the message, or after the message was erased, can
/// show the tombstone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deletion {
    /// `delete`.
    #[serde(rename = "type")]
    pub kind: ChangeType,
    /// The message's position.
    pub target: Seq,
    /// The message's id, as shown.
    pub id: String,
    /// The message's sender.
    pub user: String,
    /// The recipient; only in direct messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// The id was derived from the position.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub derived: bool,
    /// The message's timestamp, in Unix milliseconds.
    pub timestamp: i64,
    /// When the stream received the message, in Unix milliseconds.
    pub received: i64,
    /// Soft or hard.
    pub mode: Mode,
    /// Who deleted it: the sender, or a moderator.
    pub by: String,
}

/// A [`Deletion`] with its position in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its own position.
    pub seq: Seq,
    /// `general`, `__admin__`, `dm.alice.bob`.
    pub room: String,
    /// When the stream received it, in Unix milliseconds.
    pub received_ms: i64,
    /// The deletion itself.
    pub deletion: Deletion,
}

impl Change {
    /// Whether `subject` is one of changes.
    pub fn is_change_subject(subject: &str) -> bool {
        subject.starts_with("change.")
    }

    /// Parses a change in the stream.
    ///
    /// # Errors
    /// The [`Reason`] why it can never be applied.
    pub fn parse(
        subject: &str,
        payload: &[u8],
        seq: Seq,
        received_ms: i64,
    ) -> Result<Change, Reason> {
        let room = changed_room(subject).ok_or(Reason::UnsupportedSubject)?;
        // serde would accept an array for a struct.
        if payload.first() != Some(&b'{') {
            return Err(Reason::MalformedChange);
        }
        let deletion: Deletion =
            serde_json::from_slice(payload).map_err(|_| Reason::MalformedChange)?;
        let names = [
            Some(&deletion.user),
            Some(&deletion.by),
            deletion.to.as_ref(),
        ];
        let good_name =
            |name: &&String| (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.contains('\0');
        let good_id =
            (1..=MAX_ID_BYTES).contains(&deletion.id.len()) && !deletion.id.contains('\0');
        let known = deletion.target > Seq::ZERO && deletion.target < seq;
        let derived = !deletion.derived || deletion.id == derived_id(deletion.target);
        let direct = deletion.to.is_some() == room.starts_with("dm.");
        if names.into_iter().flatten().all(|name| good_name(&name))
            && good_id
            && known
            && derived
            && direct
        {
            Ok(Change {
                seq,
                room,
                received_ms,
                deletion,
            })
        } else {
            Err(Reason::MalformedChange)
        }
    }

    /// Whether `message` is the deleted one or a duplicate of it: the same sender and id, at any
    /// position.
    pub fn covers(&self, message: &Message) -> bool {
        let Deletion {
            target,
            user,
            id,
            derived,
            ..
        } = &self.deletion;
        message.user == *user && message.id == *id && (!derived || message.seq == *target)
    }

    /// What readers get in the place of the message.
    pub fn tombstone(&self) -> Message {
        let deletion = &self.deletion;
        Message {
            id: deletion.id.clone(),
            seq: deletion.target,
            room: self.room.clone(),
            user: deletion.user.clone(),
            text: String::new(),
            timestamp: deletion.timestamp,
            to: deletion.to.clone(),
            status: deletion.to.is_some().then_some(Status::Sent),
            delivered_at: None,
            read_at: None,
            deleted: true,
        }
    }

    /// The deletion as a sync page lists it.
    pub fn entry(&self) -> ChangeEntry {
        let Deletion {
            kind,
            target,
            id,
            user,
            mode,
            by,
            ..
        } = self.deletion.clone();
        ChangeEntry {
            kind,
            seq: self.seq,
            target,
            id,
            user,
            mode,
            by,
        }
    }
}

/// A change as a sync page lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeEntry {
    /// `delete`.
    #[serde(rename = "type")]
    pub kind: ChangeType,
    /// Its own position in the stream.
    pub seq: Seq,
    /// The position of the message it deletes.
    pub target: Seq,
    /// The message's id.
    pub id: String,
    /// The message's sender.
    pub user: String,
    /// Soft or hard.
    pub mode: Mode,
    /// Who deleted it.
    pub by: String,
}

/// The stream's subject for changes in a room.
pub fn change_subject(room: &str) -> String {
    if is_direct(room) {
        format!("change.{room}")
    } else {
        format!("change.chat.{room}")
    }
}

/// The subject for events of a room.
pub fn event_subject(room: &str) -> String {
    if is_direct(room) {
        format!("events.v1.{room}")
    } else {
        format!("events.v1.chat.{room}")
    }
}

/// Names of rooms contain no dots, so only conversations begin with `dm.`.
fn is_direct(room: &str) -> bool {
    room.starts_with("dm.")
}

fn changed_room(subject: &str) -> Option<String> {
    let tokens: Vec<&str> = subject.split('.').collect();
    let good = |name: &str| (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.contains('\0');
    match tokens[..] {
        ["change", "chat", room] if good(room) => Some(room.to_owned()),
        ["change", "dm", first, second] if good(first) && good(second) && first <= second => {
            Some(direct_name(first, second))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn deletion() -> Value {
        json!({
            "type": "delete", "target": 10, "id": "a-1", "user": "ann", "mode": "soft", "by": "ann",
            "timestamp": 1_700_000_000_000_i64, "received": 1_700_000_000_001_i64,
        })
    }

    fn parse(subject: &str, body: &Value) -> Result<Change, Reason> {
        Change::parse(
            subject,
            body.to_string().as_bytes(),
            Seq::new(12).unwrap(),
            0,
        )
    }

    #[test]
    fn a_deletion_is_parsed_and_written() {
        let change = parse("change.chat.general", &deletion()).unwrap();
        assert_eq!(serde_json::to_value(&change.deletion).unwrap(), deletion());
        assert_eq!(
            serde_json::to_value(change.entry()).unwrap(),
            json!({
                "type": "delete", "seq": 12, "target": 10, "id": "a-1",
                "user": "ann", "mode": "soft", "by": "ann",
            })
        );
        assert_eq!(
            serde_json::to_string(&change.tombstone()).unwrap(),
            concat!(
                r#"{"id":"a-1","seq":10,"room":"general","user":"ann","text":"","#,
                r#""timestamp":1700000000000,"deleted":true}"#
            )
        );
        assert_eq!(change_subject(&change.room), "change.chat.general");
        assert_eq!(event_subject("dm.ann.bob"), "events.v1.dm.ann.bob");
    }

    #[test]
    fn a_deletion_covers_every_duplicate_of_its_message_and_no_other() {
        let change = parse("change.chat.general", &deletion()).unwrap();
        let other = |edit: fn(&mut Message)| {
            let mut message = change.tombstone();
            edit(&mut message);
            message
        };
        assert!(change.covers(&other(|message| message.seq = Seq::new(11).unwrap())));
        assert!(!change.covers(&other(|message| message.user = "bob".to_owned())));
        assert!(!change.covers(&other(|message| message.id = "a-2".to_owned())));
        let mut body = deletion();
        body["id"] = "seq:10".into();
        body["derived"] = true.into();
        let change = parse("change.chat.general", &body).unwrap();
        let mut elsewhere = change.tombstone();
        assert!(change.covers(&elsewhere));
        elsewhere.seq = Seq::new(11).unwrap();
        assert!(!change.covers(&elsewhere), "this id is client-supplied");
    }

    #[test]
    fn a_malformed_deletion_is_refused() {
        for subject in [
            "change.chat",
            "change.chat.a.b",
            "change.dm.a",
            "change.dm.b.a",
            "change.x.y",
            "change.chat.",
            "chat.general",
        ] {
            assert_eq!(
                parse(subject, &deletion()),
                Err(Reason::UnsupportedSubject),
                "{subject}"
            );
        }
        assert_eq!(
            parse("change.dm.ann.bob", &deletion()),
            Err(Reason::MalformedChange),
            "to is missing"
        );
        let long = "x".repeat(256);
        for (field, value) in [
            ("type", json!("edit")),
            ("target", json!(0)),
            ("target", json!(12)),
            ("target", json!("10")),
            ("id", json!("")),
            ("id", json!("a\0")),
            ("user", json!("")),
            ("user", json!(long)),
            ("by", json!(null)),
            ("mode", json!("medium")),
            ("to", json!("bob")),
            ("derived", json!(true)),
        ] {
            let mut body = deletion();
            body[field] = value.clone();
            assert_eq!(
                parse("change.chat.general", &body),
                Err(Reason::MalformedChange),
                "{field} {value}"
            );
        }
        for payload in ["", "[]", "not json"] {
            assert_eq!(
                Change::parse(
                    "change.chat.a",
                    payload.as_bytes(),
                    Seq::new(12).unwrap(),
                    0
                ),
                Err(Reason::MalformedChange)
            );
        }
    }
}
