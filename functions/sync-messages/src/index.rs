//! The stored part of what happened after a cursor.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::types::time::OffsetDateTime;

use base::seq::Seq;
use postgres::database::Database;
use postgres::error::DatabaseError;
use postgres::span::query_span;
use protocol::change::{ChangeEntry, ChangeType, Mode};
use protocol::message::{Message, Status};
use protocol::receipt::Cursors;
use timeline::union::Key;

/// A page takes a millisecond; a database that takes this long is away.
pub const DEADLINE: Duration = Duration::from_millis(1_500);

/// The room and its cutoff are resolved once a query and not once a row. The room's range is written as bounds of pairs, and
/// not as `room_id = …`: then only the index that begins with the room has the order, and a quiet room is not looked for among
/// all others. Oldest first, at least one row, at most about `$4` bytes of text.
const MESSAGES: &str = "
    with room as materialized (select id, cutoff from rooms, room_cutoff(name) where name = $1)
    select seq, sender, recipient, id, text, sent_at, deleted from (
        select *, sum(octet_length(text)) over (order by seq rows unbounded preceding) - octet_length(text) < $4 as fits
          from (select seq, sender, recipient, id, text, sent_at, deleted
                  from messages
                 where (room_id, seq) > ((select id from room), $2) and (room_id, seq) <= ((select id from room), $5)
                   and received_at > (select cutoff from room)
                 order by room_id, seq limit $3) page) sized
     where fits order by seq";

/// Those of messages that have not expired. A subquery and no join: it is asked of the few rows the limit takes.
const CHANGES: &str = "
    with room as materialized (select id, cutoff from rooms, room_cutoff(name) where name = $1)
    select seq, target, sender, id, mode, changed_by from changes
     where (room_id, seq) > ((select id from room), $2) and (room_id, seq) <= ((select id from room), $4)
       and (select max(received_at) from messages
             where (messages.sender, messages.id) = (changes.sender, changes.id)) > (select cutoff from room)
     order by room_id, seq limit $3";

/// Where the ids of some senders are stored already. A lateral subquery: whatever PostgreSQL believes of the table, it looks
/// for one id after the other by the index.
const KNOWN: &str = "
    select asked.sender, asked.id, stored.seq from unnest($1::text[], $2::text[]) as asked (sender, id)
     cross join lateral (select seq from messages
                          where (sender, messages.id, derived) = (asked.sender, asked.id, false) limit 1) stored";

/// How far people have got.
const MARKS: &str = "select person, delivered, read from marks($1, $2)";

/// What a page wants from the index.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// The conversation as stored.
    pub room: &'a str,
    /// The cursor.
    pub after: Seq,
    /// What lies beyond this sequence is left out: there may be holes in it.
    pub end: Seq,
    /// Messages at most, and changes at most.
    pub rows: usize,
    /// Bytes of text.
    pub bytes: usize,
    /// Senders and ids: are they stored already, and where?
    pub keys: &'a [Key],
    /// How far have they got in the conversation?
    pub people: &'a [&'a str],
    /// Since when messages of the log count is asked, too.
    pub cutoff: bool,
}

/// What the index has.
#[derive(Debug, Default)]
pub struct Rows {
    /// Oldest first.
    pub messages: timeline::union::Rows,
    /// Oldest first.
    pub changes: Vec<ChangeEntry>,
    /// There may be changes beyond this one; `None` when these are all.
    pub changes_reach: Option<Seq>,
    /// Where the ids asked about are stored.
    pub known: HashMap<Key, Seq>,
    /// How far the people asked about have got.
    pub marks: HashMap<String, Cursors>,
    /// What the log took then, in Unix milliseconds, or before has expired; `None` where nothing expires or nobody asked.
    pub cutoff_ms: Option<i64>,
}

/// Reads what a page wants; `None` while PostgreSQL is away.
///
/// # Errors
/// The deployment's fault, such as a missing table.
pub async fn read(database: &Database, wanted: &Wanted<'_>) -> Result<Option<Rows>, DatabaseError> {
    let query = async |connection: &mut PgConnection| {
        query_span("select", "messages", read_rows(connection, wanted)).await
    };
    database.run_if_there(DEADLINE, query).await
}

async fn read_rows(
    connection: &mut PgConnection,
    wanted: &Wanted<'_>,
) -> Result<Rows, sqlx::Error> {
    let (after, end, limit) = (
        wanted.after.as_i64(),
        wanted.end.as_i64(),
        i64::try_from(wanted.rows).unwrap_or(i64::MAX),
    );
    let bytes = i64::try_from(wanted.bytes).unwrap_or(i64::MAX);
    let found = sqlx::query(MESSAGES)
        .bind(wanted.room)
        .bind(after)
        .bind(limit)
        .bind(bytes)
        .bind(end)
        .fetch_all(&mut *connection)
        .await?;
    let changes = sqlx::query(CHANGES)
        .bind(wanted.room)
        .bind(after)
        .bind(limit)
        .bind(end)
        .fetch_all(&mut *connection)
        .await?;
    let mut rows = Rows::of(&found, &changes, (wanted.rows, wanted.bytes), |_| {
        Ok(wanted.room.to_owned())
    })?;
    rows.known = known(&mut *connection, wanted.keys).await?;
    if !wanted.people.is_empty() {
        let marks: Vec<(String, i64, i64)> = sqlx::query_as(MARKS)
            .bind(wanted.room)
            .bind(wanted.people)
            .fetch_all(&mut *connection)
            .await?;
        let read = |(person, delivered, read)| {
            (
                person,
                Cursors {
                    delivered: Seq::from_i64(delivered),
                    read: Seq::from_i64(read),
                },
            )
        };
        rows.marks = marks.into_iter().map(read).collect();
    }
    if wanted.cutoff {
        rows.cutoff_ms = sqlx::query_scalar("select cutoff_ms($1)")
            .bind(wanted.room)
            .fetch_one(connection)
            .await?;
    }
    Ok(rows)
}

impl Rows {
    /// Messages, of which at most `rows` or about `bytes` were asked for, and changes, of which at most `rows` were; `room` says
    /// whose a message is.
    pub fn of(
        messages: &[PgRow],
        changes: &[PgRow],
        (rows, bytes): (usize, usize),
        room: impl Fn(&PgRow) -> Result<String, sqlx::Error>,
    ) -> Result<Rows, sqlx::Error> {
        let messages = messages
            .iter()
            .map(|row| message(room(row)?, row))
            .collect::<Result<Vec<Message>, sqlx::Error>>()?;
        // As many as were asked for, or perhaps some cut for their bytes: either way something may follow.
        let cut = messages.len() >= rows
            || messages
                .iter()
                .map(|message| message.text.len())
                .sum::<usize>()
                >= bytes;
        let reach = messages.last().filter(|_| cut).map(|last| last.seq);
        let changes = changes
            .iter()
            .map(change)
            .collect::<Result<Vec<ChangeEntry>, sqlx::Error>>()?;
        let changes_reach = changes
            .last()
            .filter(|_| changes.len() >= rows)
            .map(|last| last.seq);
        Ok(Rows {
            messages: timeline::union::Rows { messages, reach },
            changes,
            changes_reach,
            ..Rows::default()
        })
    }
}

/// Where the ids of some senders are stored.
pub async fn known(
    connection: &mut PgConnection,
    keys: &[Key],
) -> Result<HashMap<Key, Seq>, sqlx::Error> {
    if keys.is_empty() {
        return Ok(HashMap::new());
    }
    let (senders, ids): (Vec<&str>, Vec<&str>) = keys
        .iter()
        .map(|(sender, id)| (sender.as_str(), id.as_str()))
        .unzip();
    let known: Vec<(String, String, i64)> = sqlx::query_as(KNOWN)
        .bind(senders)
        .bind(ids)
        .fetch_all(connection)
        .await?;
    Ok(known
        .into_iter()
        .map(|(sender, id, seq)| ((sender, id), Seq::from_i64(seq)))
        .collect())
}

fn message(room: String, row: &PgRow) -> Result<Message, sqlx::Error> {
    let to: Option<String> = row.try_get("recipient")?;
    let sent_at: OffsetDateTime = row.try_get("sent_at")?;
    Ok(Message {
        id: row.try_get("id")?,
        seq: Seq::from_i64(row.try_get("seq")?),
        room,
        user: row.try_get("sender")?,
        text: row.try_get("text")?,
        timestamp: i64::try_from(sent_at.unix_timestamp_nanos() / 1_000_000).unwrap_or_default(),
        status: to.is_some().then_some(Status::Sent),
        delivered_at: None,
        read_at: None,
        to,
        deleted: row.try_get("deleted")?,
    })
}

fn change(row: &PgRow) -> Result<ChangeEntry, sqlx::Error> {
    let mode: &str = row.try_get("mode")?;
    Ok(ChangeEntry {
        kind: ChangeType::Delete,
        seq: Seq::from_i64(row.try_get("seq")?),
        target: Seq::from_i64(row.try_get("target")?),
        id: row.try_get("id")?,
        user: row.try_get("sender")?,
        // The column's check allows no other.
        mode: Mode::parse(mode).unwrap_or(Mode::Soft),
        by: row.try_get("changed_by")?,
    })
}
