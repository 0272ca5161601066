//! `retention.run`, `retention.status`, `retention.erase`: how long messages are kept, and what they take.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::body;
use base::endpoint::ParseRequest;
use base::error::Refusal;
use base::seq::Seq;

/// The row of table `retention` for whatever has none of its own.
pub const DEFAULT_ROOMS: &str = "*";
/// Its row for direct messages.
pub const DIRECT_ROOMS: &str = "dm.*";

/// The longest user a message may name, in bytes.
const MAX_USER_BYTES: usize = 255;

/// Whether something is done: `{"dry_run"?: bool (false)}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetentionRequest {
    /// Only says what there is to do.
    pub dry_run: bool,
}

impl ParseRequest for RetentionRequest {
    fn parse(_names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let body = body::object(body, r#"{"dry_run":true}"#)?;
        Ok(RetentionRequest {
            dry_run: dry_run(&body)?,
        })
    }
}

fn dry_run(body: &Map<String, Value>) -> Result<bool, Refusal> {
    match body.get("dry_run") {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(dry_run)) => Ok(*dry_run),
        Some(_) => Err(Refusal::bad_request(
            "dry_run must be true or false; without it, false",
        )),
    }
}

/// What was done, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RetentionReport {
    /// Messages that left the log's beginning.
    pub trimmed: u64,
    /// Messages that had expired and left the index.
    pub expired: u64,
    /// Moves of the marks `delivered` and `read` that nobody can ask about any more.
    pub moves: u64,
    /// There is more to sweep than the request had time for; it is swept all the same.
    pub more: bool,
    /// Nothing was done.
    pub dry_run: bool,
}

/// The log's disk budget.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Budget {
    /// What the log may take; `None` without a limit.
    pub max_bytes: Option<u64>,
    /// What it takes.
    pub bytes: u64,
    /// What of it is not stored yet, at the mean size of a message. Only this much is out of reach of trimming.
    pub unstored_bytes: u64,
    /// The same as a part of the budget, 0 to 1; `None` without a limit.
    pub unstored_part: Option<f64>,
    /// Appended a second, over the last while.
    pub bytes_per_second: u64,
    /// For how long the budget lasts at that rate if nothing is stored meanwhile; `None` for as long as nothing is appended.
    pub seconds_left: Option<u64>,
}

/// Whose texts: `{"user": name, "dry_run"?: bool (false), "after"?: seq (0)}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EraseRequest {
    /// As messages name them.
    pub user: String,
    /// Only says what there is to do.
    pub dry_run: bool,
    /// The log was searched up to here.
    pub after: Seq,
}

impl ParseRequest for EraseRequest {
    fn parse(_names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let body = body::object(body, r#"{"user":"ann","dry_run":true}"#)?;
        let user = match body.get("user") {
            Some(Value::String(user))
                if (1..=MAX_USER_BYTES).contains(&user.len()) && !user.contains('\0') =>
            {
                user.clone()
            }
            _ => {
                return Err(Refusal::bad_request(format!(
                    "user must be a string of 1 to {MAX_USER_BYTES} bytes without U+0000"
                )));
            }
        };
        Ok(EraseRequest {
            user,
            dry_run: dry_run(&body)?,
            after: body::sequence(&body, "after")?.unwrap_or(Seq::ZERO),
        })
    }
}

/// What was done to a user's texts, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Erased {
    /// Hard deletions that were appended to the log: one a message, or a copy of one.
    pub deletions: u64,
    /// Messages for which one waits in the log already, not yet made by a worker.
    pub underway: u64,
    /// Dead letters that were emptied.
    pub letters: u64,
    /// What cannot be stored and was erased from the log.
    pub unfit: u64,
    /// What cannot be stored and is no dead letter yet: ask again once the worker has come so far.
    pub waiting: u64,
    /// The log was searched up to here: the next part's `after`.
    pub through: Seq,
    /// There is more to do: ask again.
    pub more: bool,
    /// Nothing was done.
    pub dry_run: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_done_only_where_it_is_said_so() {
        for (body, dry) in [
            ("", false),
            ("{}", false),
            (r#"{"dry_run":null}"#, false),
            (r#"{"dry_run":true}"#, true),
        ] {
            assert_eq!(
                RetentionRequest::parse("", body.as_bytes())
                    .unwrap()
                    .dry_run,
                dry,
                "{body}"
            );
        }
        for body in [r#"{"dry_run":"true"}"#, r#"{"dry_run":1}"#, "[]", "true"] {
            assert_eq!(
                RetentionRequest::parse("", body.as_bytes())
                    .unwrap_err()
                    .code
                    .number(),
                400,
                "{body}"
            );
        }
    }

    #[test]
    fn an_erasure_names_its_user() {
        let request = EraseRequest::parse("", br#"{"user":"anyone at all","after":7}"#).unwrap();
        assert_eq!(
            (request.user.as_str(), request.dry_run, request.after),
            ("anyone at all", false, Seq::new(7).unwrap())
        );
        let long = format!(r#"{{"user":"{}"}}"#, "u".repeat(256));
        for (body, mend) in [
            ("", "user must be"),
            (r#"{"user":""}"#, "user must be"),
            (r#"{"user":7}"#, "user must be"),
            (r#"{"user":"a\u0000"}"#, "user must be"),
            (&long, "user must be"),
            (r#"{"user":"a","dry_run":"no"}"#, "dry_run must be"),
            (r#"{"user":"a","after":-1}"#, "after must be"),
        ] {
            let refusal = EraseRequest::parse("", body.as_bytes()).unwrap_err();
            assert!(
                refusal.code.number() == 400 && refusal.reason.contains(mend),
                "{body}: {}",
                refusal.reason
            );
        }
    }
}
