//! `retention.run`, `retention.status`, `retention.erase`: how long messages are kept, and how much
//! disk they take.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::body;
use base::endpoint::ParseRequest;
use base::error::Refusal;
use base::seq::Seq;

/// The row of table `retention` for rooms without a row of their own.
pub const DEFAULT_ROOMS: &str = "*";
/// The row of that table for direct messages.
pub const DIRECT_ROOMS: &str = "dm.*";

/// The longest name of a user in a message, in bytes.
const MAX_USER_BYTES: usize = 255;

/// `{"dry_run"?: bool (false)}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetentionRequest {
    /// Only report what there is to do.
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

/// What was done; in a dry run, what there is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RetentionReport {
    /// Messages trimmed from the beginning of the stream.
    pub trimmed: u64,
    /// Expired messages removed from PostgreSQL.
    pub expired: u64,
    /// Entries of the receipt history that no reader can ask for any more.
    pub moves: u64,
    /// There is more to expire than the request had time for. It will be done in the background.
    pub more: bool,
    /// This was a dry run: nothing was done.
    pub dry_run: bool,
}

/// The stream's disk budget.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Budget {
    /// The most bytes the stream may take; `None` without a limit.
    pub max_bytes: Option<u64>,
    /// How many it takes.
    pub bytes: u64,
    /// How many of them are not stored yet, estimated from the mean size of a message. Trimming can
    /// free all the others.
    pub unstored_bytes: u64,
    /// The same as a fraction of the budget, 0 to 1; `None` without a limit.
    pub unstored_part: Option<f64>,
    /// Bytes appended a second, measured lately.
    pub bytes_per_second: u64,
    /// How long the budget lasts at that rate if nothing is stored meanwhile; `None` while nothing
    /// is appended.
    pub seconds_left: Option<u64>,
}

/// `{"user": name, "dry_run"?: bool (false), "after"?: seq (0)}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EraseRequest {
    /// Whose texts: the name as it is in messages.
    pub user: String,
    /// Only report what there is to do.
    pub dry_run: bool,
    /// The stream was searched up to here.
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

/// What was done to a user's texts; in a dry run, what there is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Erased {
    /// Hard deletions appended to the stream, one for each message and each duplicate of one.
    pub deletions: u64,
    /// Messages whose deletion is in the stream already, but not yet applied by a worker.
    pub underway: u64,
    /// Dead letters whose contents were erased.
    pub letters: u64,
    /// Messages that cannot be parsed and were erased from the stream.
    pub unfit: u64,
    /// Messages that cannot be parsed and are no dead letters yet: ask again when the worker has
    /// got that far.
    pub waiting: u64,
    /// The stream was searched up to here: the `after` of the next part.
    pub through: Seq,
    /// There is more to do: ask again.
    pub more: bool,
    /// This was a dry run: nothing was done.
    pub dry_run: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dry_run_is_asked_for() {
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
        for (body, hint) in [
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
                refusal.code.number() == 400 && refusal.reason.contains(hint),
                "{body}: {}",
                refusal.reason
            );
        }
    }
}
