//! Pages of the projection: the rows of a conversation next to a cursor, and what the
//! [`merge`](crate::merge) needs to know beside them.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgRow};

use crate::cursors;
use crate::cutoffs::Cutoffs;
use crate::dedup::{self, Key};
use crate::merge::{Direction, Rows};
use base::seq::Seq;
use base::time::unix_ms;
use protocol::message::{Message, Status};
use protocol::receipt::Cursors;

/// How long a read may wait for PostgreSQL. A page takes a millisecond; after this the read does
/// without the database.
pub const DEADLINE: Duration = Duration::from_millis(1_500);

/// Newest first, below `$2` and up to `$4`; at most `$3` rows of room `$1`. Expired messages are
/// left out, also those that are not deleted yet.
///
/// The room and its cutoff are resolved once for the query and not once for each row. The range is
/// written as bounds of pairs, and not as `room_id = …`: then only the index that begins with the
/// room has the order, and PostgreSQL does not search all rooms for the messages of a quiet one.
///
/// A file of its own, because `bench` measures the same text in pgbench.
pub const OLDER: &str = include_str!("older.sql");
/// Oldest first, after `$2` and up to `$4`, otherwise like [`OLDER`].
pub const NEWER: &str = include_str!("newer.sql");

// At least one row of a page, and at most about `$5` bytes of text.
macro_rules! limited_in_bytes {
    ($page:expr, $order:expr) => {
        concat!(
            "select seq, sender, recipient, id, text, sent_at, deleted from (
                select *, sum(octet_length(text)) over (order by ",
            $order,
            " rows unbounded preceding) - octet_length(text) < $5 as fits from (",
            $page,
            ") page) sized where fits order by ",
            $order
        )
    };
}
/// [`OLDER`], at least one row, and at most about `$5` bytes of text.
pub const OLDER_IN_BYTES: &str = limited_in_bytes!(include_str!("older.sql"), "seq desc");
/// [`NEWER`], at least one row, and at most about `$5` bytes of text.
pub const NEWER_IN_BYTES: &str = limited_in_bytes!(include_str!("newer.sql"), "seq");

/// A page whose texts cannot be longer than this is not limited in bytes: computing the sum takes a
/// third of the query's time.
const UNLIMITED_BYTES: usize = 4 << 20;

/// What a page needs from the projection.
#[derive(Debug, Clone, Copy)]
pub struct PageQuery<'a> {
    /// The conversation as stored.
    pub room: &'a str,
    /// One part for each of these is read.
    pub directions: &'a [Direction],
    /// Rows beyond this sequence are left out, because there may be holes among them.
    pub end: Seq,
    /// Rows for each part, at most.
    pub rows: usize,
    /// Bytes of text for each part, about.
    pub bytes: usize,
    /// The longest text there may be.
    pub max_text_bytes: usize,
    /// For the deduplication lookup.
    pub keys: &'a [Key],
    /// Whose cursors are loaded.
    pub participants: &'a [&'a str],
    /// Whether the cutoff is loaded: only messages and deletions of the stream need it.
    pub cutoff: bool,
}

/// What the projection has.
#[derive(Debug, Default)]
pub struct StoredPage {
    /// One for each direction.
    pub parts: Vec<Rows>,
    /// Where the keys are stored.
    pub stored: HashMap<Key, Seq>,
    /// By participant.
    pub cursors: HashMap<String, Cursors>,
    /// Empty when the cutoff was not asked for.
    pub cutoffs: Cutoffs,
}

/// Loads what a page needs.
///
/// # Errors
/// The database does not answer.
pub async fn load_page(
    connection: &mut PgConnection,
    page: &PageQuery<'_>,
) -> Result<StoredPage, sqlx::Error> {
    let mut parts = Vec::with_capacity(page.directions.len());
    for direction in page.directions {
        parts.push(load_part(connection, page, *direction).await?);
    }
    let stored = dedup::look_up(connection, page.keys).await?;
    let cursors = cursors::in_room(connection, page.room, page.participants).await?;
    let cutoffs = if page.cutoff {
        Cutoffs::load(connection, &[page.room]).await?
    } else {
        Cutoffs::default()
    };
    Ok(StoredPage {
        parts,
        stored,
        cursors,
        cutoffs,
    })
}

async fn load_part(
    connection: &mut PgConnection,
    page: &PageQuery<'_>,
    direction: Direction,
) -> Result<Rows, sqlx::Error> {
    let in_bytes = page.rows.saturating_mul(page.max_text_bytes) > UNLIMITED_BYTES;
    let (sql, cursor) = match direction {
        Direction::Older(before) if in_bytes => (OLDER_IN_BYTES, before),
        Direction::Older(before) => (OLDER, before),
        Direction::Newer(after) if in_bytes => (NEWER_IN_BYTES, after),
        Direction::Newer(after) => (NEWER, after),
    };
    let mut query = sqlx::query(sql)
        .bind(page.room)
        .bind(cursor.as_i64())
        .bind(bigint(page.rows))
        .bind(page.end.as_i64());
    if in_bytes {
        query = query.bind(bigint(page.bytes));
    }
    let messages = query
        .fetch_all(connection)
        .await?
        .iter()
        .map(|row| message(row, page.room.to_owned()))
        .collect::<Result<Vec<Message>, sqlx::Error>>()?;
    let bytes = in_bytes.then_some(page.bytes);
    Ok(Rows::of_page(messages, page.rows, bytes))
}

impl Rows {
    /// The result of a query that was limited to so many rows, and perhaps to about so many bytes
    /// of text.
    pub fn of_page(messages: Vec<Message>, rows: usize, bytes: Option<usize>) -> Rows {
        // As many rows as the limit allows, or perhaps fewer because of their bytes: either way
        // more rows may follow.
        let text_bytes = || {
            messages
                .iter()
                .map(|message| message.text.len())
                .sum::<usize>()
        };
        let is_cut = messages.len() >= rows || bytes.is_some_and(|bytes| text_bytes() >= bytes);
        let complete_through = messages.last().filter(|_| is_cut).map(|last| last.seq);
        Rows {
            messages,
            complete_through,
        }
    }
}

/// A row with `seq`, `sender`, `recipient`, `id`, `text`, `sent_at` and `deleted`. A direct message
/// has the status "sent", until the cursors of its recipient say more.
///
/// # Errors
/// A column is missing or has another type.
pub fn message(row: &PgRow, room: String) -> Result<Message, sqlx::Error> {
    let to: Option<String> = row.try_get("recipient")?;
    Ok(Message {
        id: row.try_get("id")?,
        seq: Seq::from_i64(row.try_get("seq")?),
        room,
        user: row.try_get("sender")?,
        text: row.try_get("text")?,
        timestamp: unix_ms(row.try_get("sent_at")?),
        status: to.is_some().then_some(Status::Sent),
        delivered_at: None,
        read_at: None,
        to,
        deleted: row.try_get("deleted")?,
    })
}

/// A limit as PostgreSQL's `bigint`.
pub fn bigint(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
