//! What happened after a cursor, as far as it is stored.

use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgRow};

use base::seq::Seq;
use postgres::database::Database;
use postgres::error::DatabaseError;
use postgres::span::query_span;
use protocol::change::{ChangeEntry, ChangeType, Mode};
use protocol::message::Message;
use timeline::merge::Rows;
use timeline::query::{self, DEADLINE, PageQuery, StoredPage, bigint};

/// Changes of room `$1` after `$2` and up to `$4`, oldest first, at most `$3`. Those of messages
/// that have expired are left out: a subquery and no join, because it runs only for the few rows
/// that the limit takes.
const CHANGES: &str = include_str!("changes.sql");

/// Direct messages to `$1` after `$2` and up to `$5`, oldest first: at most `$3`, at least one row,
/// and at most about `$4` bytes of text.
///
/// The user's range is written as bounds of pairs, and not as `recipient = $1`: then only the index
/// that begins with the recipient has the order, and PostgreSQL does not search everybody's
/// messages. The room's name is a subquery and no join: a plan for any limit expects a tenth of all
/// direct messages, and would join them by reading all rooms. The cutoff of direct messages is
/// computed once; only a conversation that has one of its own computes it for each row.
pub const INBOX: &str = include_str!("inbox.sql");

/// Changes of direct messages to `$1` after `$2` and up to `$4`, otherwise like [`CHANGES`].
const INBOX_CHANGES: &str = include_str!("inbox_changes.sql");

/// Consecutive changes of the projection.
#[derive(Debug, Default)]
pub struct StoredChanges {
    /// Oldest first.
    pub entries: Vec<ChangeEntry>,
    /// Up to here they are complete; there may be others beyond. `None` when these are all.
    pub complete_through: Option<Seq>,
}

/// Loads a page of a conversation, and its changes after `after`; `None` while PostgreSQL is away.
///
/// # Errors
/// The deployment's fault, such as a missing table.
pub async fn load_page(
    database: &Database,
    after: Seq,
    page: &PageQuery<'_>,
) -> Result<Option<(StoredPage, StoredChanges)>, DatabaseError> {
    let query = async |connection: &mut PgConnection| {
        let load = async {
            let stored = query::load_page(&mut *connection, page).await?;
            let rows = sqlx::query(CHANGES)
                .bind(page.room)
                .bind(after.as_i64())
                .bind(bigint(page.rows))
                .bind(page.end.as_i64())
                .fetch_all(connection)
                .await?;
            Ok((stored, StoredChanges::of_page(&rows, page.rows)?))
        };
        query_span("select", "messages", load).await
    };
    database.run_if_there(DEADLINE, query).await
}

/// What an inbox needs from the projection.
#[derive(Debug, Clone, Copy)]
pub struct InboxQuery<'a> {
    /// Whose direct messages.
    pub user: &'a str,
    /// Only what lies beyond this sequence.
    pub after: Seq,
    /// Rows beyond this sequence are left out, because there may be holes among them.
    pub end: Seq,
    /// Messages at most, and changes at most.
    pub rows: usize,
    /// Bytes of text, about.
    pub bytes: usize,
}

/// Loads the direct messages of a user, and the changes of such messages.
///
/// # Errors
/// The database does not answer.
pub async fn load_inbox(
    connection: &mut PgConnection,
    inbox: &InboxQuery<'_>,
) -> Result<(Rows, StoredChanges), sqlx::Error> {
    let messages = sqlx::query(INBOX)
        .bind(inbox.user)
        .bind(inbox.after.as_i64())
        .bind(bigint(inbox.rows))
        .bind(bigint(inbox.bytes))
        .bind(inbox.end.as_i64())
        .fetch_all(&mut *connection)
        .await?;
    let changes = sqlx::query(INBOX_CHANGES)
        .bind(inbox.user)
        .bind(inbox.after.as_i64())
        .bind(bigint(inbox.rows))
        .bind(inbox.end.as_i64())
        .fetch_all(connection)
        .await?;
    let messages = messages
        .iter()
        .map(|row| query::message(row, row.try_get("room")?))
        .collect::<Result<Vec<Message>, sqlx::Error>>()?;
    let rows = Rows::of_page(messages, inbox.rows, Some(inbox.bytes));
    Ok((rows, StoredChanges::of_page(&changes, inbox.rows)?))
}

impl StoredChanges {
    /// The result of a query that was limited to so many rows.
    fn of_page(rows: &[PgRow], limit: usize) -> Result<StoredChanges, sqlx::Error> {
        let entries = rows
            .iter()
            .map(change)
            .collect::<Result<Vec<ChangeEntry>, sqlx::Error>>()?;
        let complete_through = entries
            .last()
            .filter(|_| entries.len() >= limit)
            .map(|last| last.seq);
        Ok(StoredChanges {
            entries,
            complete_through,
        })
    }
}

fn change(row: &PgRow) -> Result<ChangeEntry, sqlx::Error> {
    let mode: &str = row.try_get("mode")?;
    Ok(ChangeEntry {
        kind: ChangeType::Delete,
        seq: Seq::from_i64(row.try_get("seq")?),
        target: Seq::from_i64(row.try_get("target")?),
        id: row.try_get("id")?,
        user: row.try_get("sender")?,
        // The column's check constraint allows no other value.
        mode: Mode::parse(mode).unwrap_or(Mode::Soft),
        by: row.try_get("changed_by")?,
    })
}
