//! Rows of `messages`, `changes` and `dead_letters`, as parsed from deliveries.

use sqlx::types::time::OffsetDateTime;

use base::time::from_unix_ms;
use jetstream::consumer::Delivery;
use nats::headers::header_block;
use protocol::change::{Change, Mode};
use protocol::message::Incoming;
use protocol::reason::Reason;

/// What identifies a message: the unique key of `messages`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Who sent it.
    pub sender: String,
    /// The id as stored.
    pub id: String,
    /// Whether the id was derived from the sequence.
    pub derived: bool,
}

impl Key {
    /// Of a parsed message.
    pub fn of(message: &Incoming) -> Key {
        Key {
            sender: message.user.clone(),
            id: message.shown_id(),
            derived: message.id.is_none(),
        }
    }
}

/// One row of `messages`.
#[derive(Debug)]
pub struct Row {
    /// The message.
    pub message: Incoming,
    /// The id as stored.
    pub id: String,
    /// The sampled trace it came with.
    pub traceparent: Option<String>,
    /// Messages of the batch with the same sender and id and higher sequences, ascending. They stay
    /// with this row: stored with it they are duplicates or conflicts, and if it is refused, the
    /// first of them is tried in its place.
    pub duplicates: Vec<Row>,
    /// As delivered, for a dead letter.
    pub original: Original,
}

/// One row of `changes`.
#[derive(Debug)]
pub struct ChangeRow {
    /// The change.
    pub change: Change,
    /// The sampled trace it came with.
    pub traceparent: Option<String>,
    /// As delivered, for a dead letter.
    pub original: Original,
}

/// One row of `dead_letters`.
#[derive(Debug)]
pub struct DeadLetter {
    /// As delivered.
    pub original: Original,
    /// Why it is a dead letter.
    pub reason: Reason,
    /// For the operator.
    pub detail: String,
    /// Which message it holds; `None` when it holds none that can be parsed.
    pub key: Option<Key>,
}

/// A message as delivered.
#[derive(Debug)]
pub struct Original {
    /// The sequence as PostgreSQL's `bigint`.
    pub seq: i64,
    /// As published, U+0000 replaced.
    pub subject: String,
    /// The header block.
    pub headers: Vec<u8>,
    /// As published.
    pub payload: bytes::Bytes,
    /// When the stream received it.
    pub received_at: OffsetDateTime,
}

impl Row {
    /// The unique key of `messages`.
    pub fn key_ref(&self) -> (&str, &str, bool) {
        (&self.message.user, &self.id, self.derived())
    }

    /// The unique key of `messages`.
    pub fn key(&self) -> Key {
        Key::of(&self.message)
    }

    /// Its sequence as PostgreSQL's `bigint`.
    pub fn seq(&self) -> i64 {
        self.original.seq
    }

    /// Makes it a dead letter.
    pub fn into_dead_letter(self, reason: Reason, detail: String) -> DeadLetter {
        let key = Some(self.key());
        DeadLetter {
            original: self.original,
            reason,
            detail,
            key,
        }
    }

    /// Whether the id was derived from the sequence.
    pub fn derived(&self) -> bool {
        self.message.id.is_none()
    }

    /// When the client says it was sent.
    pub fn sent_at(&self) -> OffsetDateTime {
        from_unix_ms(self.message.timestamp)
    }

    /// When the stream received it.
    pub fn received_at(&self) -> OffsetDateTime {
        self.original.received_at
    }
}

impl ChangeRow {
    /// The unique key of the changed message in `messages`.
    pub fn key_ref(&self) -> (&str, &str, bool) {
        let deletion = &self.change.deletion;
        (&deletion.user, &deletion.id, deletion.derived)
    }

    /// The unique key of the changed message in `messages`.
    pub fn key(&self) -> Key {
        let (sender, id, derived) = self.key_ref();
        Key {
            sender: sender.to_owned(),
            id: id.to_owned(),
            derived,
        }
    }

    /// Makes it a dead letter. The change holds no text of the message.
    pub fn into_dead_letter(self, reason: Reason, detail: String) -> DeadLetter {
        DeadLetter {
            original: self.original,
            reason,
            detail,
            key: None,
        }
    }

    /// The text has to be erased wherever it is.
    pub fn is_hard(&self) -> bool {
        self.change.deletion.mode == Mode::Hard
    }

    /// The sequence of the change as PostgreSQL's `bigint`.
    pub fn seq(&self) -> i64 {
        self.original.seq
    }

    /// When the stream received the change.
    pub fn received_at(&self) -> OffsetDateTime {
        self.original.received_at
    }
}

impl Original {
    /// Of a delivery.
    pub fn of(delivery: &Delivery) -> Original {
        let message = &delivery.message;
        let malformed = delivery.malformed.clone();
        Original {
            seq: message.seq.as_i64(),
            subject: message.subject.replace('\0', "\u{fffd}"),
            headers: malformed.unwrap_or_else(|| header_block(message.headers.as_ref())),
            payload: message.payload.clone(),
            received_at: from_unix_ms(message.received_ms),
        }
    }
}
