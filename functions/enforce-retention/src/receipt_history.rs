//! Deletes the receipt history that nobody can ask about any more.
//!
//! Table `receipt_moves` has an entry for each advance of a read or delivered cursor. A message was
//! read or delivered when a cursor first reached it. So an entry may be deleted when nothing that
//! it reached is left. That is so when both hold: it is older than what its conversations keep, so
//! that everything it reached has expired; and no message at or below it is stored. Messages above
//! it have a later entry. The cursors themselves stay.

use sqlx::postgres::PgConnection;

use crate::lock::database_error;
use base::error::Result;

/// Entries deleted in one transaction, and read of one cursor.
const STEP: i64 = 5_000;
/// Cursors scanned in one transaction.
const CURSORS: i64 = 500;

const READ: &str = include_str!("receipt_history_read.sql");
const DELIVERED: &str = include_str!("receipt_history_delivered.sql");

/// The progress of a scan over all cursors: first those of conversations, then the delivered ones.
#[derive(Debug, Clone, Default)]
pub struct Scan {
    /// The cursors of conversations are done.
    is_at_delivered: bool,
    reader: String,
    room: String,
}

impl Scan {
    /// Deletes the entries of the next cursors, or in a dry run counts them. Returns how many, and
    /// whether those were the last cursors.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn step(
        &mut self,
        connection: &mut PgConnection,
        dry_run: bool,
    ) -> Result<(u64, bool)> {
        let sql = if self.is_at_delivered {
            DELIVERED
        } else {
            READ
        };
        let limit = if dry_run { CURSORS * STEP } else { STEP };
        let (due, reader, room): (i64, Option<String>, Option<String>) = sqlx::query_as(sql)
            .bind(&self.reader)
            .bind(&self.room)
            .bind(dry_run)
            .bind(CURSORS)
            .bind(limit)
            .fetch_one(connection)
            .await
            .map_err(database_error)?;
        let mut done = false;
        match (reader, room) {
            // The same cursors may have more entries.
            _ if due >= limit && !dry_run => {}
            (Some(reader), Some(room)) => {
                self.reader = reader;
                self.room = room;
            }
            _ if self.is_at_delivered => done = true,
            _ => {
                *self = Scan {
                    is_at_delivered: true,
                    ..Scan::default()
                }
            }
        }
        Ok((due.unsigned_abs(), done))
    }
}
