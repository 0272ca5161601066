//! A letter with all it holds, and whether it can be appended.

use serde_json::Value;
use sqlx::Row;
use sqlx::postgres::PgRow;

use crate::settled;
use base::error::{Code, Error};
use nats::headers::{header_block, parse_headers};
use protocol::dead_letters::DeadLetterId;
use protocol::header;
use protocol::reason::Reason;
use protocol::subject::is_in_stream;
use timeline::append_again::Again;

/// A letter, whole, as it is appended.
#[derive(Debug)]
pub struct Whole {
    pub id: DeadLetterId,
    pub subject: String,
    pub headers: Vec<u8>,
    pub payload: Vec<u8>,
    reason: String,
    outcome: Option<String>,
    outcome_seq: Option<i64>,
    digest: String,
}

impl Whole {
    pub fn read(id: DeadLetterId, row: &PgRow) -> Result<Whole, sqlx::Error> {
        let whole = Whole {
            id,
            subject: row.try_get("subject")?,
            headers: row.try_get("headers")?,
            payload: row.try_get("payload")?,
            reason: row.try_get("reason")?,
            outcome: row.try_get("outcome")?,
            outcome_seq: row.try_get("outcome_seq")?,
            digest: row.try_get("digest")?,
        };
        Ok(if whole.reason == Reason::IdConflict.as_str() {
            whole.without_id()
        } else {
            whole
        })
    }

    /// Under its own id the message would meet the other one again, and be a dead letter for ever. Without it, it gets the
    /// retry's id, which nobody else has.
    fn without_id(mut self) -> Whole {
        if let Ok(Value::Object(mut body)) = serde_json::from_slice(&self.payload)
            && body.remove("id").is_some()
        {
            self.payload = Value::Object(body).to_string().into_bytes();
        }
        if let Ok(mut headers) = parse_headers(&self.headers) {
            // Empty: none, in front of whatever it came with.
            headers.insert(header::ORIGINAL_ID, "");
            self.headers = header_block(Some(&headers));
        }
        self
    }

    /// The same for the same letter, so that a retry that died before the letter was marked appends nothing twice. It
    /// begins with what no user's name holds: nobody gets it through send-message.
    pub fn message_id(&self) -> String {
        format!("/retry/{}/{}", self.id, self.digest)
    }

    /// As it goes to the log. JetStream forgets an id after two minutes, the index never: so a message that came
    /// without one gets this, and is stored once however late a retry is repeated.
    pub fn again<'a>(&'a self, message_id: &'a str) -> Again<'a> {
        Again {
            subject: &self.subject,
            headers: &self.headers,
            payload: &self.payload,
            message_id,
            unnamed: message_id,
        }
    }

    /// Why it cannot be appended, however often that is tried.
    pub fn refusal(&self) -> Option<Error> {
        let conflict = |what: String| {
            Some(Error::new(
                Code::Conflict,
                format!("dead letter {} {what}", self.id),
            ))
        };
        let unknown_subject = [Reason::MalformedSubject, Reason::NulInSubject]
            .iter()
            .any(|reason| reason.as_str() == self.reason);
        if let Some(outcome) = &self.outcome {
            Some(settled(self.id, outcome, self.outcome_seq))
        } else if self.reason == Reason::BelowFence.as_str() {
            conflict("waits below the fence: stream-bootstrap appends it by itself".to_owned())
        } else if self.reason == Reason::MalformedHeaders.as_str() {
            conflict("has headers that cannot be sent again; look at it with show, publish what is worth keeping, drop it".to_owned())
        } else if unknown_subject
            || self.subject.contains(|c: char| {
                c == char::REPLACEMENT_CHARACTER || c.is_whitespace() || c.is_control()
            })
        {
            conflict("has a subject that cannot be published to; look at it with show, publish what is worth keeping, drop it".to_owned())
        } else if !is_in_stream(&self.subject) {
            conflict("has a subject the log does not take in; look at it with show, publish what is worth keeping, drop it".to_owned())
        } else {
            None
        }
    }
}
