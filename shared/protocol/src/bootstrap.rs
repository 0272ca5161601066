//! `bootstrap.check` and `bootstrap.apply`: what differs between the shipped data and the servers.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use base::endpoint::ParseRequest;
use base::error::Refusal;

/// A request that has nothing to say; its body is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmptyRequest;

impl ParseRequest for EmptyRequest {
    fn parse(_tokens: &str, _body: &[u8]) -> Result<EmptyRequest, Refusal> {
        Ok(EmptyRequest)
    }
}

/// The answer to `bootstrap.check`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Nothing differs, nothing is swallowed, the fence holds.
    pub ok: bool,
    /// Field by field.
    pub differences: Vec<Difference>,
    /// Requests that a stream would swallow, a sentence each.
    pub swallowed: Vec<String>,
    /// Migrations not yet run, by number.
    pub migrations: Vec<i64>,
    /// The log's last sequence against the highest one stored or told.
    pub fence: Option<SequenceGuard>,
}

/// One field that is not as it should be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// `stream CHAT_MESSAGES` or `consumer CHAT_MESSAGES/persist-message`.
    pub object: String,
    /// The field; `(missing)` when the object is not there.
    pub field: String,
    /// As shipped.
    pub wanted: Value,
    /// As the server says.
    pub actual: Value,
}

/// The sequence fence: `last` must never be below `stored`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceGuard {
    /// The stream's last sequence.
    pub last: u64,
    /// The highest sequence PostgreSQL knows, or the last one that was told in `CHAT_EVENTS`.
    pub stored: u64,
}

/// The answer to `bootstrap.apply`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// What was done, a sentence each; empty when everything was in place.
    pub done: Vec<String>,
}
