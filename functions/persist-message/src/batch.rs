//! A batch of deliveries, sorted into rows that can be stored and letters that cannot.

use runtime::{DatabaseError, Delivery, header_block};
use sqlx::types::time::OffsetDateTime;
use wire::{Incoming, Limits, Reason};

/// The unique key a reused sequence runs into.
const SEQUENCE_KEY: &str = "messages_pkey";

/// What one statement stores.
#[derive(Debug, Default)]
pub struct Batch {
    /// In the order of the unique key, so that two copies never lock each other's rows crosswise.
    pub rows: Vec<Row>,
    /// For the dead letters.
    pub letters: Vec<Letter>,
    /// Messages whose sender and id stood in this batch already, under a lower sequence.
    pub repeated: u64,
    /// Messages delivered more than once.
    pub redelivered: u64,
    /// Messages whose body claimed another room or sender than their subject.
    pub contradicted: u64,
}

/// One row of `messages`.
#[derive(Debug)]
pub struct Row {
    /// The message.
    pub message: Incoming,
    /// The id as stored.
    pub id: String,
    /// As delivered, for the dead letters should the database refuse the row.
    original: Original,
}

/// One row of `dead_letters`.
#[derive(Debug)]
pub struct Letter {
    /// As delivered.
    pub original: Original,
    /// Why.
    pub reason: Reason,
    /// For the operator.
    pub detail: String,
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
    /// When the log took it.
    pub received_at: OffsetDateTime,
}

impl Batch {
    /// Reads every delivery; what cannot be stored becomes a letter.
    pub fn read(deliveries: &[Delivery], limits: Limits) -> Batch {
        let mut batch = Batch::default();
        for delivery in deliveries {
            let message = &delivery.message;
            batch.redelivered += u64::from(delivery.attempt > 1);
            let parsed = match &delivery.malformed {
                Some(block) if block.is_empty() => Err(Reason::MalformedSubject),
                Some(_) => Err(Reason::MalformedHeaders),
                None => Incoming::parse(&message.subject, message.message_id(), &message.payload, message.seq, message.received_ms, limits),
            };
            let original = Original::of(delivery);
            match parsed {
                Ok(message) => {
                    batch.contradicted += u64::from(message.contradicted);
                    batch.rows.push(Row { id: message.shown_id(), message, original });
                }
                Err(reason) => batch.letters.push(Letter { original, reason, detail: String::new() }),
            }
        }
        batch.rows.sort_by(|a, b| a.key().cmp(&b.key()).then(a.message.seq.cmp(&b.message.seq)));
        let all = batch.rows.len();
        batch.rows.dedup_by(|later, first| later.key() == first.key());
        batch.repeated = (all - batch.rows.len()) as u64;
        batch
    }

    /// Two halves of a batch the database refused; a row that stands alone becomes a letter.
    pub fn halve(mut self, error: &DatabaseError) -> Vec<Batch> {
        if self.rows.len() > 1 {
            let rows = self.rows.split_off(self.rows.len() / 2);
            return vec![self, Batch { rows, ..Batch::default() }];
        }
        let refused = self.rows.drain(..).map(|row| {
            let reason = if error.constraint.as_deref() == Some(SEQUENCE_KEY) { Reason::SequenceReused } else { Reason::RefusedByDatabase };
            Letter { original: row.original, reason, detail: error.to_string() }
        });
        self.letters.extend(refused);
        vec![self]
    }

    /// A batch of letters for those rows whose sequence is another message's.
    pub fn letters_for(self, reused: &[i64]) -> Batch {
        let of = |row: Row| Letter { original: row.original, reason: Reason::SequenceReused, detail: String::new() };
        let rows = self.rows.into_iter().filter(|row| reused.contains(&row.message.seq.as_i64()));
        Batch { letters: rows.map(of).collect(), ..Batch::default() }
    }
}

impl Row {
    /// The unique key of `messages`.
    fn key(&self) -> (&str, &str, bool) {
        (&self.message.user, &self.id, self.derived())
    }

    /// Whether the id was made from the sequence.
    pub fn derived(&self) -> bool {
        self.message.id.is_none()
    }

    /// When the sender says it was sent.
    pub fn sent_at(&self) -> OffsetDateTime {
        instant(self.message.timestamp)
    }

    /// When the log took it.
    pub fn received_at(&self) -> OffsetDateTime {
        self.original.received_at
    }
}

impl Original {
    fn of(delivery: &Delivery) -> Original {
        let message = &delivery.message;
        Original {
            seq: message.seq.as_i64(),
            subject: message.subject.replace('\0', "\u{fffd}"),
            headers: delivery.malformed.clone().unwrap_or_else(|| header_block(message.headers.as_ref())),
            payload: message.payload.clone(),
            received_at: instant(message.received_ms),
        }
    }
}

/// Unix milliseconds as a point in time; the wire has made sure that it is one.
fn instant(ms: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}
