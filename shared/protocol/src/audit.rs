//! `bootstrap.audit` and `bootstrap.replay`: what became of the stream's messages, and storing them
//! again.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::body;
use base::endpoint::ParseRequest;
use base::error::Refusal;
use base::seq::Seq;

const DEFAULT_OFFENDERS: usize = 10;
const MAX_OFFENDERS: usize = 100;

/// `{"from"?: seq (0: the stream's first), "offenders"?: 0..100 (10)}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditRequest {
    /// The first position to look up.
    pub from: Seq,
    /// How many offenders the reply lists at most. All are counted.
    pub offenders: usize,
}

impl ParseRequest for AuditRequest {
    fn parse(_names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let body = body::object(body, r#"{"from":1,"offenders":10}"#)?;
        let offenders = match body.get("offenders") {
            None | Some(serde_json::Value::Null) => DEFAULT_OFFENDERS,
            Some(value) => value
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .filter(|n| *n <= MAX_OFFENDERS)
                .ok_or_else(|| {
                    Refusal::bad_request(format!(
                        "offenders must be a whole number from 0 to {MAX_OFFENDERS}"
                    ))
                })?,
        };
        Ok(AuditRequest {
            from: body::sequence(&body, "from")?.unwrap_or(Seq::ZERO),
            offenders,
        })
    }
}

/// What became of the messages in one part of the stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// The first position that was looked up.
    pub from: Seq,
    /// The last one. The next part begins after it.
    pub through: Seq,
    /// The stream has messages after `through`.
    pub more: bool,
    /// Every message is counted once.
    pub counts: AuditCounts,
    /// The first messages that are not where they should be.
    pub offenders: Vec<Offender>,
}

/// Numbers of messages by what became of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditCounts {
    /// Stored in PostgreSQL under their own position.
    pub stored: u64,
    /// Stored as a tombstone.
    pub deleted: u64,
    /// Deletions that were applied.
    pub changes: u64,
    /// Duplicates: the same sender and id are stored under another position.
    pub duplicates: u64,
    /// Dead letters, by reason.
    pub dead_letters: BTreeMap<String, u64>,
    /// Not stored, and older than their room keeps messages; also deletions of such messages.
    #[serde(default)]
    pub expired: u64,
    /// Not yet acknowledged by a worker.
    pub waiting: u64,
    /// Acknowledged, but stored nowhere: a promise is broken, or the database was damaged.
    pub missing: u64,
}

impl AuditCounts {
    /// Adds the numbers of another part of the stream.
    pub fn add(&mut self, other: &AuditCounts) {
        self.stored += other.stored;
        self.deleted += other.deleted;
        self.changes += other.changes;
        self.duplicates += other.duplicates;
        for (reason, count) in &other.dead_letters {
            *self.dead_letters.entry(reason.clone()).or_default() += count;
        }
        self.expired += other.expired;
        self.waiting += other.waiting;
        self.missing += other.missing;
    }

    /// The number of messages that were looked up.
    pub fn total(&self) -> u64 {
        let dead_letters: u64 = self.dead_letters.values().sum();
        self.stored
            + self.deleted
            + self.changes
            + self.duplicates
            + dead_letters
            + self.expired
            + self.waiting
            + self.missing
    }
}

/// A message that is not where it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offender {
    /// Its position.
    pub seq: Seq,
    /// Its subject.
    pub subject: String,
    /// What is wrong. Never contains a message's text.
    pub what: String,
}

/// `{"from"?: seq (0: the stream's first)}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplayRequest {
    /// The first position to deliver again.
    pub from: Seq,
}

impl ParseRequest for ReplayRequest {
    fn parse(_names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let body = body::object(body, r#"{"from":1}"#)?;
        Ok(ReplayRequest {
            from: body::sequence(&body, "from")?.unwrap_or(Seq::ZERO),
        })
    }
}

/// The stream is being delivered again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replayed {
    /// The first position to be delivered again. It is lower than asked for when the worker had not
    /// got that far.
    pub from: Seq,
    /// The stream's last position at that time.
    pub through: Seq,
    /// The highest position that was stored before.
    pub stored: Seq,
    /// The first and the last position that neither PostgreSQL nor the stream has any more.
    pub lost: Option<(Seq, Seq)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_optional() {
        for body in ["", "{}", r#"{"from":0,"offenders":null}"#] {
            assert_eq!(
                AuditRequest::parse("", body.as_bytes()).unwrap(),
                AuditRequest {
                    from: Seq::ZERO,
                    offenders: 10
                },
                "{body}"
            );
            assert_eq!(
                ReplayRequest::parse("", body.as_bytes()).unwrap(),
                ReplayRequest { from: Seq::ZERO },
                "{body}"
            );
        }
        let request = AuditRequest::parse("", br#"{"from":7,"offenders":0}"#).unwrap();
        assert_eq!((request.from, request.offenders), (Seq::new(7).unwrap(), 0));
    }

    #[test]
    fn a_refusal_names_the_wrong_field() {
        for (body, hint) in [
            (r#"{"from":-1}"#, "from must be a sequence"),
            (r#"{"from":"7"}"#, "from must be a sequence"),
            (r#"{"from":9223372036854775808}"#, "from must be a sequence"),
            (r#"{"offenders":101}"#, "offenders must be"),
            (r#"{"offenders":"all"}"#, "offenders must be"),
            ("7", "a JSON object"),
        ] {
            let refusal = AuditRequest::parse("", body.as_bytes()).unwrap_err();
            assert!(
                refusal.code.number() == 400 && refusal.reason.contains(hint),
                "{body}: {}",
                refusal.reason
            );
        }
        assert!(ReplayRequest::parse("", br#"{"from":1.5}"#).is_err());
    }

    #[test]
    fn parts_add_up() {
        let mut sum = AuditCounts::default();
        let part: AuditCounts = serde_json::from_value(serde_json::json!({
            "stored": 1, "deleted": 2, "changes": 3, "duplicates": 4,
            "deadLetters": {"not_json": 5}, "expired": 8, "waiting": 6, "missing": 7,
        }))
        .unwrap();
        assert_eq!(part.total(), 36);
        sum.add(&part);
        sum.add(&part);
        assert_eq!(
            (sum.total(), sum.dead_letters["not_json"], sum.missing),
            (72, 10, 14)
        );
    }
}
