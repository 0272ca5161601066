//! The direct messages that wait for somebody: the union of log and index above their mark, over all conversations.
//!
//! The mark is read first. It only grows, so an old one shows what was confirmed meanwhile once more, and never hides anything.
//! The order of the other reads is that of a page.

use std::collections::{BTreeSet, HashMap};

use runtime::{Ctx, Database, DatabaseError, Error, Key, Limit, Result, Tail, Union, changes, query_span};
use sqlx::Row as _;
use sqlx::postgres::PgConnection;
use wire::{Change, Code, DM_CHANGES, InboxRequest, Marks, Seq, directs_to};

use crate::index::{self, Rows};
use crate::page::{Found, Parts, join};

const MARK: &str = "select delivered from users where name = $1";

/// The user's range is written as bounds of pairs, here and below, and not as `recipient = $1`: then only the index that begins with the
/// recipient has the order, and nobody's mail is looked for among everybody's. The room's name is a subquery and no join: a plan for any
/// limit takes it for a tenth of all mail, and would join it by reading every room there is. Oldest first, at least one row, at most
/// about `$4` bytes of text; `counted` is what there was before that cut.
pub const MESSAGES: &str = "
    select seq, (select name from rooms where rooms.id = room_id) as room, sender, recipient, id, text, sent_at, deleted, counted from (
        select *, sum(octet_length(text)) over (order by seq) - octet_length(text) < $4 as fits,
               count(*) over () as counted
          from (select seq, room_id, sender, recipient, id, text, sent_at, deleted
                  from messages
                 where recipient is not null and (recipient, seq) > ($1, $2) and (recipient, seq) <= ($1, 9223372036854775807)
                   and received_at > (select cutoff(name) from rooms where rooms.id = room_id)
                 order by recipient, seq limit $3) page) sized
     where fits order by seq";

const CHANGES: &str = "
    select seq, target, sender, id, mode, changed_by from changes
     where recipient is not null and (recipient, seq) > ($1, $2) and (recipient, seq) <= ($1, 9223372036854775807)
     order by recipient, seq limit $3";

const READ: &str = "select room, read from receipts where reader = $1 and room = any($2)";

const CUTOFFS: &str = "select name, cutoff_ms(name) from unnest($1::text[]) as asked (name)";

/// Reads what waits.
///
/// # Errors
/// 503 when the log or PostgreSQL does not answer: only PostgreSQL knows the mark.
pub async fn read(ctx: &Ctx, ask: &InboxRequest, max_bytes: usize) -> Result<Found> {
    let (log, limits, user) = (ctx.log(), ctx.settings().limits(), ask.user.as_str());
    let mark = mark(ctx.database(), user).await?.ok_or_else(away)?;
    let (_, end) = log.range().await?;
    let floor = log.floor().await?;
    // One more than asked for tells whether there is more.
    let need = ask.limit as usize + 1;
    let deadline = ctx.settings().request_deadline();
    let subjects = [directs_to(&ask.user)];
    let (mut tail, above) = tokio::try_join!(
        Tail::oldest(log, &subjects, floor.max(mark).next(), Limit::within(need, max_bytes, deadline), limits),
        changes(log, DM_CHANGES, floor.next(), Limit::within(10_000, 8 << 20, deadline)),
    )?;
    let above: Vec<&Change> = above.iter().filter(|change| change.deletion.to.as_deref() == Some(user)).collect();
    let keys: Vec<Key> = Union::keys(tail.ids.iter().cloned(), &above);
    let in_log: Vec<&str> =
        tail.messages.iter().map(|message| message.room.as_str()).chain(above.iter().map(|change| change.room.as_str())).collect();
    let wanted = Wanted { user, mark, rows: need, bytes: max_bytes, keys: &keys, in_log: &in_log };
    let (rows, Marked { read, cutoffs_ms }) = rows(ctx.database(), &wanted).await?.ok_or_else(away)?;
    tail.expire_each(|room| cutoffs_ms.get(room).copied().flatten());
    let mut found = join(Parts { after: mark, floor, end, tail, above, rows });
    for message in &mut found.messages {
        let read = read.get(&message.room).copied().unwrap_or_default();
        Marks::show(message, |_| Marks { delivered: mark, read });
    }
    Ok(found)
}

fn away() -> Error {
    Error::new(Code::Unavailable, "the database is away, and only it knows what was delivered; try again")
}

/// Up to where the user has confirmed; `None` while PostgreSQL is away.
async fn mark(database: &Database, user: &str) -> Result<Option<Seq>, DatabaseError> {
    let mark = database
        .run_if_there(index::DEADLINE, async |connection| sqlx::query_scalar::<_, i64>(MARK).bind(user).fetch_optional(connection).await);
    Ok(mark.await?.map(|mark| mark.map_or(Seq::ZERO, Seq::from_i64)))
}

/// What an inbox wants from the index.
struct Wanted<'a> {
    user: &'a str,
    mark: Seq,
    /// Messages at most, and changes at most.
    rows: usize,
    /// Bytes of text.
    bytes: usize,
    keys: &'a [Key],
    /// Conversations that have something in the log.
    in_log: &'a [&'a str],
}

/// Of some conversations.
struct Marked {
    /// Up to where the user has read them.
    read: HashMap<String, Seq>,
    /// What the log took then, in Unix milliseconds, or before has expired.
    cutoffs_ms: HashMap<String, Option<i64>>,
}

/// What the index has above the mark; `None` while PostgreSQL is away.
async fn rows(database: &Database, wanted: &Wanted<'_>) -> Result<Option<(Rows, Marked)>, DatabaseError> {
    let query = async |connection: &mut PgConnection| query_span("select", "messages", read_rows(connection, wanted)).await;
    database.run_if_there(index::DEADLINE, query).await
}

async fn read_rows(connection: &mut PgConnection, wanted: &Wanted<'_>) -> Result<(Rows, Marked), sqlx::Error> {
    let (mark, limit) = (wanted.mark.as_i64(), i64::try_from(wanted.rows).unwrap_or(i64::MAX));
    let bytes = i64::try_from(wanted.bytes).unwrap_or(i64::MAX);
    let found = sqlx::query(MESSAGES).bind(wanted.user).bind(mark).bind(limit).bind(bytes).fetch_all(&mut *connection).await?;
    let changes = sqlx::query(CHANGES).bind(wanted.user).bind(mark).bind(limit).fetch_all(&mut *connection).await?;
    let mut rows = Rows::of(&found, &changes, wanted.rows, |row| row.try_get("room"))?;
    rows.known = index::known(connection, wanted.keys).await?;
    let rooms: BTreeSet<&str> = rows.messages.iter().map(|message| message.room.as_str()).chain(wanted.in_log.iter().copied()).collect();
    let rooms: Vec<&str> = rooms.into_iter().collect();
    let read: Vec<(String, i64)> = sqlx::query_as(READ).bind(wanted.user).bind(&rooms).fetch_all(&mut *connection).await?;
    let cutoffs_ms: Vec<(String, Option<i64>)> = sqlx::query_as(CUTOFFS).bind(wanted.in_log).fetch_all(connection).await?;
    let read = read.into_iter().map(|(room, read)| (room, Seq::from_i64(read))).collect();
    Ok((rows, Marked { read, cutoffs_ms: cutoffs_ms.into_iter().collect() }))
}
