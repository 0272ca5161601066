//! A batch of deliveries, sorted into rows that can be stored, changes to rows, and letters that are neither.

use runtime::{DatabaseError, Delivery, header_block, sampled_traceparent};
use sqlx::types::time::OffsetDateTime;
use wire::{Change, Incoming, Limits, Mode, Reason};

/// The unique key a reused sequence runs into.
const SEQUENCE_KEY: &str = "messages_pkey";

/// What one statement stores.
#[derive(Debug, Default)]
pub struct Batch {
    /// In the order of the unique key, so that two copies never lock each other's rows crosswise.
    pub rows: Vec<Row>,
    /// Deletions, in the order of the messages' unique key.
    pub changes: Vec<ChangeRow>,
    /// For the dead letters.
    pub letters: Vec<Letter>,
    /// Messages whose sender and id stood in this batch already, under a lower sequence.
    pub repeated: Vec<Row>,
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
    /// The sampled trace it came with.
    pub traceparent: Option<String>,
    /// As delivered, for the dead letters should the database refuse the row.
    original: Original,
}

/// One row of `changes`.
#[derive(Debug)]
pub struct ChangeRow {
    /// The change.
    pub change: Change,
    /// The sampled trace it came with.
    pub traceparent: Option<String>,
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
            let (headers, seq, received_ms) = (message.headers.as_ref(), message.seq, message.received_ms);
            let read = match &delivery.malformed {
                Some(block) if block.is_empty() => Err(Reason::MalformedSubject),
                Some(_) => Err(Reason::MalformedHeaders),
                None if Change::is_on(&message.subject) => {
                    Change::parse(&message.subject, &message.payload, seq, received_ms).map(Read::Change)
                }
                None => {
                    let id = message.message_id();
                    Incoming::parse(&message.subject, id, &message.payload, seq, received_ms, limits).map(Read::Message)
                }
            };
            let (original, traceparent) = (Original::of(delivery), sampled_traceparent(headers));
            match read {
                Ok(Read::Message(message)) => {
                    batch.contradicted += u64::from(message.contradicted);
                    batch.rows.push(Row { id: message.shown_id(), message, traceparent, original });
                }
                Ok(Read::Change(change)) => batch.changes.push(ChangeRow { change, traceparent, original }),
                Err(reason) => batch.letters.push(Letter { original, reason, detail: String::new() }),
            }
        }
        batch.rows.sort_by(|a, b| a.key().cmp(&b.key()).then(a.message.seq.cmp(&b.message.seq)));
        batch.changes.sort_by(|a, b| a.key().cmp(&b.key()).then(a.change.seq.cmp(&b.change.seq)));
        let sorted = std::mem::take(&mut batch.rows);
        for row in sorted {
            let again = batch.rows.last().is_some_and(|first| first.key() == row.key());
            if again { batch.repeated.push(row) } else { batch.rows.push(row) }
        }
        batch
    }

    /// How many rows and changes the database may refuse.
    pub fn refusable(&self) -> usize {
        self.rows.len() + self.changes.len()
    }

    /// Two parts of a batch the database refused; what stands alone becomes a letter.
    pub fn halve(mut self, error: &DatabaseError) -> Vec<Batch> {
        if self.refusable() > 1 {
            let mut rest = Batch::default();
            if self.rows.is_empty() {
                rest.changes = self.changes.split_off(self.changes.len() / 2);
            } else if self.changes.is_empty() {
                rest.rows = self.rows.split_off(self.rows.len() / 2);
            } else {
                rest.changes = std::mem::take(&mut self.changes);
            }
            // The last one is tried first: messages before deletions, which may be refused because of them.
            return vec![rest, self];
        }
        let reason = if error.constraint.as_deref() == Some(SEQUENCE_KEY) { Reason::SequenceReused } else { Reason::RefusedByDatabase };
        let rows = self.rows.drain(..).map(|row| row.original);
        let refused = rows.chain(self.changes.drain(..).map(|row| row.original));
        self.letters.extend(refused.map(|original| Letter { original, reason, detail: error.to_string() }));
        vec![self]
    }

    /// A batch of letters for those rows and changes whose sequence is another's.
    pub fn letters_for(self, reused: &[i64]) -> Batch {
        let of = |original| Letter { original, reason: Reason::SequenceReused, detail: String::new() };
        let all = self.rows.into_iter().map(|row| row.original).chain(self.changes.into_iter().map(|row| row.original));
        Batch { letters: all.filter(|original| reused.contains(&original.seq)).map(of).collect(), ..Batch::default() }
    }
}

/// What a delivery is.
enum Read {
    Message(Incoming),
    Change(Change),
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

impl ChangeRow {
    /// The unique key of the message in `messages`.
    pub fn key(&self) -> (&str, &str, bool) {
        let deletion = &self.change.deletion;
        (&deletion.user, &deletion.id, deletion.derived)
    }

    /// The text is to be erased wherever it stands.
    pub fn is_hard(&self) -> bool {
        self.change.deletion.mode == Mode::Hard
    }

    /// When the log took the change.
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
pub fn instant(ms: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}
