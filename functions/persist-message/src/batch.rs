//! A batch of deliveries, parsed into messages, changes and dead letters.

use jetstream::consumer::Delivery;
use nats::trace::sampled_traceparent;
use postgres::error::DatabaseError;
use protocol::change::Change;
use protocol::message::{Incoming, Limits};
use protocol::reason::Reason;

use crate::row::{ChangeRow, DeadLetter, Original, Row};

/// The primary key, which a reused sequence violates.
const SEQUENCE_KEY: &str = "messages_pkey";

/// What is stored together.
#[derive(Debug, Default)]
pub struct Batch {
    /// In the order of the unique key, so that two replicas never deadlock over each other's rows.
    pub rows: Vec<Row>,
    /// Deletions, in the order of the messages' unique key.
    pub changes: Vec<ChangeRow>,
    /// What cannot be stored as either.
    pub dead_letters: Vec<DeadLetter>,
    /// Messages delivered more than once.
    pub redelivered: u64,
    /// Messages whose body names another room or sender than their subject.
    pub mismatched: u64,
}

/// What a delivery is.
enum Parsed {
    Message(Incoming),
    Change(Change),
}

impl Batch {
    /// Parses every delivery; one that cannot be stored becomes a dead letter.
    pub fn parse(deliveries: &[Delivery], limits: Limits) -> Batch {
        let mut batch = Batch::default();
        for delivery in deliveries {
            batch.redelivered += u64::from(delivery.attempt > 1);
            batch.add(delivery, limits);
        }
        batch.rows.sort_by(|a, b| {
            let by_seq = a.message.seq.cmp(&b.message.seq);
            a.key_ref().cmp(&b.key_ref()).then(by_seq)
        });
        batch.changes.sort_by(|a, b| {
            let by_seq = a.change.seq.cmp(&b.change.seq);
            a.key_ref().cmp(&b.key_ref()).then(by_seq)
        });
        for row in std::mem::take(&mut batch.rows) {
            match batch.rows.last_mut() {
                Some(first) if first.key_ref() == row.key_ref() => first.duplicates.push(row),
                _ => batch.rows.push(row),
            }
        }
        batch
    }

    fn add(&mut self, delivery: &Delivery, limits: Limits) {
        let original = Original::of(delivery);
        let traceparent = sampled_traceparent(delivery.message.headers.as_ref());
        match parse(delivery, limits) {
            Ok(Parsed::Message(message)) => {
                self.mismatched += u64::from(message.mismatched);
                self.rows.push(Row {
                    id: message.shown_id(),
                    message,
                    traceparent,
                    duplicates: Vec::new(),
                    original,
                });
            }
            Ok(Parsed::Change(change)) => self.changes.push(ChangeRow {
                change,
                traceparent,
                original,
            }),
            Err(reason) => self.dead_letters.push(DeadLetter {
                original,
                reason,
                detail: String::new(),
                key: None,
            }),
        }
    }

    /// Messages and deletions as two batches; the last one is stored first, so messages come before
    /// deletions. One transaction for both would lock keys in two passes, so two of them could
    /// deadlock, and nobody needs both to become visible at the same time.
    pub fn parts(mut self) -> Vec<Batch> {
        let changes = Batch {
            changes: std::mem::take(&mut self.changes),
            ..Batch::default()
        };
        let parts = [changes, self].into_iter();
        parts.filter(|part| !part.is_empty()).collect()
    }

    fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.changes.is_empty() && self.dead_letters.is_empty()
    }

    /// How many rows and changes the database may refuse. It never refuses a dead letter.
    pub fn refusable(&self) -> usize {
        self.rows.len() + self.changes.len()
    }

    /// Every message, duplicates too.
    pub fn messages(&self) -> impl Iterator<Item = &Row> {
        self.rows
            .iter()
            .flat_map(|row| std::iter::once(row).chain(&row.duplicates))
    }

    /// Whether the database refused a row because its sequence is taken.
    pub fn is_reused(error: &DatabaseError) -> bool {
        error.constraint.as_deref() == Some(SEQUENCE_KEY)
    }

    /// Splits a batch that the database refused, the last part to be tried first. A single row
    /// becomes a dead letter.
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
            // The next message with this id may have another text, which the database accepts.
            let mut duplicates = std::mem::take(&mut row.duplicates).into_iter();
            rest.rows.extend(duplicates.next().map(|first| Row {
                duplicates: duplicates.collect(),
                ..first
            }));
            self.dead_letters
                .push(row.into_dead_letter(reason, error.to_string()));
        }
        for row in self.changes.drain(..) {
            self.dead_letters
                .push(row.into_dead_letter(reason, error.to_string()));
        }
        if rest.is_empty() {
            vec![self]
        } else {
            vec![rest, self]
        }
    }

    /// Dead letters for the messages whose sequence is another message's, and for those whose id
    /// has another text.
    pub fn dead_letters_for(self, reused: &[i64], conflicts: &[i64]) -> Batch {
        let mut dead_letters = Vec::new();
        for mut row in self.rows {
            let duplicates = std::mem::take(&mut row.duplicates);
            for row in std::iter::once(row).chain(duplicates) {
                let reason = if reused.contains(&row.seq()) {
                    Reason::SequenceReused
                } else if conflicts.contains(&row.seq()) {
                    Reason::IdConflict
                } else {
                    continue;
                };
                dead_letters.push(row.into_dead_letter(reason, String::new()));
            }
        }
        for row in self.changes {
            if reused.contains(&row.seq()) {
                dead_letters.push(row.into_dead_letter(Reason::SequenceReused, String::new()));
            }
        }
        Batch {
            dead_letters,
            ..Batch::default()
        }
    }
}

fn parse(delivery: &Delivery, limits: Limits) -> Result<Parsed, Reason> {
    let message = &delivery.message;
    match &delivery.malformed {
        Some(block) if block.is_empty() => Err(Reason::MalformedSubject),
        Some(_) => Err(Reason::MalformedHeaders),
        None if Change::is_change_subject(&message.subject) => Change::parse(
            &message.subject,
            &message.payload,
            message.seq,
            message.received_ms,
        )
        .map(Parsed::Change),
        None => timeline::message::parse(message, limits).map(Parsed::Message),
    }
}

#[cfg(test)]
mod tests {
    use base::seq::Seq;
    use base::time::from_unix_ms;

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
            received_at: from_unix_ms(0),
        };
        Row {
            id: message.shown_id(),
            message,
            traceparent: None,
            duplicates: Vec::new(),
            original,
        }
    }

    fn batch(rows: Vec<Row>) -> Batch {
        Batch {
            rows,
            ..Batch::default()
        }
    }

    /// Rows, each with its duplicates, and dead letters.
    fn seqs(batch: &Batch) -> (Vec<Vec<i64>>, Vec<(i64, Reason)>) {
        let of = |row: &Row| {
            std::iter::once(row.seq())
                .chain(row.duplicates.iter().map(Row::seq))
                .collect()
        };
        (
            batch.rows.iter().map(of).collect(),
            batch
                .dead_letters
                .iter()
                .map(|dead_letter| (dead_letter.original.seq, dead_letter.reason))
                .collect(),
        )
    }

    fn refusal() -> DatabaseError {
        DatabaseError::from(sqlx::Error::PoolClosed)
    }

    #[test]
    fn duplicates_move_with_their_row() {
        let first = Row {
            duplicates: vec![row(3, "a", "x"), row(5, "a", "y")],
            ..row(1, "a", "x")
        };
        let second = Row {
            duplicates: vec![row(4, "b", "x")],
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
    fn the_first_duplicate_is_tried_in_place_of_a_row_that_is_refused() {
        let refused = Row {
            duplicates: vec![row(3, "a", "x"), row(5, "a", "y")],
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
    fn dead_letters_are_written_for_duplicates_too() {
        let rows = vec![
            Row {
                duplicates: vec![row(3, "a", "x"), row(5, "a", "y")],
                ..row(1, "a", "x")
            },
            row(2, "b", "x"),
        ];
        let letters = batch(rows).dead_letters_for(&[2], &[5]);
        assert_eq!(
            seqs(&letters),
            (
                vec![],
                vec![(5, Reason::IdConflict), (2, Reason::SequenceReused)]
            )
        );
    }
}
