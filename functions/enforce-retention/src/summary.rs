//! What an expiry pass deleted, for the operators' log: nothing is deleted without a line.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use base::time::{from_unix_ms, rfc3339};

/// During a long pass, a line is logged this often.
const LINE_INTERVAL: Duration = Duration::from_secs(60);

/// What was deleted since the last line.
#[derive(Debug, Default)]
pub struct Summary {
    messages: u64,
    deletions: u64,
    receipts: u64,
    /// The rooms' numbers in PostgreSQL.
    rooms: HashSet<i32>,
    /// When the youngest of them was received, in Unix milliseconds.
    until_ms: i64,
    /// When the first of them was deleted; `None` while there is nothing to log.
    since: Option<Instant>,
}

impl Summary {
    /// Adds the messages of one step.
    pub fn add_messages(&mut self, count: u64, rooms: &[i32], until_ms: Option<i64>) {
        self.messages += count;
        self.add(count, rooms, until_ms);
    }

    /// Adds the deletions whose message was already gone.
    pub fn add_deletions(&mut self, count: u64, rooms: &[i32], until_ms: Option<i64>) {
        self.deletions += count;
        self.add(count, rooms, until_ms);
    }

    /// Adds entries of the receipt history.
    pub fn add_receipts(&mut self, count: u64) {
        self.receipts += count;
        self.add(count, &[], None);
    }

    fn add(&mut self, count: u64, rooms: &[i32], until_ms: Option<i64>) {
        if count > 0 {
            self.rooms.extend(rooms);
            self.until_ms = self.until_ms.max(until_ms.unwrap_or_default());
            self.since.get_or_insert_with(Instant::now);
        }
    }

    /// Logs the line if anything was deleted; during a pass only once a minute.
    pub fn log(&mut self, pass_ended: bool) {
        let Some(since) = self.since else { return };
        if !pass_ended && since.elapsed() <= LINE_INTERVAL {
            return;
        }
        tracing::info!(
            messages = self.messages,
            deletions = self.deletions,
            moves = self.receipts,
            rooms = self.rooms.len(),
            received_until = rfc3339(from_unix_ms(self.until_ms)).unwrap_or_default(),
            "expired messages were deleted"
        );
        self.messages = 0;
        self.deletions = 0;
        self.receipts = 0;
        self.rooms.clear();
        self.until_ms = 0;
        self.since = None;
    }
}

/// A pass that ends early logs what it deleted, too.
impl Drop for Summary {
    fn drop(&mut self) {
        self.log(true);
    }
}
