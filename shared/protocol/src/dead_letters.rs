//! `deadletters.list`, `.show`, `.retry`, `.drop`: what could not be stored, and what operators do about it.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::body;
use crate::reason::Reason;
use base::endpoint::ParseRequest;
use base::error::Refusal;
use base::seq::Seq;

const DEFAULT_PAGE: u32 = 50;
const LIST_EXAMPLE: &str = r#"{"limit":50,"after":0,"reason":"not_json","subject":"chat.*","outcome":"waiting"}, or empty"#;
const ONE_EXAMPLE: &str = r#"{"id":1234}"#;
/// A subject of nats-server fits into its `max_control_line`, 4096 bytes as shipped.
const MAX_PATTERN_BYTES: usize = 4_096;
/// What a pattern means is compiled token by token.
const MAX_PATTERN_TOKENS: usize = 32;

/// A letter's number: 1 to 2^63 - 1, given out in the order in which letters were stored.
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

    fn read(body: &Map<String, Value>) -> Result<DeadLetterId, Refusal> {
        match body.get("id") {
            None | Some(Value::Null) => Err(Refusal::bad_request(format!(
                "id of the letter is missing; give an object such as {ONE_EXAMPLE}"
            ))),
            Some(id) => id.as_i64().and_then(DeadLetterId::new).ok_or_else(|| {
                Refusal::bad_request(format!(
                    "id must be a letter's: a whole number from 1 to {}",
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

/// How a letter left the list of what is waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeadLetterOutcome {
    /// Appended to the log again.
    Retried,
    /// An operator decided so.
    Dropped,
    /// Its author deleted the message; headers and payload are gone.
    Erased,
}

impl DeadLetterOutcome {
    /// As on the wire and in the table.
    pub const fn as_str(self) -> &'static str {
        match self {
            DeadLetterOutcome::Retried => "retried",
            DeadLetterOutcome::Dropped => "dropped",
            DeadLetterOutcome::Erased => "erased",
        }
    }

    /// From the wire or the table.
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

/// Which letters by their outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutcomeFilter {
    /// Those that have none yet.
    Waiting,
    /// Those with this one.
    Only(DeadLetterOutcome),
    /// Every letter.
    All,
}

impl OutcomeFilter {
    fn read(body: &Map<String, Value>) -> Result<OutcomeFilter, Refusal> {
        let said = match body.get("outcome") {
            None | Some(Value::Null) => return Ok(OutcomeFilter::Waiting),
            Some(said) => said.as_str(),
        };
        match said {
            Some("waiting") => Ok(OutcomeFilter::Waiting),
            Some("all") => Ok(OutcomeFilter::All),
            said => said.and_then(DeadLetterOutcome::parse).map(OutcomeFilter::Only).ok_or_else(|| {
                Refusal::bad_request(r#"outcome must be "waiting", "retried", "dropped", "erased" or "all"; without it, waiting"#)
            }),
        }
    }
}

/// A subject, or a NATS pattern: `*` is one token, `>` at the end is one or more. 1 to 4096 bytes, at most 32 tokens, none empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubjectPattern(String);

impl SubjectPattern {
    /// # Errors
    /// 400 with the rule, when `pattern` breaks it.
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
                "subject must be a subject or a NATS pattern such as chat.* or dm.>, at most {MAX_PATTERN_BYTES} bytes and \
                 {MAX_PATTERN_TOKENS} tokens, none of them empty, > only at the end, no spaces"
            )))
        }
    }

    /// As given.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The tokens, wildcards included.
    pub fn tokens(&self) -> impl Iterator<Item = &str> {
        self.0.split('.')
    }
}

/// Which letters: `{"limit"?: 1..500 (50), "after"?: id (0), "reason"?, "subject"?, "outcome"?}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListDeadLetters {
    /// How many at most.
    pub limit: u32,
    /// Those with a greater id; 0 from the beginning.
    pub after: i64,
    /// Those set aside for this reason.
    pub reason: Option<Reason>,
    /// Those published to such a subject.
    pub subject: Option<SubjectPattern>,
    /// Those with such an outcome; without it, those that wait.
    pub outcome: OutcomeFilter,
}

impl ParseRequest for ListDeadLetters {
    fn parse(_names: &str, body: &[u8]) -> Result<ListDeadLetters, Refusal> {
        let body = body::object(body, LIST_EXAMPLE)?;
        let after = match body.get("after") {
            None | Some(Value::Null) => 0,
            Some(after) => after.as_i64().filter(|after| *after >= 0).ok_or_else(|| {
                Refusal::bad_request(format!(
                    "after must be the id of a letter, or 0: a whole number up to {}",
                    i64::MAX
                ))
            })?,
        };
        let subject = match body.get("subject") {
            None | Some(Value::Null) => None,
            // What is no string is refused like a pattern that is none.
            Some(pattern) => Some(SubjectPattern::parse(pattern.as_str().unwrap_or_default())?),
        };
        let limit = body::limit(&body, DEFAULT_PAGE)?;
        Ok(ListDeadLetters {
            limit,
            after,
            reason: reason(&body)?,
            subject,
            outcome: OutcomeFilter::read(&body)?,
        })
    }
}

fn reason(body: &Map<String, Value>) -> Result<Option<Reason>, Refusal> {
    let said = match body.get("reason") {
        None | Some(Value::Null) => return Ok(None),
        Some(said) => said.as_str(),
    };
    match Reason::ALL
        .iter()
        .find(|reason| said == Some(reason.as_str()))
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

macro_rules! ask_for_one {
    ($($(#[$doc:meta])* $name:ident),*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq)]
            pub struct $name(pub DeadLetterId);

            impl ParseRequest for $name {
                fn parse(_names: &str, body: &[u8]) -> Result<Self, Refusal> {
                    DeadLetterId::read(&body::object(body, ONE_EXAMPLE)?).map($name)
                }
            }
        )*
    };
}

ask_for_one! {
    /// One letter with its bytes: `{"id"}`.
    ShowDeadLetter,
    /// Append it to the log again: `{"id"}`.
    RetryDeadLetter,
    /// It need not be looked at any more: `{"id"}`.
    DropDeadLetter
}

/// A letter without its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetter {
    /// Its number.
    pub id: DeadLetterId,
    /// The position the message had in the log.
    pub seq: Seq,
    /// Where it was published; U+0000 and what is not UTF-8 are written as U+FFFD.
    pub subject: String,
    /// Why it could not be stored: the name of a [`Reason`], as stored.
    pub reason: String,
    /// More about it; empty when there is no more to say. Never a message's text.
    pub detail: String,
    /// The payload's length in bytes.
    pub bytes: u64,
    /// When the log took the message, in Unix milliseconds.
    pub received_at: i64,
    /// When the letter was stored, in Unix milliseconds.
    pub stored_at: i64,
    /// What became of it; absent while it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<DeadLetterOutcome>,
    /// Of a retried letter: its new position in the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome_seq: Option<Seq>,
    /// When it got its outcome, in Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome_at: Option<i64>,
}

/// Letters by ascending id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterPage {
    /// At most as many as asked for; fewer where more would exceed `max_payload`.
    pub letters: Vec<DeadLetter>,
    /// There are more after the last one: ask again with its id as `after`.
    pub more: bool,
}

/// A letter with its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownDeadLetter {
    /// All but the bytes.
    #[serde(flatten)]
    pub letter: DeadLetter,
    /// The header block, `NATS/1.0` and all, in base64; empty when there was none.
    pub headers: String,
    /// The payload in base64.
    pub payload: String,
    /// The payload once more, where it is UTF-8 and the reply has room for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// What became of a letter that was appended again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retried {
    /// The letter's number.
    pub id: DeadLetterId,
    /// Where the log has it now.
    pub seq: Seq,
    /// What was seen within the request's time.
    pub outcome: RetryOutcome,
    /// Of [`RetryOutcome::DeadLetter`]: why this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What was seen of a message that was appended again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetryOutcome {
    /// It is stored.
    Stored,
    /// The same sender's message with the same id is stored already, under another position.
    Duplicate,
    /// It is a dead letter again, a new one.
    DeadLetter,
    /// The log has it, and it was not stored in the time there was: is persist-message running?
    Appended,
}

/// A letter that need not be looked at any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedDeadLetter {
    /// The letter's number.
    pub id: DeadLetterId,
    /// `dropped`.
    pub outcome: DeadLetterOutcome,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_may_be_narrowed() {
        let parse = |body: &str| ListDeadLetters::parse("", body.as_bytes());
        let all = ListDeadLetters {
            limit: 50,
            after: 0,
            reason: None,
            subject: None,
            outcome: OutcomeFilter::Waiting,
        };
        assert_eq!(parse("").unwrap(), all);
        assert_eq!(parse(r#"{"limit":null,"after":null,"reason":null,"subject":null,"outcome":null,"unknown":[1]}"#).unwrap(), all);
        let request = parse(r#"{"limit":500,"after":9223372036854775807,"reason":"not_json","subject":"dm.*.>","outcome":"all"}"#).unwrap();
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
        let (long, deep) = ("s".repeat(4_097), vec!["*"; 33].join("."));
        for (body, mend) in [
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
            let refusal = parse(&body).unwrap_err();
            assert_eq!(refusal.code.number(), 400, "{body}");
            assert!(refusal.reason.contains(mend), "{body}: {}", refusal.reason);
        }
    }

    #[test]
    fn one_letter_is_named_by_its_number() {
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
