//! Parsing of fields that several requests share.

use serde_json::{Map, Value};

use base::error::Refusal;
use base::seq::Seq;

/// The most entries one page may hold.
pub const MAX_PAGE: u32 = 500;

/// The body as a JSON object. No body at all means an object without fields.
pub(crate) fn object(body: &[u8], example: &str) -> Result<Map<String, Value>, Refusal> {
    if body.is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_slice(body).map_err(|_| {
        Refusal::bad_request(format!("the body must be a JSON object such as {example}"))
    })
}

/// The field `limit`, or `default` without one.
pub(crate) fn limit(body: &Map<String, Value>, default: u32) -> Result<u32, Refusal> {
    match body.get("limit") {
        None | Some(Value::Null) => Ok(default),
        Some(value) => value
            .as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| (1..=MAX_PAGE).contains(n))
            .ok_or_else(|| {
                Refusal::bad_request(format!("limit must be a whole number from 1 to {MAX_PAGE}"))
            }),
    }
}

/// The sequence in the field `key`, if there is one.
pub(crate) fn sequence(body: &Map<String, Value>, key: &str) -> Result<Option<Seq>, Refusal> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().and_then(Seq::new) {
            Some(seq) => Ok(Some(seq)),
            None => Err(Refusal::bad_request(format!(
                "{key} must be a sequence: a whole number from 0 to {}",
                Seq::MAX
            ))),
        },
    }
}

/// The boolean in the field `key`; `false` without one.
pub(crate) fn flag(body: &Map<String, Value>, key: &str) -> Result<bool, Refusal> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(_) => Err(Refusal::bad_request(format!("{key} must be true or false"))),
    }
}
