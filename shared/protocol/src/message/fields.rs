//! Parsing of a message's body.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{Limits, MAX_USER_BYTES};
use crate::reason::Reason;

/// The known fields of a message's body, checked.
pub(super) struct Body {
    pub user: String,
    pub text: String,
    pub timestamp: Option<i64>,
    pub room: Option<String>,
    pub id: Option<String>,
}

impl Body {
    pub fn parse(payload: &[u8], limits: Limits) -> Result<Body, Reason> {
        if payload.is_empty() {
            return Err(Reason::EmptyPayload);
        }
        if payload.len() > limits.payload_bytes() {
            return Err(Reason::PayloadTooLarge);
        }
        Fields::parse(payload)?.check(limits)
    }
}

/// The reason for a syntax error. serde_json's errors differ in their text only; the tests of this
/// module notice when a new version changes it.
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

/// The value of a known field.
pub(crate) enum Scalar {
    Null,
    Text(String),
    Whole(i64),
    OutOfRange,
    Other,
}

/// The known fields of a JSON object, not yet checked.
#[derive(Default)]
pub(crate) struct Fields {
    user: Option<Scalar>,
    pub(crate) text: Option<Scalar>,
    pub(crate) timestamp: Option<Scalar>,
    room: Option<Scalar>,
    pub(crate) id: Option<Scalar>,
    stream: Option<Scalar>,
    seq: Option<Scalar>,
}

impl Fields {
    /// Parses a JSON object. The error is about the object as a whole.
    pub(crate) fn parse(payload: &[u8]) -> Result<Fields, Reason> {
        let text = std::str::from_utf8(payload).map_err(|_| Reason::InvalidUtf8)?;
        let mut reader = Reader {
            fields: Fields::default(),
            reason: None,
        };
        let mut json = serde_json::Deserializer::from_str(text);
        let outcome = json.deserialize_any(&mut reader).and_then(|()| json.end());
        if let Some(reason) = reader.reason {
            return Err(reason);
        }
        outcome.map_err(|error| syntax_reason(&error))?;
        Ok(reader.fields)
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
        // The room in the body is only compared, so a value of another type is just another room.
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

/// Parses the top level by hand: a derived struct would accept `["a","b"]` as a message, and a
/// `Value` would silently take the last of two `text`s.
struct Reader {
    fields: Fields,
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
        $(fn $method<E: serde::de::Error>(self, _: $type) -> Result<(), E> {
            self.refuse(Reason::NotAnObject)
        })*
    };
}

impl<'de> Visitor<'de> for &mut Reader {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    not_an_object! {
        visit_bool: bool, visit_i64: i64, visit_u64: u64, visit_f64: f64, visit_str: &str
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.refuse(Reason::NotAnObject)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        self.refuse(Reason::NotAnObject)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(AnyScalar)?;
            if let Some(slot) = self.fields.slot(&key)
                && slot.replace(value).is_some()
            {
                return self.refuse(Reason::DuplicateKey);
            }
        }
        Ok(())
    }
}

/// Parses any value and keeps scalars only. Unlike [`IgnoredAny`], for which serde_json has no
/// recursion limit, this respects it.
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
        // Clocks of browsers have fractions of a millisecond.
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

pub(super) fn check_text(
    text: &str,
    max_bytes: usize,
    too_long: Reason,
    nul: Reason,
) -> Result<(), Reason> {
    if text.len() > max_bytes {
        Err(too_long)
    } else if text.contains('\0') {
        Err(nul)
    } else {
        Ok(())
    }
}
