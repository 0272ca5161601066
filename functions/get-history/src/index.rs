//! The stored part of a room, and what to do while PostgreSQL is away.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::types::time::OffsetDateTime;

use base::seq::Seq;
use postgres::database::Database;
use postgres::error::DatabaseError;
use postgres::span::query_span;
use protocol::message::{Message, Status};
use protocol::receipt::Cursors;
use timeline::union::{Rows, Side};

/// A page takes a millisecond; a database that takes this long is away.
const DEADLINE: Duration = Duration::from_millis(1_500);

/// Newest first, below `$2` and up to `$4`. The room and its cutoff are resolved once a query and not once a row. What has expired
/// is left out, swept or not. The range is written as bounds of pairs, and not as `room_id = …`: then only the index that begins
/// with the room has the order, and a quiet room is not looked for among all others.
/// A file of its own, because `bench` measures the very same text in pgbench.
pub const OLDER: &str = include_str!("older.sql");
/// Oldest first, after `$2` and up to `$4`, otherwise like [`OLDER`].
pub const NEWER: &str = include_str!("newer.sql");

// At least one of these rows, and at most about `$5` bytes of text: for pages so long that their texts may be too much.
macro_rules! measured {
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
pub const OLDER_MEASURED: &str = measured!(include_str!("older.sql"), "seq desc");
pub const NEWER_MEASURED: &str = measured!(include_str!("newer.sql"), "seq");

/// Rows whose texts can never be too much for one reply's worth of memory are not measured by the database.
const UNMEASURED_BYTES: usize = 4 << 20;

/// Where the ids of some senders are stored already. A lateral subquery: whatever PostgreSQL believes of the table, it looks
/// for one id after the other by the index.
pub const KNOWN: &str = "
    select asked.sender, asked.id, stored.seq from unnest($1::text[], $2::text[]) as asked (sender, id)
     cross join lateral (select seq from messages
                          where (sender, messages.id, derived) = (asked.sender, asked.id, false) limit 1) stored";

/// How far people have got.
const MARKS: &str = "select person, delivered, read from marks($1, $2)";

/// When messages were delivered and read: when the mark of their recipient first reached them. Who has read a message, has it.
const TIMES: &str = "
    select least(delivered.at, read.at), read.at
      from unnest($2::bigint[], $3::text[]) with ordinality as asked (seq, recipient, place)
      left join lateral (select at from receipt_moves
                          where reader = recipient and room is null and through >= asked.seq order by through limit 1) delivered on true
      left join lateral (select at from receipt_moves
                          where reader = recipient and room = $1 and through >= asked.seq order by through limit 1) read on true
     order by place";

/// PostgreSQL, as far as history goes.
pub struct Index {
    database: Database,
}

/// What a page wants from the index.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// The room as stored.
    pub room: &'a str,
    /// One read a side.
    pub sides: &'a [Side],
    /// Rows beyond this sequence are left out: there may be holes among them.
    pub end: Seq,
    /// Rows a side.
    pub rows: usize,
    /// Bytes of text a side.
    pub bytes: usize,
    /// The longest text there may be.
    pub text_bytes: usize,
    /// Senders and ids of the tail: are they stored already, and where?
    pub ids: &'a [(String, String)],
    /// How far have they got in the room?
    pub people: &'a [&'a str],
    /// Since when messages of the log count is asked, too.
    pub cutoff: bool,
}

/// What the index has.
#[derive(Debug, Default)]
pub struct Indexed {
    /// As many as were asked for.
    pub sides: Vec<Rows>,
    /// Where the ids asked about are stored.
    pub known: Vec<Known>,
    /// How far the people asked about have got.
    pub marks: HashMap<String, Cursors>,
    /// What the log took then, in Unix milliseconds, or before has expired; `None` where nothing expires or nobody asked.
    pub cutoff_ms: Option<i64>,
}

/// Where a sender's id is stored.
pub type Known = ((String, String), Seq);

impl Index {
    pub fn new(database: Database) -> Index {
        Index { database }
    }

    /// Reads what a page wants; `None` while PostgreSQL is away.
    ///
    /// # Errors
    /// The deployment's fault, such as a missing table.
    pub async fn read(&self, wanted: &Wanted<'_>) -> Result<Option<Indexed>, DatabaseError> {
        self.database
            .run_if_there(DEADLINE, async |connection| read(connection, wanted).await)
            .await
    }

    /// Puts into direct messages of `room` when they were delivered and read, where that is known; nothing while PostgreSQL is away.
    ///
    /// # Errors
    /// As [`read`](Index::read).
    pub async fn time(&self, room: &str, messages: &mut [Message]) -> Result<(), DatabaseError> {
        type Times = (Option<OffsetDateTime>, Option<OffsetDateTime>);
        let seqs: Vec<i64> = messages
            .iter()
            .map(|message| message.seq.as_i64())
            .collect();
        let recipients: Vec<Option<&str>> = messages
            .iter()
            .map(|message| message.to.as_deref())
            .collect();
        let times = self.database.run_if_there(DEADLINE, async |connection| {
            sqlx::query_as::<_, Times>(TIMES)
                .bind(room)
                .bind(&seqs)
                .bind(&recipients)
                .fetch_all(connection)
                .await
        });
        let times = times.await?.unwrap_or_default();
        for (message, (delivered, read)) in messages.iter_mut().zip(times) {
            (message.delivered_at, message.read_at) = (delivered.map(unix_ms), read.map(unix_ms));
        }
        Ok(())
    }
}

async fn read(connection: &mut PgConnection, wanted: &Wanted<'_>) -> Result<Indexed, sqlx::Error> {
    query_span("select", "messages", async {
        let mut sides = Vec::with_capacity(wanted.sides.len());
        for side in wanted.sides {
            sides.push(read_side(connection, wanted, *side).await?);
        }
        let (known, marks) = (
            known(connection, wanted.ids).await?,
            marks(connection, wanted).await?,
        );
        let cutoff_ms = match wanted.cutoff {
            true => {
                sqlx::query_scalar("select cutoff_ms($1)")
                    .bind(wanted.room)
                    .fetch_one(connection)
                    .await?
            }
            false => None,
        };
        Ok(Indexed {
            sides,
            known,
            marks,
            cutoff_ms,
        })
    })
    .await
}

async fn read_side(
    connection: &mut PgConnection,
    wanted: &Wanted<'_>,
    side: Side,
) -> Result<Rows, sqlx::Error> {
    let measured = wanted.rows.saturating_mul(wanted.text_bytes) > UNMEASURED_BYTES;
    let (sql, seq) = match side {
        Side::Older(before) if measured => (OLDER_MEASURED, before),
        Side::Older(before) => (OLDER, before),
        Side::Newer(after) if measured => (NEWER_MEASURED, after),
        Side::Newer(after) => (NEWER, after),
    };
    let limit = i64::try_from(wanted.rows).unwrap_or(i64::MAX);
    let bytes = i64::try_from(wanted.bytes).unwrap_or(i64::MAX);
    let mut query = sqlx::query(sql)
        .bind(wanted.room)
        .bind(seq.as_i64())
        .bind(limit)
        .bind(wanted.end.as_i64());
    if measured {
        query = query.bind(bytes);
    }
    let found = query.fetch_all(connection).await?;
    let messages = found
        .iter()
        .map(|row| message(wanted.room, row))
        .collect::<Result<Vec<Message>, _>>()?;
    // As many as were asked for, or perhaps some cut for their bytes: either way something may follow.
    let cut = measured
        && messages
            .iter()
            .map(|message| message.text.len())
            .sum::<usize>()
            >= wanted.bytes;
    let reach = messages
        .last()
        .filter(|_| messages.len() >= wanted.rows || cut)
        .map(|last| last.seq);
    Ok(Rows { messages, reach })
}

fn message(room: &str, row: &PgRow) -> Result<Message, sqlx::Error> {
    let to: Option<String> = row.try_get("recipient")?;
    let sent_at: OffsetDateTime = row.try_get("sent_at")?;
    Ok(Message {
        id: row.try_get("id")?,
        seq: Seq::from_i64(row.try_get("seq")?),
        room: room.to_owned(),
        user: row.try_get("sender")?,
        text: row.try_get("text")?,
        timestamp: unix_ms(sent_at),
        status: to.is_some().then_some(Status::Sent),
        delivered_at: None,
        read_at: None,
        to,
        deleted: row.try_get("deleted")?,
    })
}

/// Unix milliseconds.
fn unix_ms(at: OffsetDateTime) -> i64 {
    i64::try_from(at.unix_timestamp_nanos() / 1_000_000).unwrap_or_default()
}

async fn marks(
    connection: &mut PgConnection,
    wanted: &Wanted<'_>,
) -> Result<HashMap<String, Cursors>, sqlx::Error> {
    if wanted.people.is_empty() {
        return Ok(HashMap::new());
    }
    let found: Vec<(String, i64, i64)> = sqlx::query_as(MARKS)
        .bind(wanted.room)
        .bind(wanted.people)
        .fetch_all(connection)
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
    Ok(found.into_iter().map(read).collect())
}

async fn known(
    connection: &mut PgConnection,
    ids: &[(String, String)],
) -> Result<Vec<Known>, sqlx::Error> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let (senders, ids): (Vec<&str>, Vec<&str>) = ids
        .iter()
        .map(|(sender, id)| (sender.as_str(), id.as_str()))
        .unzip();
    let found: Vec<(String, String, i64)> = sqlx::query_as(KNOWN)
        .bind(senders)
        .bind(ids)
        .fetch_all(connection)
        .await?;
    Ok(found
        .into_iter()
        .map(|(sender, id, seq)| ((sender, id), Seq::from_i64(seq)))
        .collect())
}
