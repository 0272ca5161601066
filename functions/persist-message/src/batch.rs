//! A batch of deliveries, sorted into rows that can be stored, changes to rows, and letters that are neither.

use sqlx::types::time::OffsetDateTime;

use jetstream::consumer::Delivery;
use nats::headers::header_block;
use nats::trace::sampled_traceparent;
use postgres::error::DatabaseError;
use protocol::change::{Change, Mode};
use protocol::message::{Incoming, Limits};
use protocol::reason::Reason;
use timeline::message::parse;

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
    pub letters: Vec<DeadLetter>,
    /// Messages delivered more than once.
    pub redelivered: u64,
    /// Messages whose body claimed another room or sender than their subject.
    pub mismatched: u64,
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
    /// Messages of the batch with the same sender and id, under higher sequences, ascending. They stay with the row, wherever it
    /// goes: stored with it they are duplicates or conflicts, and when it is refused the first of them is tried in its place.
    pub copies: Vec<Row>,
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
pub struct DeadLetter {
    /// As delivered.
    pub original: Original,
    /// Why.
    pub reason: Reason,
    /// For the operator.
    pub detail: String,
    /// Sender and id of the message it holds; `None` when it holds no message that could be read.
    pub named: Option<Key>,
}

/// What names a message: the unique key of `messages`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Who sent it.
    pub sender: String,
    /// The id as stored.
    pub id: String,
    /// Whether the id was made from the sequence.
    pub derived: bool,
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
            let (headers, seq, received_ms) =
                (message.headers.as_ref(), message.seq, message.received_ms);
            let read = match &delivery.malformed {
                Some(block) if block.is_empty() => Err(Reason::MalformedSubject),
                Some(_) => Err(Reason::MalformedHeaders),
                None if Change::is_change_subject(&message.subject) => {
                    Change::parse(&message.subject, &message.payload, seq, received_ms)
                        .map(Read::Change)
                }
                None => parse(message, limits).map(Read::Message),
            };
            let (original, traceparent) = (Original::of(delivery), sampled_traceparent(headers));
            match read {
                Ok(Read::Message(message)) => {
                    batch.mismatched += u64::from(message.mismatched);
                    batch.rows.push(Row {
                        id: message.shown_id(),
                        message,
                        traceparent,
                        copies: Vec::new(),
                        original,
                    });
                }
                Ok(Read::Change(change)) => batch.changes.push(ChangeRow {
                    change,
                    traceparent,
                    original,
                }),
                Err(reason) => {
                    batch.letters.push(DeadLetter {
                        original,
                        reason,
                        detail: String::new(),
                        named: None,
                    });
                }
            }
        }
        batch.rows.sort_by(|a, b| {
            a.key()
                .cmp(&b.key())
                .then(a.message.seq.cmp(&b.message.seq))
        });
        batch
            .changes
            .sort_by(|a, b| a.key().cmp(&b.key()).then(a.change.seq.cmp(&b.change.seq)));
        let sorted = std::mem::take(&mut batch.rows);
        for row in sorted {
            match batch.rows.last_mut() {
                Some(first) if first.key() == row.key() => first.copies.push(row),
                _ => batch.rows.push(row),
            }
        }
        batch
    }

    /// Messages first, then deletions, each stored by itself. One transaction for both would lock keys in two passes,
    /// and two such transactions could wait for each other; nobody needs the two to become visible together.
    pub fn parts(mut self) -> Vec<Batch> {
        let changes = Batch {
            changes: std::mem::take(&mut self.changes),
            ..Batch::default()
        };
        // The last one is stored first.
        [changes, self]
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect()
    }

    fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.changes.is_empty() && self.letters.is_empty()
    }

    /// How many rows and changes the database may refuse.
    pub fn refusable(&self) -> usize {
        self.rows.len() + self.changes.len()
    }

    /// Every message, copies too.
    pub fn messages(&self) -> impl Iterator<Item = &Row> {
        self.rows
            .iter()
            .flat_map(|row| std::iter::once(row).chain(&row.copies))
    }

    /// Whether the database refused this because the sequence is taken.
    pub fn is_reused(error: &DatabaseError) -> bool {
        error.constraint.as_deref() == Some(SEQUENCE_KEY)
    }

    /// Parts of a batch the database refused, the last one to be tried first; what stands alone becomes a letter.
    pub fn halve(mut self, error: &DatabaseError) -> Vec<Batch> {
        if self.refusable() > 1 {
            let mut rest = Batch::default();
            if self.rows.is_empty() {
                rest.changes = self.changes.split_off(self.changes.len() / 2);
            } else {
                rest.changes = std::mem::take(&mut self.changes);
                rest.rows = self.rows.split_off(self.rows.len() / 2);
            }
            return vec![rest, self];
        }
        let reason = if Batch::is_reused(error) {
            Reason::SequenceReused
        } else {
            Reason::RefusedByDatabase
        };
        let mut rest = Batch::default();
        for mut row in self.rows.drain(..) {
            // The next one with this id may say something else, which the database takes.
            let mut copies = std::mem::take(&mut row.copies).into_iter();
            rest.rows.extend(copies.next().map(|first| Row {
                copies: copies.collect(),
                ..first
            }));
            self.letters
                .push(row.into_letter(reason, error.to_string()));
        }
        let refused = self
            .changes
            .drain(..)
            .map(|row| row.into_letter(reason, error.to_string()));
        self.letters.extend(refused);
        if rest.is_empty() {
            vec![self]
        } else {
            vec![rest, self]
        }
    }

    /// A batch of letters for those whose sequence is another's, and those whose id is another text's.
    pub fn letters_for(self, reused: &[i64], conflicts: &[i64]) -> Batch {
        let mut letters = Vec::new();
        for mut row in self.rows {
            let copies = std::mem::take(&mut row.copies);
            for row in std::iter::once(row).chain(copies) {
                let seq = row.original.seq;
                let reason = if reused.contains(&seq) {
                    Reason::SequenceReused
                } else if conflicts.contains(&seq) {
                    Reason::IdConflict
                } else {
                    continue;
                };
                letters.push(row.into_letter(reason, String::new()));
            }
        }
        let changes = self
            .changes
            .into_iter()
            .filter(|row| reused.contains(&row.original.seq));
        letters.extend(changes.map(|row| row.into_letter(Reason::SequenceReused, String::new())));
        Batch {
            letters,
            ..Batch::default()
        }
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

    /// What names it.
    pub fn named(&self) -> Key {
        Key {
            sender: self.message.user.clone(),
            id: self.id.clone(),
            derived: self.derived(),
        }
    }

    /// Its sequence as PostgreSQL's `bigint`.
    pub fn seq(&self) -> i64 {
        self.original.seq
    }

    fn into_letter(self, reason: Reason, detail: String) -> DeadLetter {
        let named = Some(self.named());
        DeadLetter {
            original: self.original,
            reason,
            detail,
            named,
        }
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

    /// What names the message.
    pub fn named(&self) -> Key {
        let (sender, id, derived) = self.key();
        Key {
            sender: sender.to_owned(),
            id: id.to_owned(),
            derived,
        }
    }

    /// The deletion holds no text of the message.
    fn into_letter(self, reason: Reason, detail: String) -> DeadLetter {
        DeadLetter {
            original: self.original,
            reason,
            detail,
            named: None,
        }
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
            headers: delivery
                .malformed
                .clone()
                .unwrap_or_else(|| header_block(message.headers.as_ref())),
            payload: message.payload.clone(),
            received_at: instant(message.received_ms),
        }
    }
}

/// Unix milliseconds as a point in time; the wire has made sure that it is one.
pub fn instant(ms: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use base::seq::Seq;

    use super::*;

    fn row(seq: u64, id: &str, text: &str) -> Row {
        let body = format!(r#"{{"user":"ann","text":"{text}","id":"{id}"}}"#);
        let seq = Seq::new(seq).unwrap();
        let message = Incoming::parse(
            "chat.general",
            None,
            body.as_bytes(),
            seq,
            0,
            Limits::default(),
        )
        .unwrap();
        let original = Original {
            seq: seq.as_i64(),
            subject: "chat.general".to_owned(),
            headers: Vec::new(),
            payload: body.into(),
            received_at: instant(0),
        };
        Row {
            id: message.shown_id(),
            message,
            traceparent: None,
            copies: Vec::new(),
            original,
        }
    }

    fn batch(rows: Vec<Row>) -> Batch {
        Batch {
            rows,
            ..Batch::default()
        }
    }

    /// Rows, each with its copies, and letters.
    fn seqs(batch: &Batch) -> (Vec<Vec<i64>>, Vec<(i64, Reason)>) {
        let of = |row: &Row| {
            std::iter::once(row.seq())
                .chain(row.copies.iter().map(Row::seq))
                .collect()
        };
        (
            batch.rows.iter().map(of).collect(),
            batch
                .letters
                .iter()
                .map(|letter| (letter.original.seq, letter.reason))
                .collect(),
        )
    }

    fn refusal() -> DatabaseError {
        DatabaseError::from(sqlx::Error::PoolClosed)
    }

    #[test]
    fn copies_move_with_their_row() {
        let first = Row {
            copies: vec![row(3, "a", "x"), row(5, "a", "y")],
            ..row(1, "a", "x")
        };
        let second = Row {
            copies: vec![row(4, "b", "x")],
            ..row(2, "b", "x")
        };
        let parts = batch(vec![first, second]).halve(&refusal());
        let parts: Vec<_> = parts.iter().map(seqs).collect();
        assert_eq!(
            parts,
            [(vec![vec![2, 4]], vec![]), (vec![vec![1, 3, 5]], vec![])],
            "the last one is tried first"
        );
    }

    #[test]
    fn the_first_copy_is_tried_in_place_of_a_row_that_is_refused() {
        let refused = Row {
            copies: vec![row(3, "a", "x"), row(5, "a", "y")],
            ..row(1, "a", "x")
        };
        let parts = batch(vec![refused]).halve(&refusal());
        let parts: Vec<_> = parts.iter().map(seqs).collect();
        assert_eq!(
            parts,
            [
                (vec![vec![3, 5]], vec![]),
                (vec![], vec![(1, Reason::RefusedByDatabase)])
            ]
        );
        let alone = batch(vec![row(1, "a", "x")]).halve(&refusal());
        assert_eq!(
            alone.iter().map(seqs).collect::<Vec<_>>(),
            [(vec![], vec![(1, Reason::RefusedByDatabase)])]
        );
    }

    #[test]
    fn letters_are_written_for_copies_too() {
        let rows = vec![
            Row {
                copies: vec![row(3, "a", "x"), row(5, "a", "y")],
                ..row(1, "a", "x")
            },
            row(2, "b", "x"),
        ];
        let letters = batch(rows).letters_for(&[2], &[5]);
        assert_eq!(
            seqs(&letters),
            (
                vec![],
                vec![(5, Reason::IdConflict), (2, Reason::SequenceReused)]
            )
        );
    }
}
