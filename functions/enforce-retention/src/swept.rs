//! What sweeping took, for the log: nothing goes without a line.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A pass over many messages says this often how far it is.
const LINE_INTERVAL: Duration = Duration::from_secs(60);

/// What went since the last line.
#[derive(Debug, Default)]
pub struct Swept {
    messages: u64,
    deletions: u64,
    moves: u64,
    /// Their numbers in PostgreSQL.
    rooms: HashSet<i32>,
    /// When the last of it was received, in Unix milliseconds.
    until_ms: i64,
    since: Option<Instant>,
}

impl Swept {
    /// Of one step.
    pub fn note_messages(&mut self, count: u64, rooms: &[i32], until_ms: Option<i64>) {
        self.messages += count;
        self.note(count, rooms, until_ms);
    }

    /// Deletions whose message went before them.
    pub fn note_deletions(&mut self, count: u64, rooms: &[i32], until_ms: Option<i64>) {
        self.deletions += count;
        self.note(count, rooms, until_ms);
    }

    /// Moves of marks.
    pub fn note_moves(&mut self, count: u64) {
        self.moves += count;
        self.note(count, &[], None);
    }

    fn note(&mut self, count: u64, rooms: &[i32], until_ms: Option<i64>) {
        if count > 0 {
            self.rooms.extend(rooms);
            self.until_ms = self.until_ms.max(until_ms.unwrap_or_default());
            self.since.get_or_insert_with(Instant::now);
        }
    }

    /// Writes the line, if anything went; in the middle of a pass only now and then.
    pub fn tell(&mut self, ended: bool) {
        let Some(since) = self.since else { return };
        if ended || since.elapsed() > LINE_INTERVAL {
            let until =
                OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.until_ms) * 1_000_000);
            let received_until = until
                .ok()
                .and_then(|until| until.format(&Rfc3339).ok())
                .unwrap_or_default();
            let (messages, deletions, moves, rooms) =
                (self.messages, self.deletions, self.moves, self.rooms.len());
            tracing::info!(
                messages,
                deletions,
                moves,
                rooms,
                received_until,
                "what has expired was swept"
            );
            (
                self.messages,
                self.deletions,
                self.moves,
                self.until_ms,
                self.since,
            ) = (0, 0, 0, 0, None);
            self.rooms.clear();
        }
    }
}

/// A pass that ends early says what it took, too.
impl Drop for Swept {
    fn drop(&mut self) {
        self.tell(true);
    }
}
