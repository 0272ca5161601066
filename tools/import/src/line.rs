//! From a line of a file to a message of the stream.

use std::collections::HashMap;

use async_nats::header::{HeaderMap, HeaderValue};
use bytes::Bytes;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use base::error::Refusal;
use base::seq::Seq;
use protocol::header;
use protocol::message::{Incoming, Limits};
use protocol::name::Room;

/// The publisher in the admin room's subject; also the prefix of generated ids.
const PUBLISHER: &str = "import";
/// Bytes of a hash used as an id: enough that two lines never share one by chance.
const ID_BYTES: usize = 16;
/// What the protocol and our headers take of `max_payload`.
const HEADER_ROOM: usize = 1024;

/// What is published for one line.
#[derive(Debug, Clone)]
pub struct Outgoing {
    pub subject: String,
    /// As readers name it.
    pub room: String,
    pub payload: Bytes,
    /// `Nats-Msg-Id`: a hash, so that no user's text appears in a header. It covers the sender, so
    /// that one sender's id cannot suppress another's message, and room and text, so that JetStream
    /// never treats another text as a duplicate.
    pub message_id: HeaderValue,
    /// The client-supplied id, if the line has one.
    pub own_id: Option<OwnId>,
}

/// A client-supplied id and the message it names.
#[derive(Debug, Clone, Copy)]
pub struct OwnId {
    /// Hash of user and id.
    pub key: Hash,
    /// Hash of room and text.
    pub content: Hash,
}

impl OwnId {
    /// As stored; the room as `general` or `__admin__`.
    pub fn new(room: &str, user: &str, id: &str, text: &str) -> OwnId {
        OwnId {
            key: hash(&[user, id]),
            content: hash(&[room, text]),
        }
    }
}

/// A hash, cut to [`ID_BYTES`].
pub type Hash = [u8; ID_BYTES];

impl Outgoing {
    /// The headers every publish of this message carries.
    pub fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::MESSAGE_ID, self.message_id.clone());
        headers
    }
}

/// Reads the lines of one file.
#[derive(Debug)]
pub struct Lines {
    limits: Limits,
    max_bytes: usize,
    now_ms: i64,
    general: String,
    /// How often a line without an id occurred. Two equal lines are two messages: each gets an id
    /// of its own, and the same one at the next import.
    seen: HashMap<[u8; ID_BYTES], u32>,
}

impl Lines {
    /// Accepts lines that fit `limits` and the server's `max_payload`; `now_ms` is the time of
    /// reading.
    pub fn new(limits: Limits, max_payload: usize, now_ms: i64) -> Lines {
        let max_bytes = limits
            .payload_bytes()
            .min(max_payload.saturating_sub(HEADER_ROOM));
        let general = Room::parse("general")
            .map_or_else(|_| String::new(), |room| room.append_subject(PUBLISHER));
        Lines {
            limits,
            max_bytes,
            now_ms,
            general,
            seen: HashMap::new(),
        }
    }

    /// The same for another file, which counts its own repeated lines.
    pub fn fresh(&self) -> Lines {
        Lines {
            general: self.general.clone(),
            seen: HashMap::new(),
            ..*self
        }
    }

    /// # Errors
    /// Why this line cannot become a message: what would become a dead letter is refused here,
    /// where its author can still correct it.
    pub fn read(&mut self, line: &[u8]) -> Result<Outgoing, String> {
        // The same check as persist-message's, which names a reason for everything it refuses.
        Incoming::parse(
            &self.general,
            None,
            line,
            Seq::ZERO,
            self.now_ms,
            self.limits,
        )
        .map_err(|reason| reason.to_string())?;
        let mut body: Map<String, Value> =
            serde_json::from_slice(line).map_err(|_| "not_json".to_owned())?;
        let named = body
            .get("room")
            .and_then(Value::as_str)
            .ok_or(r#"no "room": name one, as in {"room":"general"}"#)?;
        let room =
            Room::from_body(named).map_err(|Refusal { reason, .. }| format!("room: {reason}"))?;
        let (id, own) = match body
            .get("id")
            .and_then(Value::as_str)
            .filter(|id| !id.is_empty())
        {
            Some(id) => (id.to_owned(), true),
            None => (self.derived_id(&room, &body), false),
        };
        let own_id =
            own.then(|| OwnId::new(room.as_str(), text(&body, "user"), &id, text(&body, "text")));
        let message_id = format!(
            "{PUBLISHER}-{}",
            hex(&hash(&[
                text(&body, "user"),
                &id,
                room.as_str(),
                text(&body, "text")
            ]))
        );
        body.insert("id".to_owned(), id.into());
        body.insert("room".to_owned(), room.as_str().into());
        let payload = serde_json::to_vec(&body).map_err(|error| error.to_string())?;
        if payload.len() > self.max_bytes {
            return Err(format!(
                "{} bytes with its id, and a message may have {}",
                payload.len(),
                self.max_bytes
            ));
        }
        let message_id = message_id
            .parse()
            .map_err(|_| "no header can hold its id".to_owned())?;
        Ok(Outgoing {
            subject: room.append_subject(PUBLISHER),
            room: room.as_str().to_owned(),
            payload: payload.into(),
            message_id,
            own_id,
        })
    }

    /// The same for the same file at every import: a hash of the line's content and of how often it
    /// occurred before.
    fn derived_id(&mut self, room: &Room, body: &Map<String, Value>) -> String {
        let timestamp = body
            .get("timestamp")
            .map(Value::to_string)
            .unwrap_or_default();
        let fields = [
            room.as_str(),
            text(body, "user"),
            &timestamp,
            text(body, "text"),
        ];
        let seen = self.seen.entry(hash(&fields)).or_default();
        let occurrence = seen.to_string();
        *seen += 1;
        format!(
            "{PUBLISHER}-{}",
            hex(&hash(&[
                fields[0],
                fields[1],
                fields[2],
                fields[3],
                &occurrence
            ]))
        )
    }
}

fn text<'a>(body: &'a Map<String, Value>, key: &str) -> &'a str {
    body.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// Each field with its length before it, or "a","bc" would be "ab","c".
fn hash(fields: &[&str]) -> Hash {
    let mut hash = Sha256::new();
    for field in fields {
        hash.update((field.len() as u64).to_be_bytes());
        hash.update(field);
    }
    let mut id = [0; ID_BYTES];
    id.copy_from_slice(&hash.finalize()[..ID_BYTES]);
    id
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: i64 = 1_700_000_000_000;

    fn lines() -> Lines {
        Lines::new(Limits::default(), 1 << 20, NOW_MS)
    }

    fn id(message: &Outgoing) -> String {
        let body: Map<String, Value> = serde_json::from_slice(&message.payload).unwrap();
        text(&body, "id").to_owned()
    }

    #[test]
    fn the_same_file_gets_the_same_ids() {
        let file = [r#"{"user":"a","text":"x","timestamp":1,"room":"general"}"#; 2];
        let ids = || {
            let mut lines = lines();
            file.map(|line| id(&lines.read(line.as_bytes()).unwrap()))
        };
        let [first, second] = ids();
        assert_ne!(first, second);
        assert_eq!(ids(), [first, second]);
    }

    #[test]
    fn every_field_makes_another_id() {
        let base = lines()
            .read(br#"{"user":"ab","text":"c","timestamp":1,"room":"general"}"#)
            .unwrap();
        for other in [
            r#"{"user":"a","text":"bc","timestamp":1,"room":"general"}"#,
            r#"{"user":"ab","text":"c","timestamp":2,"room":"general"}"#,
            r#"{"user":"ab","text":"c","room":"general"}"#,
            r#"{"user":"ab","text":"c","timestamp":1,"room":"random"}"#,
        ] {
            let other = lines().read(other.as_bytes()).unwrap();
            assert_ne!(id(&base), id(&other));
            assert_ne!(base.message_id, other.message_id);
        }
        let same = lines()
            .read(br#"{"room":"chat.general","timestamp":1,"text":"c","user":"ab","more":[1]}"#)
            .unwrap();
        assert_eq!(id(&base), id(&same));
    }

    #[test]
    fn an_id_of_the_line_stays_and_belongs_to_its_sender() {
        let read = |user: &str| {
            lines()
                .read(
                    format!(r#"{{"user":"{user}","text":"x","room":"general","id":"7\r"}}"#)
                        .as_bytes(),
                )
                .unwrap()
        };
        let one = read("a");
        let other = read("b");
        assert_eq!(id(&one), "7\r");
        assert_ne!(one.message_id, other.message_id);
    }

    #[test]
    fn another_text_is_never_taken_for_one_that_is_there() {
        let read = |room: &str, text: &str| {
            lines()
                .read(
                    format!(r#"{{"user":"a","text":"{text}","room":"{room}","id":"7"}}"#)
                        .as_bytes(),
                )
                .unwrap()
        };
        let first = read("alpha", "one");
        assert_eq!(first.message_id, read("chat.alpha", "one").message_id);
        for other in [read("alpha", "two"), read("beta", "one")] {
            assert_ne!(first.message_id, other.message_id);
            let first = first.own_id.unwrap();
            let other = other.own_id.unwrap();
            assert!(first.key == other.key && first.content != other.content);
        }
    }

    #[test]
    fn rooms_have_their_subjects() {
        for (room, subject) in [
            ("general", "chat.general"),
            ("chat.general", "chat.general"),
            ("__admin__", "admin.import"),
        ] {
            let message = lines()
                .read(format!(r#"{{"user":"a","text":"x","room":"{room}"}}"#).as_bytes())
                .unwrap();
            assert_eq!(message.subject, subject);
        }
    }

    #[test]
    fn a_refusal_says_why() {
        for (line, why) in [
            ("{", "not_json"),
            ("[1]", "not_an_object"),
            (r#"{"user":"a","room":"general"}"#, "missing_text"),
            (r#"{"user":"a","text":"x"}"#, r#"no "room""#),
            (r#"{"user":"a","text":"x","room":5}"#, r#"no "room""#),
            (
                r#"{"user":"a","text":"x","room":"a b"}"#,
                "room: a room is 1 to 64",
            ),
            (
                r#"{"user":"a","text":"x","room":"dm.a.b"}"#,
                "room: a room is 1 to 64",
            ),
            (
                r#"{"user":"a","text":"x","text":"y","room":"general"}"#,
                "duplicate_key",
            ),
        ] {
            let refusal = lines().read(line.as_bytes()).unwrap_err();
            assert!(refusal.starts_with(why), "{line}: {refusal}");
        }
        let long = format!(
            r#"{{"user":"a","text":"{}","room":"general"}}"#,
            "x".repeat(2_000)
        );
        let refusal = Lines::new(Limits::default(), 2_000, NOW_MS)
            .read(long.as_bytes())
            .unwrap_err();
        assert!(refusal.contains("a message may have 976"), "{refusal}");
    }
}
