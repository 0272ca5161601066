//! `bootstrap.check` and `bootstrap.apply`: the desired state of streams, consumer and schema, and
//! the actual one.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use base::endpoint::ParseRequest;
use base::error::Refusal;

/// A request without fields; its body is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmptyRequest;

impl ParseRequest for EmptyRequest {
    fn parse(_names: &str, _body: &[u8]) -> Result<EmptyRequest, Refusal> {
        Ok(EmptyRequest)
    }
}

/// The reply to `bootstrap.check`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Nothing differs, no stream takes requests, the sequence guard holds.
    pub ok: bool,
    /// What differs, field by field.
    pub differences: Vec<Difference>,
    /// A message for each kind of request that a stream would take.
    pub swallowed: Vec<String>,
    /// Numbers of the migrations that have not run yet.
    pub migrations: Vec<i64>,
    /// The stream's last sequence, and the highest one that was stored or published.
    pub fence: Option<SequenceGuard>,
}

/// A field that differs from its desired value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// `stream CHAT_MESSAGES` or `consumer CHAT_MESSAGES/persist-message`.
    pub object: String,
    /// The field, or `(missing)` when the object does not exist.
    pub field: String,
    /// The desired value.
    pub wanted: Value,
    /// The server's value.
    pub actual: Value,
}

/// The sequence guard: `last` must never be below `stored`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceGuard {
    /// The stream's last sequence.
    pub last: u64,
    /// The highest sequence in PostgreSQL, or the last one published to `CHAT_EVENTS`.
    pub stored: u64,
}

/// The reply to `bootstrap.apply`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// A message for each thing that was done; empty when nothing had to be.
    pub done: Vec<String>,
}
