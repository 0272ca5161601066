//! The direct messages that wait for somebody: the union of log and index above their mark, over all conversations.
//!
//! The mark is read first. It only grows, so an old one shows what was confirmed meanwhile once more, and never hides anything.
//! The order of the other reads is that of a page.

use std::collections::{BTreeSet, HashMap};

use sqlx::Row as _;
use sqlx::postgres::PgConnection;

use crate::index::{self, Rows};
use crate::page::{Found, Parts, join, read_log};
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::stream::Limit;
use postgres::database::Database;
use postgres::error::DatabaseError;
use postgres::span::query_span;
use protocol::change::Change;
use protocol::receipt::{Cursors, InboxRequest};
use protocol::subject::{direct_change_subjects, direct_subjects_to};
use service::ctx::Ctx;
use timeline::chat::Chat;
use timeline::union::{Cutoffs, Key, Union};

const MARK: &str = "select delivered from users where name = $1";

/// The user's range is written as bounds of pairs, here and below, and not as `recipient = $1`: then only the index that begins with the
/// recipient has the order, and nobody's mail is looked for among everybody's. The room's name is a subquery and no join: a plan for any
/// limit takes it for a tenth of all mail, and would join it by reading every room there is. Oldest first, at least one row, at most
/// about `$4` bytes of text. The cutoff of direct messages is asked for once; only a conversation that has one of its own is asked
/// about for each row.
pub const MESSAGES: &str = "
    select seq, (select name from rooms where rooms.id = room_id) as room, sender, recipient, id, text, sent_at, deleted from (
        select *, sum(octet_length(text)) over (order by seq rows unbounded preceding) - octet_length(text) < $4 as fits
          from (select seq, room_id, sender, recipient, id, text, sent_at, deleted
                  from messages
                 where recipient is not null and (recipient, seq) > ($1, $2) and (recipient, seq) <= ($1, $5)
                   and received_at > (
                       select case when name in (select room from retention where room >= 'dm.' and room < 'dm/') then cutoff(name)
                                   else (select cutoff('dm.')) end
                         from rooms where rooms.id = room_id)
                 order by recipient, seq limit $3) page) sized
     where fits order by seq";

/// Those of messages that have not expired.
const CHANGES: &str = "
    select seq, target, sender, id, mode, changed_by from changes
     where recipient is not null and (recipient, seq) > ($1, $2) and (recipient, seq) <= ($1, $4)
       and (select max(received_at) from messages
             where (messages.sender, messages.id) = (changes.sender, changes.id))
           > (select case when name in (select room from retention where room >= 'dm.' and room < 'dm/') then cutoff(name)
                          else (select cutoff('dm.')) end
                from rooms where rooms.id = room_id)
     order by recipient, seq limit $3";

const READ: &str = "
    select asked.room, mark.read from unnest($2::text[]) as asked (room)
     cross join lateral (select read from receipts where (reader, receipts.room) = ($1, asked.room) limit 1) mark";

const CUTOFFS: &str = "select name, cutoff_ms(name) from unnest($1::text[]) as asked (name)";

/// Reads what waits.
///
/// # Errors
/// 503 when the log or PostgreSQL does not answer: only PostgreSQL knows the mark.
pub async fn read(ctx: &Ctx<Chat>, ask: &InboxRequest, max_bytes: usize) -> Result<Found> {
    let (log, user) = (ctx.stream(), ask.user.as_str());
    let mark = mark(ctx.database(), user).await?.ok_or_else(away)?;
    let (floor, (_, end)) = tokio::try_join!(log.stored_through(), log.range())?;
    let end = end.max(floor);
    // One more than asked for tells whether there is more.
    let need = Limit::within(
        ask.limit as usize + 1,
        max_bytes,
        ctx.settings().request_deadline(),
    );
    let (subjects, changes) = (
        [direct_subjects_to(&ask.user)],
        direct_change_subjects(&ask.user),
    );
    let (tails, above) = read_log(ctx, (&subjects, &changes), (floor, end), mark, need).await?;
    let above: Vec<&Change> = above
        .iter()
        .filter(|change| change.deletion.to.as_deref() == Some(user))
        .collect();
    let keys: Vec<Key> = Union::keys(tails.all(), &above);
    let messages = tails.all().iter().flat_map(|tail| &tail.messages);
    let in_log: BTreeSet<&str> = messages
        .map(|message| message.room.as_str())
        .chain(above.iter().map(|change| change.room.as_str()))
        .collect();
    let in_log: Vec<&str> = in_log.into_iter().collect();
    let wanted = Wanted {
        user,
        mark,
        end,
        rows: need.messages + tails.repeated(),
        bytes: max_bytes,
        keys: &keys,
        in_log: &in_log,
    };
    let (rows, ReceiptAck { read, cutoffs }) =
        rows(ctx.database(), &wanted).await?.ok_or_else(away)?;
    let mut found = join(Parts {
        after: mark,
        floor,
        end,
        tails,
        above,
        rows,
        cutoffs,
    });
    for message in &mut found.messages {
        let read = read.get(&message.room).copied().unwrap_or_default();
        Cursors::set_status(message, |_| Cursors {
            delivered: mark,
            read,
        });
    }
    Ok(found)
}

fn away() -> Error {
    Error::new(
        Code::Unavailable,
        "the database is away, and only it knows what was delivered; try again",
    )
}

/// Up to where the user has confirmed; `None` while PostgreSQL is away.
async fn mark(database: &Database, user: &str) -> Result<Option<Seq>, DatabaseError> {
    let mark = database.run_if_there(index::DEADLINE, async |connection| {
        sqlx::query_scalar::<_, i64>(MARK)
            .bind(user)
            .fetch_optional(connection)
            .await
    });
    Ok(mark
        .await?
        .map(|mark| mark.map_or(Seq::ZERO, Seq::from_i64)))
}

/// What an inbox wants from the index.
struct Wanted<'a> {
    user: &'a str,
    mark: Seq,
    /// What lies beyond this sequence is left out: there may be holes in it.
    end: Seq,
    /// Messages at most, and changes at most.
    rows: usize,
    /// Bytes of text.
    bytes: usize,
    keys: &'a [Key],
    /// Conversations that have something in the log.
    in_log: &'a [&'a str],
}

/// Of some conversations.
struct ReceiptAck {
    /// Up to where the user has read them.
    read: HashMap<String, Seq>,
    /// Since when messages of the log count.
    cutoffs: Cutoffs,
}

/// What the index has above the mark; `None` while PostgreSQL is away.
async fn rows(
    database: &Database,
    wanted: &Wanted<'_>,
) -> Result<Option<(Rows, ReceiptAck)>, DatabaseError> {
    let query = async |connection: &mut PgConnection| {
        query_span("select", "messages", read_rows(connection, wanted)).await
    };
    database.run_if_there(index::DEADLINE, query).await
}

async fn read_rows(
    connection: &mut PgConnection,
    wanted: &Wanted<'_>,
) -> Result<(Rows, ReceiptAck), sqlx::Error> {
    let (mark, end, limit) = (
        wanted.mark.as_i64(),
        wanted.end.as_i64(),
        i64::try_from(wanted.rows).unwrap_or(i64::MAX),
    );
    let bytes = i64::try_from(wanted.bytes).unwrap_or(i64::MAX);
    let found = sqlx::query(MESSAGES)
        .bind(wanted.user)
        .bind(mark)
        .bind(limit)
        .bind(bytes)
        .bind(end)
        .fetch_all(&mut *connection)
        .await?;
    let changes = sqlx::query(CHANGES)
        .bind(wanted.user)
        .bind(mark)
        .bind(limit)
        .bind(end)
        .fetch_all(&mut *connection)
        .await?;
    let mut rows = Rows::of(&found, &changes, (wanted.rows, wanted.bytes), |row| {
        row.try_get("room")
    })?;
    rows.known = index::known(connection, wanted.keys).await?;
    let rooms: BTreeSet<&str> = rows
        .messages
        .messages
        .iter()
        .map(|message| message.room.as_str())
        .chain(wanted.in_log.iter().copied())
        .collect();
    let rooms: Vec<&str> = rooms.into_iter().collect();
    let read: Vec<(String, i64)> = sqlx::query_as(READ)
        .bind(wanted.user)
        .bind(&rooms)
        .fetch_all(&mut *connection)
        .await?;
    let cutoffs_ms: Vec<(String, Option<i64>)> = sqlx::query_as(CUTOFFS)
        .bind(wanted.in_log)
        .fetch_all(connection)
        .await?;
    let read = read
        .into_iter()
        .map(|(room, read)| (room, Seq::from_i64(read)))
        .collect();
    Ok((
        rows,
        ReceiptAck {
            read,
            cutoffs: cutoffs_ms.into_iter().collect(),
        },
    ))
}
