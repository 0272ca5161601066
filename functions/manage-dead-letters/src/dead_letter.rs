//! A dead letter with everything it holds, and whether it can be appended again.

use serde_json::Value;
use sqlx::Row;
use sqlx::postgres::PgRow;

use base::error::{Code, Error};
use nats::headers::{header_block, parse_headers};
use protocol::dead_letters::{DeadLetterId, DeadLetterOutcome};
use protocol::header;
use protocol::reason::Reason;
use protocol::subject::is_in_stream;
use timeline::append_again::Again;

/// A dead letter as it is appended again.
#[derive(Debug)]
pub struct DeadLetter {
    pub id: DeadLetterId,
    pub subject: String,
    pub headers: Vec<u8>,
    pub payload: Vec<u8>,
    reason: String,
    outcome: Option<String>,
    outcome_seq: Option<i64>,
    digest: String,
}

impl DeadLetter {
    pub fn from_row(id: DeadLetterId, row: &PgRow) -> Result<DeadLetter, sqlx::Error> {
        let dead_letter = DeadLetter {
            id,
            subject: row.try_get("subject")?,
            headers: row.try_get("headers")?,
            payload: row.try_get("payload")?,
            reason: row.try_get("reason")?,
            outcome: row.try_get("outcome")?,
            outcome_seq: row.try_get("outcome_seq")?,
            digest: row.try_get("digest")?,
        };
        Ok(if dead_letter.reason == Reason::IdConflict.as_str() {
            dead_letter.without_id()
        } else {
            dead_letter
        })
    }

    /// Under its own id the message would conflict with the other one again, and stay a dead letter
    /// for ever. Without an id it gets that of the retry, which nobody else has.
    fn without_id(mut self) -> DeadLetter {
        if let Ok(Value::Object(mut body)) = serde_json::from_slice(&self.payload)
            && body.remove("id").is_some()
        {
            self.payload = Value::Object(body).to_string().into_bytes();
        }
        if let Ok(mut headers) = parse_headers(&self.headers) {
            // An empty value means "no id", whatever id the message came with.
            headers.insert(header::ORIGINAL_ID, "");
            self.headers = header_block(Some(&headers));
        }
        self
    }

    /// The same for the same dead letter, so that a retry that died before it marked the dead dead
    /// letter appends nothing twice. It begins with a character that no user's name contains, so
    /// nobody gets it through `send-message`.
    pub fn message_id(&self) -> String {
        format!("/retry/{}/{}", self.id, self.digest)
    }

    /// What is appended. JetStream forgets an id after two minutes and PostgreSQL never. So a
    /// message that came without an id gets this one, and is stored once however late a retry is
    /// repeated.
    pub fn again<'a>(&'a self, message_id: &'a str) -> Again<'a> {
        Again {
            subject: &self.subject,
            headers: &self.headers,
            payload: &self.payload,
            message_id,
            unnamed: message_id,
        }
    }

    /// Why it can never be appended.
    pub fn refusal(&self) -> Option<Error> {
        const INSTEAD: &str = "look at it with show, publish what is worth keeping, drop it";
        if let Some(outcome) = &self.outcome {
            return Some(has_outcome(self.id, outcome, self.outcome_seq));
        }
        if self.is_dead_because(Reason::BelowFence) {
            let what = "is below the sequence guard: stream-bootstrap appends it by itself";
            return Some(self.conflict(what));
        }
        let why = if self.is_dead_because(Reason::MalformedHeaders) {
            "headers that cannot be sent again"
        } else if !self.has_publishable_subject() {
            "a subject that cannot be published to"
        } else if !is_in_stream(&self.subject) {
            "a subject the stream does not accept"
        } else {
            return None;
        };
        Some(self.conflict(&format!("has {why}; {INSTEAD}")))
    }

    fn conflict(&self, what: &str) -> Error {
        Error::new(Code::Conflict, format!("dead letter {} {what}", self.id))
    }

    fn is_dead_because(&self, reason: Reason) -> bool {
        self.reason == reason.as_str()
    }

    fn has_publishable_subject(&self) -> bool {
        let unknown = self.is_dead_because(Reason::MalformedSubject)
            || self.is_dead_because(Reason::NulInSubject);
        let unsafe_character =
            |c: char| c == char::REPLACEMENT_CHARACTER || c.is_whitespace() || c.is_control();
        !unknown && !self.subject.contains(unsafe_character)
    }
}

/// There is no such dead letter.
pub fn not_found(id: DeadLetterId) -> Error {
    Error::new(Code::NotFound, format!("there is no dead letter {id}"))
}

/// The dead letter has an outcome already, and another one was asked for.
pub fn has_outcome(id: DeadLetterId, outcome: &str, outcome_seq: Option<i64>) -> Error {
    let what = match (DeadLetterOutcome::parse(outcome), outcome_seq) {
        (Some(DeadLetterOutcome::Retried), Some(seq)) => {
            format!("was retried already: the stream has it as {seq}")
        }
        (Some(DeadLetterOutcome::Dropped), _) => "was dropped already".to_owned(),
        (Some(DeadLetterOutcome::Erased), _) => {
            "is erased: its author deleted the message".to_owned()
        }
        _ => format!("has an outcome already: {outcome}"),
    };
    Error::new(Code::Conflict, format!("dead letter {id} {what}"))
}
