//! A message on its way in, and a message on its way out.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::reason::Reason;
use crate::subject::StreamSubject;
use base::seq::Seq;

const MAX_USER_BYTES: usize = 255;
/// The longest id a sender may give, in bytes.
pub const MAX_ID_BYTES: usize = 128;
/// 1990-01-01T00:00:00Z. Nobody chatted on NATS before; what claims so is a broken clock.
const EARLIEST_TIMESTAMP_MS: i64 = 631_152_000_000;
const DAY_MS: i64 = 86_400_000;
/// JSON may write one byte of text as `\u0001`.
const WORST_ESCAPE: usize = 6;
/// Room for the other fields of a message, and for some nobody knows.
const ENVELOPE_BYTES: usize = 8 * 1024;

/// What a message may weigh.
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
    /// The largest payload that can hold a text within the limit.
    pub const fn payload_bytes(self) -> usize {
        self.text_bytes * WORST_ESCAPE + ENVELOPE_BYTES
    }
}

/// A message of the log that can be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// Its place in the one order.
    pub seq: Seq,
    /// `general`, `__admin__` or `dm.alice.bob`.
    pub room: String,
    /// Who wrote it. In direct messages the subject says so, whatever the body claims.
    pub user: String,
    /// To whom, in direct messages.
    pub to: Option<String>,
    /// The sender's own id; `None` when the sequence has to serve.
    pub id: Option<String>,
    /// The text.
    pub text: String,
    /// Unix milliseconds: the client's word where believable, else when the log received it.
    pub timestamp: i64,
    /// The body claimed another room or sender than the subject; the subject won.
    pub mismatched: bool,
}

impl Incoming {
    /// Reads one message of the log.
    ///
    /// `message_id` is the header `Nats-Msg-Id`; `received_ms` is when the log took the message, in
    /// Unix milliseconds. Deterministic, so that a redelivery and a reader of the tail see the same.
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
        let place = StreamSubject::parse(subject)?;
        let body = Body::parse(payload, limits)?;
        let room = place.room();
        let said_room = body.room.is_none_or(|said| said == room || said == subject);
        let (user, to) = match place {
            StreamSubject::Direct { from, to } => (from.to_owned(), Some(to.to_owned())),
            StreamSubject::Chat(_) | StreamSubject::Admin => (body.user.clone(), None),
        };
        let mismatched = !said_room || user != body.user;
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

    /// The id readers see.
    pub fn shown_id(&self) -> String {
        self.id.clone().unwrap_or_else(|| derived_id(self.seq))
    }

    /// As readers see it.
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

/// What a client says about the time, or `received_ms` when it says nothing or something absurd. Unix milliseconds.
pub fn plausible_timestamp(said: Option<i64>, received_ms: i64) -> i64 {
    said.filter(|ms| (EARLIEST_TIMESTAMP_MS..=received_ms.saturating_add(DAY_MS)).contains(ms))
        .unwrap_or(received_ms)
}

/// The id of a message whose sender gave none: the same at every delivery.
pub fn derived_id(seq: Seq) -> String {
    format!("seq:{seq}")
}

fn check_text(text: &str, max_bytes: usize, too_long: Reason, nul: Reason) -> Result<(), Reason> {
    if text.len() > max_bytes {
        Err(too_long)
    } else if text.contains('\0') {
        Err(nul)
    } else {
        Ok(())
    }
}

/// A message as history, sync and inbox give it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The sender's id, or one derived from the sequence.
    pub id: String,
    /// Its place in the one order.
    pub seq: Seq,
    /// `general`, `__admin__`, `dm.alice.bob`.
    pub room: String,
    /// Who wrote it.
    pub user: String,
    /// The text; empty for a tombstone.
    pub text: String,
    /// Unix milliseconds. For showing, never for sorting.
    pub timestamp: i64,
    /// To whom; only in direct messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// How far it came; only in direct messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    /// When its recipient's client confirmed it, in Unix milliseconds; only where history was asked for it.
    #[serde(
        default,
        rename = "deliveredAt",
        skip_serializing_if = "Option::is_none"
    )]
    pub delivered_at: Option<i64>,
    /// When its recipient read it, in Unix milliseconds; only where history was asked for it.
    #[serde(default, rename = "readAt", skip_serializing_if = "Option::is_none")]
    pub read_at: Option<i64>,
    /// A tombstone: the message was deleted, its place remains.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
}

/// How far a direct message came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// In the log.
    Sent,
    /// The recipient's client has confirmed it.
    Delivered,
    /// The recipient has read it.
    Read,
}

/// The known keys of a message's body, checked.
struct Body {
    user: String,
    text: String,
    timestamp: Option<i64>,
    room: Option<String>,
    id: Option<String>,
}

impl Body {
    fn parse(payload: &[u8], limits: Limits) -> Result<Body, Reason> {
        if payload.is_empty() {
            return Err(Reason::EmptyPayload);
        }
        if payload.len() > limits.payload_bytes() {
            return Err(Reason::PayloadTooLarge);
        }
        Keys::read(payload)?.check(limits)
    }
}

/// serde_json tells its syntax errors apart by their text only; the tests below hold it to that.
fn syntax_reason(error: &serde_json::Error) -> Reason {
    let text = error.to_string();
    if text.starts_with("recursion limit exceeded") {
        Reason::TooDeep
    } else if text.starts_with("lone leading surrogate")
        || text.starts_with("unexpected end of hex escape")
    {
        Reason::LoneSurrogate
    } else if text.starts_with("number out of range") {
        Reason::NumberOutOfRange
    } else {
        Reason::NotJson
    }
}

/// One value under a known key.
pub(crate) enum Scalar {
    Null,
    Text(String),
    Whole(i64),
    OutOfRange,
    Other,
}

/// The known keys of a JSON object, as they stand there.
#[derive(Default)]
pub(crate) struct Keys {
    user: Option<Scalar>,
    pub(crate) text: Option<Scalar>,
    pub(crate) timestamp: Option<Scalar>,
    room: Option<Scalar>,
    pub(crate) id: Option<Scalar>,
    stream: Option<Scalar>,
    seq: Option<Scalar>,
}

impl Keys {
    /// Reads a JSON object; what is wrong with it as a whole is the error.
    pub(crate) fn read(payload: &[u8]) -> Result<Keys, Reason> {
        let text = std::str::from_utf8(payload).map_err(|_| Reason::InvalidUtf8)?;
        let mut reader = Reader {
            keys: Keys::default(),
            reason: None,
        };
        let mut json = serde_json::Deserializer::from_str(text);
        let outcome = json.deserialize_any(&mut reader).and_then(|()| json.end());
        if let Some(reason) = reader.reason {
            return Err(reason);
        }
        outcome.map_err(|error| syntax_reason(&error))?;
        Ok(reader.keys)
    }

    fn slot(&mut self, key: &str) -> Option<&mut Option<Scalar>> {
        match key {
            "user" => Some(&mut self.user),
            "text" => Some(&mut self.text),
            "timestamp" => Some(&mut self.timestamp),
            "room" => Some(&mut self.room),
            "id" => Some(&mut self.id),
            "stream" => Some(&mut self.stream),
            "seq" => Some(&mut self.seq),
            _ => None,
        }
    }

    fn check(self, limits: Limits) -> Result<Body, Reason> {
        if matches!(
            (&self.stream, &self.seq),
            (Some(Scalar::Text(_)), Some(Scalar::Whole(_)))
        ) {
            return Err(Reason::PublishAck);
        }
        let user = string(self.user)?
            .filter(|user| !user.is_empty())
            .ok_or(Reason::MissingUser)?;
        check_text(
            &user,
            MAX_USER_BYTES,
            Reason::UserTooLong,
            Reason::NulInUser,
        )?;
        let text = string(self.text)?.ok_or(Reason::MissingText)?;
        check_text(
            &text,
            limits.text_bytes,
            Reason::TextTooLong,
            Reason::NulInText,
        )?;
        let timestamp = match self.timestamp {
            None | Some(Scalar::Null) => None,
            Some(Scalar::Whole(ms)) => Some(ms),
            Some(Scalar::OutOfRange) => return Err(Reason::NumberOutOfRange),
            Some(Scalar::Text(_) | Scalar::Other) => return Err(Reason::WrongType),
        };
        // A room in the body is only ever compared, so one of another type is just not this room.
        let room = match self.room {
            None | Some(Scalar::Null) => None,
            Some(Scalar::Text(room)) => Some(room),
            Some(_) => Some(String::new()),
        };
        Ok(Body {
            user,
            text,
            timestamp,
            room,
            id: string(self.id)?.filter(|id| !id.is_empty()),
        })
    }
}

fn string(value: Option<Scalar>) -> Result<Option<String>, Reason> {
    match value {
        None | Some(Scalar::Null) => Ok(None),
        Some(Scalar::Text(text)) => Ok(Some(text)),
        Some(_) => Err(Reason::WrongType),
    }
}

/// Reads the top level by hand: a derived struct would take `["a","b"]` for a message, and a `Value`
/// would take the last of two `text`s in silence.
struct Reader {
    keys: Keys,
    reason: Option<Reason>,
}

impl Reader {
    fn refuse<T, E: serde::de::Error>(&mut self, reason: Reason) -> Result<T, E> {
        self.reason = Some(reason);
        Err(E::custom(reason))
    }
}

macro_rules! not_an_object {
    ($($method:ident: $type:ty),*) => {
        $(fn $method<E: serde::de::Error>(self, _: $type) -> Result<(), E> { self.refuse(Reason::NotAnObject) })*
    };
}

impl<'de> Visitor<'de> for &mut Reader {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    not_an_object!(visit_bool: bool, visit_i64: i64, visit_u64: u64, visit_f64: f64, visit_str: &str);

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.refuse(Reason::NotAnObject)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        self.refuse(Reason::NotAnObject)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(AnyScalar)?;
            if let Some(slot) = self.keys.slot(&key)
                && slot.replace(value).is_some()
            {
                return self.refuse(Reason::DuplicateKey);
            }
        }
        Ok(())
    }
}

/// Any value; only scalars are kept. Unlike [`IgnoredAny`], which walks nesting without a limit in
/// serde_json, this goes through the recursion limit.
struct AnyScalar;

impl<'de> DeserializeSeed<'de> for AnyScalar {
    type Value = Scalar;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Scalar, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for AnyScalar {
    type Value = Scalar;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Scalar, E> {
        Ok(Scalar::Null)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Scalar, E> {
        Ok(Scalar::Other)
    }

    fn visit_i64<E>(self, value: i64) -> Result<Scalar, E> {
        Ok(Scalar::Whole(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Scalar, E> {
        Ok(i64::try_from(value).map_or(Scalar::OutOfRange, Scalar::Whole))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Scalar, E> {
        // Browsers have clocks with fractions of a millisecond.
        Ok(if value.abs() < i64::MAX as f64 {
            Scalar::Whole(value as i64)
        } else {
            Scalar::OutOfRange
        })
    }

    fn visit_str<E>(self, value: &str) -> Result<Scalar, E> {
        Ok(Scalar::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Scalar, E> {
        Ok(Scalar::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Scalar, A::Error> {
        while seq.next_element_seed(AnyScalar)?.is_some() {}
        Ok(Scalar::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Scalar, A::Error> {
        while map.next_key::<IgnoredAny>()?.is_some() {
            map.next_value_seed(AnyScalar)?;
        }
        Ok(Scalar::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECEIVED: i64 = 1_700_000_000_000;

    fn parse_as(subject: &str, header: Option<&str>, payload: &[u8]) -> Result<Incoming, Reason> {
        Incoming::parse(
            subject,
            header,
            payload,
            Seq::new(7).unwrap(),
            RECEIVED,
            Limits::default(),
        )
    }

    fn parse(payload: &str) -> Result<Incoming, Reason> {
        parse_as("chat.general", None, payload.as_bytes())
    }

    #[test]
    fn a_message_is_read() {
        let message = parse(r#"{"user":"ann","text":"hi","timestamp":1600000000000,"room":"general","id":"a1","more":{"x":[1]}}"#).unwrap();
        assert!(!message.mismatched);
        assert_eq!(message.timestamp, 1_600_000_000_000);
        assert_eq!(
            serde_json::to_string(&message.into_message()).unwrap(),
            r#"{"id":"a1","seq":7,"room":"general","user":"ann","text":"hi","timestamp":1600000000000}"#
        );
    }

    #[test]
    fn the_subject_beats_the_body() {
        assert!(
            !parse(r#"{"user":"a","text":"","room":"chat.general"}"#)
                .unwrap()
                .mismatched
        );
        assert!(
            parse(r#"{"user":"a","text":"","room":"other"}"#)
                .unwrap()
                .mismatched
        );
        assert!(
            parse(r#"{"user":"a","text":"","room":5}"#)
                .unwrap()
                .mismatched
        );
        let direct = parse_as("dm.bob.alice", None, br#"{"user":"mallory","text":"x"}"#).unwrap();
        assert_eq!(
            (
                direct.user.as_str(),
                direct.to.as_deref(),
                direct.room.as_str()
            ),
            ("bob", Some("alice"), "dm.alice.bob")
        );
        assert!(direct.mismatched);
    }

    #[test]
    fn an_absurd_timestamp_becomes_the_logs_own() {
        for said in [
            "null",
            "0",
            "-5",
            "631151999999",
            "1700086400001",
            "9000000000000000000",
        ] {
            let message =
                parse(&format!(r#"{{"user":"a","text":"x","timestamp":{said}}}"#)).unwrap();
            assert_eq!(message.timestamp, RECEIVED, "{said}");
        }
        assert_eq!(
            parse(r#"{"user":"a","text":"x","timestamp":1699999999999.7}"#)
                .unwrap()
                .timestamp,
            1_699_999_999_999
        );
    }

    #[test]
    fn the_id_is_the_bodys_then_the_headers_then_derived() {
        let long = "h".repeat(129);
        let id = |header, body: &str| {
            parse_as("chat.general", header, body.as_bytes()).map(|message| message.shown_id())
        };
        assert_eq!(
            id(Some("h"), r#"{"user":"a","text":"x","id":"b"}"#),
            Ok("b".into())
        );
        assert_eq!(id(Some("h"), r#"{"user":"a","text":"x"}"#), Ok("h".into()));
        assert_eq!(
            id(Some("h"), r#"{"user":"a","text":"x","id":""}"#),
            Ok("h".into())
        );
        assert_eq!(id(None, r#"{"user":"a","text":"x"}"#), Ok("seq:7".into()));
        assert_eq!(
            id(Some(&long), r#"{"user":"a","text":"x"}"#),
            Err(Reason::IdTooLong)
        );
        assert_eq!(
            id(Some("\0"), r#"{"user":"a","text":"x"}"#),
            Err(Reason::NulInId)
        );
    }

    #[test]
    fn each_bad_body_has_its_own_reason() {
        let deep = format!(
            r#"{{"user":"a","text":"x","z":{}{}}}"#,
            "[".repeat(200),
            "]".repeat(200)
        );
        let long = |key: &str, n: usize| {
            let mut fields = [
                ("user", "a".to_owned()),
                ("text", "x".to_owned()),
                ("id", "i".to_owned()),
            ];
            fields.iter_mut().find(|field| field.0 == key).unwrap().1 = "y".repeat(n);
            format!(
                r#"{{"user":"{}","text":"{}","id":"{}"}}"#,
                fields[0].1, fields[1].1, fields[2].1
            )
        };
        let cases: Vec<(String, Reason)> = [
            ("hello", Reason::NotJson),
            (r#"{"user":"a","text":"x""#, Reason::NotJson),
            (r#"{"user":"a","text":"x"} {}"#, Reason::NotJson),
            ("", Reason::EmptyPayload),
            (r#"["a","b"]"#, Reason::NotAnObject),
            ("17", Reason::NotAnObject),
            ("null", Reason::NotAnObject),
            (r#""text""#, Reason::NotAnObject),
            (r#"{"user":"a","text":"\ud800"}"#, Reason::LoneSurrogate),
            (r#"{"user":"a","text":"\ud800x"}"#, Reason::LoneSurrogate),
            (r#"{"user":"a","text":"\ud800\ud800"}"#, Reason::LoneSurrogate),
            (r#"{"user":"a","text":"\udc00"}"#, Reason::LoneSurrogate),
            (r#"{"user":"a","text":"\u0000"}"#, Reason::NulInText),
            (r#"{"user":"\u0000","text":"x"}"#, Reason::NulInUser),
            (r#"{"user":"a","text":"x","id":"\u0000"}"#, Reason::NulInId),
            (r#"{"user":"a"}"#, Reason::MissingText),
            (r#"{"user":"a","text":null}"#, Reason::MissingText),
            (r#"{"text":"x"}"#, Reason::MissingUser),
            (r#"{"user":"","text":"x"}"#, Reason::MissingUser),
            (r#"{"user":1,"text":"x"}"#, Reason::WrongType),
            (r#"{"user":"a","text":["x"]}"#, Reason::WrongType),
            (r#"{"user":"a","text":"x","timestamp":"now"}"#, Reason::WrongType),
            (r#"{"user":"a","text":"x","timestamp":99999999999999999999}"#, Reason::NumberOutOfRange),
            (r#"{"user":"a","text":"x","timestamp":9223372036854775808}"#, Reason::NumberOutOfRange),
            (r#"{"user":"a","text":"x","timestamp":1e999}"#, Reason::NumberOutOfRange),
            (r#"{"user":"a","text":"x","text":"y"}"#, Reason::DuplicateKey),
            (r#"{"stream":"CHAT_MESSAGES","seq":5}"#, Reason::PublishAck),
            (r#"{"stream":"CHAT_MESSAGES","domain":"hub","seq":5,"duplicate":true,"user":"a","text":"x"}"#, Reason::PublishAck),
        ]
        .into_iter()
        .map(|(payload, reason)| (payload.to_owned(), reason))
        .chain([
            (deep, Reason::TooDeep),
            (long("text", 64 * 1024 + 1), Reason::TextTooLong),
            (long("user", 256), Reason::UserTooLong),
            (long("id", 129), Reason::IdTooLong),
            (format!(r#"{{"user":"a","text":"x","pad":"{}"}}"#, "p".repeat(1 << 20)), Reason::PayloadTooLarge),
        ])
        .collect();
        for (payload, reason) in cases {
            assert_eq!(
                parse(&payload),
                Err(reason),
                "{}",
                &payload[..payload.len().min(80)]
            );
        }
        assert_eq!(
            parse_as("chat.general", None, b"{\"user\":\"\xff\",\"text\":\"x\"}"),
            Err(Reason::InvalidUtf8)
        );
        for at_the_limit in [long("text", 64 * 1024), long("user", 255), long("id", 128)] {
            parse(&at_the_limit).unwrap();
        }
    }
}
