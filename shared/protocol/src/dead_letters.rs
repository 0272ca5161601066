//! `deadletters.list`, `.show`, `.retry`, `.drop`: messages that could not be stored, and what
//! operators do about them.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::body;
use crate::reason::Reason;
use base::endpoint::ParseRequest;
use base::error::Refusal;
use base::seq::Seq;

const DEFAULT_PAGE: u32 = 50;
const LIST_EXAMPLE: &str = concat!(
    r#"{"limit":50,"after":0,"reason":"not_json","subject":"chat.*","outcome":"waiting"}"#,
    ", or empty"
);
const ONE_EXAMPLE: &str = r#"{"id":1234}"#;
/// A subject fits into nats-server's `max_control_line`, which is 4096 bytes by default.
const MAX_PATTERN_BYTES: usize = 4_096;
/// A pattern is compiled token by token, so their number needs a limit.
const MAX_PATTERN_TOKENS: usize = 32;

/// The number of a dead letter: 1 to 2^63 - 1, assigned in the order in which dead letters are
/// stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeadLetterId(i64);

impl DeadLetterId {
    /// `None` below 1.
    pub const fn new(id: i64) -> Option<DeadLetterId> {
        if id > 0 { Some(DeadLetterId(id)) } else { None }
    }

    /// The number, as PostgreSQL's `bigint`.
    pub const fn get(self) -> i64 {
        self.0
    }

    fn from_body(body: &Map<String, Value>) -> Result<DeadLetterId, Refusal> {
        match body.get("id") {
            None | Some(Value::Null) => Err(Refusal::bad_request(format!(
                "id of the dead letter is missing; give an object such as {ONE_EXAMPLE}"
            ))),
            Some(id) => id.as_i64().and_then(DeadLetterId::new).ok_or_else(|| {
                Refusal::bad_request(format!(
                    "id must be a dead letter's: a whole number from 1 to {}",
                    i64::MAX
                ))
            }),
        }
    }
}

impl fmt::Display for DeadLetterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How a dead letter left the list of those that wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeadLetterOutcome {
    /// Appended to the stream again.
    Retried,
    /// An operator dropped it.
    Dropped,
    /// The message was deleted by its sender; headers and payload are erased.
    Erased,
}

impl DeadLetterOutcome {
    /// The name on the wire and in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            DeadLetterOutcome::Retried => "retried",
            DeadLetterOutcome::Dropped => "dropped",
            DeadLetterOutcome::Erased => "erased",
        }
    }

    /// From the name on the wire or in the table.
    pub fn parse(outcome: &str) -> Option<DeadLetterOutcome> {
        [
            DeadLetterOutcome::Retried,
            DeadLetterOutcome::Dropped,
            DeadLetterOutcome::Erased,
        ]
        .into_iter()
        .find(|known| known.as_str() == outcome)
    }
}

/// Selects dead letters by their outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutcomeFilter {
    /// Those without an outcome.
    Waiting,
    /// Those with this outcome.
    Only(DeadLetterOutcome),
    /// All of them.
    All,
}

impl OutcomeFilter {
    fn from_body(body: &Map<String, Value>) -> Result<OutcomeFilter, Refusal> {
        let name = match body.get("outcome") {
            None | Some(Value::Null) => return Ok(OutcomeFilter::Waiting),
            Some(value) => value.as_str(),
        };
        match name {
            Some("waiting") => Ok(OutcomeFilter::Waiting),
            Some("all") => Ok(OutcomeFilter::All),
            name => match name.and_then(DeadLetterOutcome::parse) {
                Some(outcome) => Ok(OutcomeFilter::Only(outcome)),
                None => Err(Refusal::bad_request(concat!(
                    r#"outcome must be "waiting", "retried", "dropped", "erased" or "all"; "#,
                    "without it, waiting"
                ))),
            },
        }
    }
}

/// A subject, or a NATS pattern: `*` is one token, `>` at the end is one or more. 1 to 4096 bytes
/// and at most 32 tokens, none of them empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubjectPattern(String);

impl SubjectPattern {
    /// # Errors
    /// 400 with the rule that `pattern` breaks.
    pub fn parse(pattern: &str) -> Result<SubjectPattern, Refusal> {
        let tokens: Vec<&str> = pattern.split('.').collect();
        let good_token = |(place, token): (usize, &&str)| {
            !token.is_empty() && (*token != ">" || place + 1 == tokens.len())
        };
        let good = pattern.len() <= MAX_PATTERN_BYTES
            && tokens.len() <= MAX_PATTERN_TOKENS
            && tokens.iter().enumerate().all(good_token)
            && !pattern.contains(|c: char| c.is_whitespace() || c.is_control());
        if good {
            Ok(SubjectPattern(pattern.to_owned()))
        } else {
            Err(Refusal::bad_request(format!(
                "subject must be a subject or a NATS pattern such as chat.* or dm.>, \
                 at most {MAX_PATTERN_BYTES} bytes and {MAX_PATTERN_TOKENS} tokens, \
                 none of them empty, > only at the end, no spaces"
            )))
        }
    }

    /// The pattern as given.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The tokens, wildcards included.
    pub fn tokens(&self) -> impl Iterator<Item = &str> {
        self.0.split('.')
    }
}

/// `{"limit"?: 1..500 (50), "after"?: id (0), "reason"?, "subject"?, "outcome"?}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListDeadLetters {
    /// The most dead letters on the page.
    pub limit: u32,
    /// Those with a greater id; with 0 from the beginning.
    pub after: i64,
    /// Those with this reason.
    pub reason: Option<Reason>,
    /// Those published to a matching subject.
    pub subject: Option<SubjectPattern>,
    /// Those with such an outcome; by default those that wait.
    pub outcome: OutcomeFilter,
}

impl ParseRequest for ListDeadLetters {
    fn parse(_names: &str, body: &[u8]) -> Result<ListDeadLetters, Refusal> {
        let body = body::object(body, LIST_EXAMPLE)?;
        let after = match body.get("after") {
            None | Some(Value::Null) => 0,
            Some(after) => after.as_i64().filter(|after| *after >= 0).ok_or_else(|| {
                Refusal::bad_request(format!(
                    "after must be the id of a dead letter, or 0: a whole number up to {}",
                    i64::MAX
                ))
            })?,
        };
        let subject = match body.get("subject") {
            None | Some(Value::Null) => None,
            // A value that is no string is refused like a malformed pattern.
            Some(pattern) => Some(SubjectPattern::parse(pattern.as_str().unwrap_or_default())?),
        };
        let limit = body::limit(&body, DEFAULT_PAGE)?;
        Ok(ListDeadLetters {
            limit,
            after,
            reason: reason(&body)?,
            subject,
            outcome: OutcomeFilter::from_body(&body)?,
        })
    }
}

fn reason(body: &Map<String, Value>) -> Result<Option<Reason>, Refusal> {
    let name = match body.get("reason") {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => value.as_str(),
    };
    match Reason::ALL
        .iter()
        .find(|reason| name == Some(reason.as_str()))
    {
        Some(reason) => Ok(Some(*reason)),
        None => {
            let names: Vec<&str> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
            Err(Refusal::bad_request(format!(
                "reason must be one of {}",
                names.join(", ")
            )))
        }
    }
}

macro_rules! requests_by_id {
    ($($(#[$doc:meta])* $name:ident),*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq)]
            pub struct $name(pub DeadLetterId);

            impl ParseRequest for $name {
                fn parse(_names: &str, body: &[u8]) -> Result<Self, Refusal> {
                    DeadLetterId::from_body(&body::object(body, ONE_EXAMPLE)?).map($name)
                }
            }
        )*
    };
}

requests_by_id! {
    /// Show one dead letter with headers and payload: `{"id"}`.
    ShowDeadLetter,
    /// Append a dead letter to the stream again: `{"id"}`.
    RetryDeadLetter,
    /// Take a dead letter off the list of those that wait: `{"id"}`.
    DropDeadLetter
}

/// A dead letter without headers and payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetter {
    /// Its number.
    pub id: DeadLetterId,
    /// The position that the message had in the stream.
    pub seq: Seq,
    /// The subject it was published to. U+0000 and invalid UTF-8 are replaced by U+FFFD.
    pub subject: String,
    /// Why it could not be stored: the name of a [`Reason`].
    pub reason: String,
    /// Details of the reason, or empty. Never contains a message's text.
    pub detail: String,
    /// The payload's length in bytes.
    pub bytes: u64,
    /// When the stream received the message, in Unix milliseconds.
    pub received_at: i64,
    /// When the dead letter was stored, in Unix milliseconds.
    pub stored_at: i64,
    /// Its outcome; absent while it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<DeadLetterOutcome>,
    /// The new position in the stream, if it was retried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome_seq: Option<Seq>,
    /// When it got its outcome, in Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome_at: Option<i64>,
}

/// Dead letters by ascending id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterPage {
    /// At most `limit`; fewer when the reply would exceed `max_payload`.
    pub letters: Vec<DeadLetter>,
    /// There are more: ask again with the last one's id as `after`.
    pub more: bool,
}

/// A dead letter with headers and payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownDeadLetter {
    /// Everything but headers and payload.
    #[serde(flatten)]
    pub dead_letter: DeadLetter,
    /// The whole header block, with its line `NATS/1.0`, in base64; empty when there was none.
    pub headers: String,
    /// The payload in base64.
    pub payload: String,
    /// The payload as text, if it is UTF-8 and fits into the reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// What became of a dead letter that was appended again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retried {
    /// The dead letter's number.
    pub id: DeadLetterId,
    /// Its new position in the stream.
    pub seq: Seq,
    /// What was seen of it before the request's deadline.
    pub outcome: RetryOutcome,
    /// Why it is a dead letter again, with [`RetryOutcome::DeadLetter`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What became of a message that was appended again, as far as we saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetryOutcome {
    /// It is stored.
    Stored,
    /// A message with the same sender and id is stored under another position.
    Duplicate,
    /// It is a new dead letter.
    DeadLetter,
    /// The stream has it, but it was not stored before the deadline. Is persist-message running?
    Appended,
}

/// A dead letter that was taken off the list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedDeadLetter {
    /// The dead letter's number.
    pub id: DeadLetterId,
    /// `dropped`.
    pub outcome: DeadLetterOutcome,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_may_be_filtered() {
        let parse = |body: &str| ListDeadLetters::parse("", body.as_bytes());
        let all = ListDeadLetters {
            limit: 50,
            after: 0,
            reason: None,
            subject: None,
            outcome: OutcomeFilter::Waiting,
        };
        assert_eq!(parse("").unwrap(), all);
        let nulls = concat!(
            r#"{"limit":null,"after":null,"reason":null,"subject":null,"outcome":null,"#,
            r#""unknown":[1]}"#
        );
        assert_eq!(parse(nulls).unwrap(), all);
        let filtered = concat!(
            r#"{"limit":500,"after":9223372036854775807,"reason":"not_json","#,
            r#""subject":"dm.*.>","outcome":"all"}"#
        );
        let request = parse(filtered).unwrap();
        assert_eq!(
            (request.limit, request.after, request.reason),
            (500, i64::MAX, Some(Reason::NotJson))
        );
        assert_eq!(
            (request.subject.unwrap().as_str(), request.outcome),
            ("dm.*.>", OutcomeFilter::All)
        );
        for outcome in [
            DeadLetterOutcome::Retried,
            DeadLetterOutcome::Dropped,
            DeadLetterOutcome::Erased,
        ] {
            let request = parse(&format!(r#"{{"outcome":"{}"}}"#, outcome.as_str())).unwrap();
            assert_eq!(request.outcome, OutcomeFilter::Only(outcome));
        }
    }

    #[test]
    fn a_wrong_filter_is_named() {
        let long = "s".repeat(4_097);
        let deep = vec!["*"; 33].join(".");
        for (body, hint) in [
            (r#"{"limit":0}"#.to_owned(), "limit must be"),
            (r#"{"limit":501}"#.to_owned(), "limit must be"),
            (r#"{"limit":-1}"#.to_owned(), "limit must be"),
            (r#"{"limit":"5"}"#.to_owned(), "limit must be"),
            (r#"{"after":-1}"#.to_owned(), "after must be"),
            (r#"{"after":"1"}"#.to_owned(), "after must be"),
            (r#"{"after":1.5}"#.to_owned(), "after must be"),
            (
                r#"{"after":9223372036854775808}"#.to_owned(),
                "after must be",
            ),
            (
                r#"{"reason":"no_json"}"#.to_owned(),
                "reason must be one of malformed_headers, ",
            ),
            (r#"{"reason":7}"#.to_owned(), "reason must be one of"),
            (r#"{"outcome":"gone"}"#.to_owned(), "outcome must be"),
            (r#"{"outcome":true}"#.to_owned(), "outcome must be"),
            (r#"{"subject":7}"#.to_owned(), "subject must be"),
            (r#"{"subject":""}"#.to_owned(), "subject must be"),
            (r#"{"subject":"chat."}"#.to_owned(), "subject must be"),
            (r#"{"subject":">.chat"}"#.to_owned(), "subject must be"),
            (r#"{"subject":"chat.a b"}"#.to_owned(), "subject must be"),
            (r#"{"subject":"chat.\u0000"}"#.to_owned(), "subject must be"),
            (format!(r#"{{"subject":"{long}"}}"#), "subject must be"),
            (format!(r#"{{"subject":"{deep}"}}"#), "subject must be"),
            ("[]".to_owned(), "a JSON object"),
            ("all".to_owned(), "a JSON object"),
        ] {
            let refusal = ListDeadLetters::parse("", body.as_bytes()).unwrap_err();
            assert_eq!(refusal.code.number(), 400, "{body}");
            assert!(refusal.reason.contains(hint), "{body}: {}", refusal.reason);
        }
    }

    #[test]
    fn one_dead_letter_is_identified_by_its_number() {
        assert_eq!(
            ShowDeadLetter::parse("", br#"{"id":7,"unknown":{}}"#)
                .unwrap()
                .0
                .get(),
            7
        );
        for body in [
            "",
            "{}",
            r#"{"id":null}"#,
            r#"{"id":0}"#,
            r#"{"id":-7}"#,
            r#"{"id":"7"}"#,
            r#"{"id":7.5}"#,
            r#"{"id":9223372036854775808}"#,
            r#"{"id":[7]}"#,
            "[7]",
            "7",
        ] {
            for refusal in [
                ShowDeadLetter::parse("", body.as_bytes()).unwrap_err(),
                RetryDeadLetter::parse("", body.as_bytes()).unwrap_err(),
                DropDeadLetter::parse("", body.as_bytes()).unwrap_err(),
            ] {
                assert_eq!(refusal.code.number(), 400, "{body}");
                assert!(
                    refusal.reason.contains("id") || refusal.reason.contains("a JSON object"),
                    "{body}: {}",
                    refusal.reason
                );
            }
        }
    }
}
