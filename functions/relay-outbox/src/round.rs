//! One round: a transaction that publishes the next events and removes them from the outbox.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use sqlx::postgres::PgConnection;
use time::OffsetDateTime;

use crate::error::Error;
use crate::publish::{Outgoing, Publisher};
use crate::receipts;
use base::seq::Seq;
use base::time::{rfc3339, unix_ms};
use postgres::lock::with_transaction_lock;
use protocol::change::Mode;
use protocol::event::{DeletedEvent, Event, StoredEvent};
use service::ctx::Ctx;
use service::job::{Done, Next};
use timeline::chat::Chat;

/// The advisory lock of the replica that relays; a number that nobody else uses: "outbox" in ASCII.
pub const LOCK: i64 = 0x6f75_7462_6f78;
/// Less than `idle_in_transaction_session_timeout` (20 s): we notice that our time is up before
/// PostgreSQL gives the lock to another replica.
const ROUND_LIMIT: Duration = Duration::from_secs(15);
/// About how many events a round publishes; the rows of the outbox decide exactly. A few batches,
/// well within the limit.
const MAX_EVENTS: i64 = 4_000;
/// Rows of the outbox read in one round.
const MAX_ROWS: i64 = 256;
/// Rows deleted at once; after a replay there may be millions.
const MAX_DELETED: i64 = 10_000;

/// Up to where events are published, and the first sequences that rows of messages and of receipts
/// wait for.
const STATUS: &str = "
    select coalesce((select seq from relayed), 0),
           (select min(first_seq) from outbox where receipts is null),
           (select min(first_seq) from outbox where receipts is not null)";

/// Deletes rows whose events are all published.
const DELETE_PUBLISHED: &str = "
    delete from outbox where id in (
        select id from outbox
         where first_seq <= $1 and last_seq <= $1 and receipts is null
         order by first_seq, id limit $2)";

/// The first sequence of the first row that is left for the next round. Rows may overlap, because
/// workers store side by side. But no row starts before the first one, so everything below the
/// first row that is left is in the rows before it.
const NEXT_ROUND: &str = "
    select first_seq from (
        select first_seq, sum(cardinality(seqs)) over w as events, row_number() over w as number
          from (select id, first_seq, seqs from outbox
                 where first_seq > $1 and first_seq <= $2 and receipts is null
                 order by first_seq, id limit $3) as candidate
        window w as (order by first_seq, id)
    ) as counted
    where number > 1 and events > $4 or number = $3
    order by first_seq limit 1";

const PENDING: &str = "
    select seqs, traced, traceparents, created_at from outbox
     where first_seq <= $1 and last_seq > $2 and receipts is null";

/// The messages at these sequences. A message has no row if an earlier one with the same id took
/// its place; then there is no event. The lateral joins make each sequence an index search of its
/// own, whatever the statistics say.
pub const MESSAGES: &str = "
    select stored.seq, stored.id, rooms.name, sender, recipient, sent_at
      from unnest($1::bigint[]) as due (seq)
     cross join lateral (select * from messages where messages.seq = due.seq limit 1) as stored
     cross join lateral (select name from rooms where rooms.id = stored.room_id limit 1) as rooms";

/// The deletions at these sequences.
pub const CHANGES: &str = "
    select stored.seq, target, stored.id, rooms.name, sender, mode, changed_by
      from unnest($1::bigint[]) as due (seq)
     cross join lateral (select * from changes where changes.seq = due.seq limit 1) as stored
     cross join lateral (select name from rooms where rooms.id = stored.room_id limit 1) as rooms";

const SET_RELAYED: &str = "
    insert into relayed (seq) values ($1)
    on conflict (only_row) do update set seq = greatest(relayed.seq, excluded.seq)";

/// A round that published nothing.
const fn nothing(next: Next) -> Done {
    Done { handled: 0, next }
}

/// For each pending sequence: when it was stored, and the sender's trace.
type Pending = BTreeMap<i64, (OffsetDateTime, Option<String>)>;

/// Runs one round, unless another replica runs one.
///
/// # Errors
/// A server does not answer, or refuses. The outbox is unchanged then. If events were published all
/// the same, the next round finds them in the stream.
pub async fn round(ctx: &Ctx<Chat>, publisher: &mut Publisher) -> Result<Done, Error> {
    // Before the outbox is read: everything up to here was committed before this moment, so the
    // outbox is complete up to here.
    let stored_through = ctx.stream().stored_through_now().await?;
    let done = with_transaction_lock(ctx.database(), LOCK, ROUND_LIMIT, async |connection| {
        relay(connection, publisher, stored_through).await
    });
    Ok(done.await?.unwrap_or(nothing(Next::Idle)))
}

async fn relay(
    connection: &mut PgConnection,
    publisher: &mut Publisher,
    stored_through: Seq,
) -> Result<Done, Error> {
    type Status = (i64, Option<i64>, Option<i64>);
    let (relayed, message, receipt): Status =
        sqlx::query_as(STATUS).fetch_one(&mut *connection).await?;
    if message.is_none() && receipt.is_none() {
        return Ok(nothing(Next::Idle));
    }
    let is_due =
        |first: Option<i64>| first.is_some_and(|first| Seq::from_i64(first) <= stored_through);
    if !is_due(message) && !is_due(receipt) {
        return Ok(nothing(Next::Soon));
    }
    let watermark = publisher.watermark(Seq::from_i64(relayed)).await?;
    let (messages, published_through) = if is_due(message) {
        relay_messages(connection, publisher, watermark, stored_through).await?
    } else {
        // All messages that are stored are published.
        (nothing(Next::Soon), Some(stored_through))
    };
    let receipts = match published_through {
        Some(through) if is_due(receipt) => {
            receipts::relay(connection, publisher, watermark.max(through), through).await?
        }
        Some(_) | None => 0,
    };
    let next = if receipts > 0 {
        Next::Again
    } else {
        messages.next
    };
    Ok(Done {
        handled: messages.handled + receipts,
        next,
    })
}

/// Publishes the next events of messages and changes. Also returns up to where all of them are
/// published now, if this round has found that out.
async fn relay_messages(
    connection: &mut PgConnection,
    publisher: &mut Publisher,
    watermark: Seq,
    stored_through: Seq,
) -> Result<(Done, Option<Seq>), Error> {
    let deleted = delete_published(connection, watermark).await?;
    if deleted == MAX_DELETED.unsigned_abs() {
        return Ok((nothing(Next::Again), None));
    }
    let next_round: Option<i64> = sqlx::query_scalar(NEXT_ROUND)
        .bind(watermark.as_i64())
        .bind(stored_through.as_i64())
        .bind(MAX_ROWS)
        .bind(MAX_EVENTS)
        .fetch_optional(&mut *connection)
        .await?;
    let through = next_round.map_or(stored_through, |first| Seq::from_i64(first).previous());
    let pending = pending(connection, watermark, through).await?;
    let Some((last, _)) = pending.last_key_value() else {
        // The due rows start below `stored_through`, and their remaining events are above it.
        let next = if deleted > 0 { Next::Again } else { Next::Soon };
        return Ok((nothing(next), Some(through)));
    };
    let last = Seq::from_i64(*last);
    let events = events(connection, &pending).await?;
    publisher.publish(&events).await?;
    sqlx::query(SET_RELAYED)
        .bind(last.as_i64())
        .execute(&mut *connection)
        .await?;
    delete_published(connection, last).await?;
    publisher.advance_watermark(last);
    let done = Done {
        handled: events.len() as u64,
        next: Next::Again,
    };
    Ok((done, Some(through)))
}

/// Deletes rows whose events are all published; returns how many.
async fn delete_published(
    connection: &mut PgConnection,
    watermark: Seq,
) -> Result<u64, sqlx::Error> {
    Ok(sqlx::query(DELETE_PUBLISHED)
        .bind(watermark.as_i64())
        .bind(MAX_DELETED)
        .execute(connection)
        .await?
        .rows_affected())
}

/// What the outbox holds above `after`, up to `through`.
async fn pending(
    connection: &mut PgConnection,
    after: Seq,
    through: Seq,
) -> Result<Pending, sqlx::Error> {
    type Row = (Vec<i64>, Vec<i64>, Vec<String>, OffsetDateTime);
    let rows: Vec<Row> = sqlx::query_as(PENDING)
        .bind(through.as_i64())
        .bind(after.as_i64())
        .fetch_all(connection)
        .await?;
    let mut pending = Pending::new();
    for (seqs, traced, traceparents, created_at) in rows {
        let mut traces: HashMap<i64, String> = traced.into_iter().zip(traceparents).collect();
        let due = seqs
            .into_iter()
            .filter(|seq| *seq > after.as_i64() && *seq <= through.as_i64());
        pending.extend(due.map(|seq| (seq, (created_at, traces.remove(&seq)))));
    }
    Ok(pending)
}

/// The events for these sequences, in the order of the stream.
async fn events(connection: &mut PgConnection, pending: &Pending) -> Result<Vec<Outgoing>, Error> {
    let seqs: Vec<i64> = pending.keys().copied().collect();
    let mut events = stored_events(connection, &seqs).await?;
    events.extend(deleted_events(connection, &seqs).await?);
    events.sort_unstable_by_key(Event::seq);
    events
        .iter()
        .map(|event| outgoing(event, pending))
        .collect()
}

async fn stored_events(
    connection: &mut PgConnection,
    seqs: &[i64],
) -> Result<Vec<Event>, sqlx::Error> {
    type Row = (i64, String, String, String, Option<String>, OffsetDateTime);
    let rows: Vec<Row> = sqlx::query_as(MESSAGES)
        .bind(seqs)
        .fetch_all(connection)
        .await?;
    let event = |(seq, id, room, user, to, sent_at)| {
        Event::Stored(StoredEvent {
            seq: Seq::from_i64(seq),
            id,
            room,
            user,
            to,
            timestamp: unix_ms(sent_at),
        })
    };
    Ok(rows.into_iter().map(event).collect())
}

async fn deleted_events(
    connection: &mut PgConnection,
    seqs: &[i64],
) -> Result<Vec<Event>, sqlx::Error> {
    type Row = (i64, i64, String, String, String, String, String);
    let rows: Vec<Row> = sqlx::query_as(CHANGES)
        .bind(seqs)
        .fetch_all(connection)
        .await?;
    let event = |(seq, target, id, room, user, mode, by): Row| {
        Some(Event::Deleted(DeletedEvent {
            seq: Seq::from_i64(seq),
            target: Seq::from_i64(target),
            id,
            room,
            user,
            mode: Mode::parse(&mode)?,
            by,
        }))
    };
    Ok(rows.into_iter().filter_map(event).collect())
}

fn outgoing(event: &Event, pending: &Pending) -> Result<Outgoing, Error> {
    let (created_at, traceparent) = pending
        .get(&event.seq().as_i64())
        .map_or((OffsetDateTime::UNIX_EPOCH, None), Clone::clone);
    let time = rfc3339(created_at)
        .ok_or_else(|| Error::Publish(format!("event {} has no valid time", event.id())))?;
    Outgoing::new(event, &time, traceparent.as_deref())
}
