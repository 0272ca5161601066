//! One round: a transaction that publishes the next events and takes them out of the outbox.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use sqlx::Connection;
use sqlx::postgres::PgConnection;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::publish::{Outgoing, Publisher};
use crate::receipts;
use crate::trouble::Trouble;
use base::seq::Seq;
use protocol::change::Mode;
use protocol::event::{DeletedEvent, Event, StoredEvent};
use service::ctx::Ctx;
use service::job::{Done, Next};
use timeline::chat::Chat;

/// The advisory lock of the one copy that relays; any number nobody else uses: "outbox" in ASCII.
pub const LOCK: i64 = 0x6f75_7462_6f78;
/// Less than idle_in_transaction_session_timeout (20 s): we notice before PostgreSQL lets another copy in.
const ROUND_LIMIT: Duration = Duration::from_secs(15);
/// Events of one round, as far as rows of the outbox allow: a few batches, well within the limit.
const EVENTS: i64 = 4_000;
/// Rows of the outbox looked at in one round.
const ROWS: i64 = 256;
/// Rows deleted at once; there may be millions after a replay.
const SWEEP: i64 = 10_000;

const STANDING: &str = "
    select coalesce((select seq from relayed), 0),
           (select min(first_seq) from outbox where receipts is null),
           (select min(first_seq) from outbox where receipts is not null)";

/// Rows all of which is told.
const SWEPT: &str = "
    delete from outbox where id in (
        select id from outbox where first_seq <= $1 and last_seq <= $1 and receipts is null order by first_seq, id limit $2)";

/// Where the first row begins that is left for the next round. Rows may overlap, since workers store side by side; no
/// row begins before the first one does, so whatever lies before the first row that is left is in the rows that are taken.
const LEFT: &str = "
    select first_seq from (
        select first_seq, sum(cardinality(seqs)) over w as events, row_number() over w as place
          from (select id, first_seq, seqs from outbox where first_seq > $1 and first_seq <= $2 and receipts is null
                 order by first_seq, id limit $3) as ahead
        window w as (order by first_seq, id)
    ) as counted
    where place > 1 and events > $4 or place = $3
    order by first_seq limit 1";

const TAKEN: &str = "
    select seqs, traced, traceparents, created_at from outbox where first_seq <= $1 and last_seq > $2 and receipts is null";

/// A message whose place an earlier one took has left it, and so has no row: nothing to tell. Each position is a search of
/// its own: no other plan is possible, whatever the statistics say.
pub const MESSAGES: &str = "
    select stored.seq, stored.id, rooms.name, sender, recipient, sent_at
      from unnest($1::bigint[]) as due (seq)
     cross join lateral (select * from messages where messages.seq = due.seq limit 1) as stored
     cross join lateral (select name from rooms where rooms.id = stored.room_id limit 1) as rooms";

pub const CHANGES: &str = "
    select made.seq, target, made.id, rooms.name, sender, mode, changed_by
      from unnest($1::bigint[]) as due (seq)
     cross join lateral (select * from changes where changes.seq = due.seq limit 1) as made
     cross join lateral (select name from rooms where rooms.id = made.room_id limit 1) as rooms";

const NOTE: &str = "
    insert into relayed (seq) values ($1)
    on conflict (only_row) do update set seq = greatest(relayed.seq, excluded.seq)";

/// A round that published nothing.
const fn nothing(next: Next) -> Done {
    Done { handled: 0, next }
}

/// Of each position in the taken rows, when it was stored, and the sender's trace.
type Pending = BTreeMap<i64, (OffsetDateTime, Option<String>)>;

/// One round, if no other replica is in the middle of one.
///
/// # Errors
/// A server does not answer, or refuses. The outbox is as before then; what was published all the same, the next round
/// finds in the stream.
pub async fn round(ctx: &Ctx<Chat>, publisher: &mut Publisher) -> Result<Done, Trouble> {
    // Before the outbox is read: everything up to here was committed before, so what the outbox shows is all there is.
    let floor = ctx.stream().stored_through_now().await?;
    // Unless this replica gets the lock, another one is at it.
    let mut outcome = Ok(nothing(Next::Idle));
    let ended = ctx
        .database()
        .run_once(ROUND_LIMIT, async |connection: &mut PgConnection| {
            let mut transaction = connection.begin().await?;
            let mine: bool = sqlx::query_scalar("select pg_try_advisory_xact_lock($1)")
                .bind(LOCK)
                .fetch_one(&mut *transaction)
                .await?;
            if mine {
                outcome = relay(&mut transaction, publisher, floor).await;
            }
            // What failed may be the session, such as one to a former primary: it is closed, which rolls back, and not used again.
            if outcome.is_ok() {
                transaction.commit().await
            } else {
                Err(sqlx::Error::WorkerCrashed)
            }
        });
    let ended = ended.await;
    let outcome = outcome?;
    ended?;
    Ok(outcome)
}

async fn relay(
    connection: &mut PgConnection,
    publisher: &mut Publisher,
    floor: Seq,
) -> Result<Done, Trouble> {
    type Standing = (i64, Option<i64>, Option<i64>);
    let (relayed, message, receipt): Standing =
        sqlx::query_as(STANDING).fetch_one(&mut *connection).await?;
    if message.is_none() && receipt.is_none() {
        return Ok(nothing(Next::Idle));
    }
    let due = |first: Option<i64>| first.is_some_and(|first| Seq::from_i64(first) <= floor);
    if !due(message) && !due(receipt) {
        return Ok(nothing(Next::Soon));
    }
    let watermark = publisher.watermark(Seq::from_i64(relayed)).await?;
    let (messages, through) = match due(message) {
        true => relay_messages(connection, publisher, watermark, floor).await?,
        // Nothing is left to tell of what lies below the floor.
        false => (nothing(Next::Soon), Some(floor)),
    };
    let receipts = match through {
        Some(through) if due(receipt) => {
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

/// Tells the next events of messages and changes; up to where all of them are told then, where this round has found out.
async fn relay_messages(
    connection: &mut PgConnection,
    publisher: &mut Publisher,
    watermark: Seq,
    floor: Seq,
) -> Result<(Done, Option<Seq>), Trouble> {
    let swept = sweep(connection, watermark).await?;
    if swept == SWEEP.unsigned_abs() {
        return Ok((nothing(Next::Again), None));
    }
    let left: Option<i64> = sqlx::query_scalar(LEFT)
        .bind(watermark.as_i64())
        .bind(floor.as_i64())
        .bind(ROWS)
        .bind(EVENTS)
        .fetch_optional(&mut *connection)
        .await?;
    let through = left.map_or(floor, |left| Seq::from_i64(left).previous());
    let pending = pending(connection, watermark, through).await?;
    let Some((last, _)) = pending.last_key_value() else {
        // What is taken begins below the floor and goes on above it.
        let next = if swept > 0 { Next::Again } else { Next::Soon };
        return Ok((nothing(next), Some(through)));
    };
    let last = Seq::from_i64(*last);
    let outgoing = events(connection, &pending).await?;
    publisher.publish(&outgoing).await?;
    sqlx::query(NOTE)
        .bind(last.as_i64())
        .execute(&mut *connection)
        .await?;
    sweep(connection, last).await?;
    publisher.reached(last);
    Ok((
        Done {
            handled: outgoing.len() as u64,
            next: Next::Again,
        },
        Some(through),
    ))
}

/// Deletes rows of which everything is told; how many.
async fn sweep(connection: &mut PgConnection, watermark: Seq) -> Result<u64, sqlx::Error> {
    Ok(sqlx::query(SWEPT)
        .bind(watermark.as_i64())
        .bind(SWEEP)
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
    let rows: Vec<Row> = sqlx::query_as(TAKEN)
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

/// The events, in the order of the log.
async fn events(
    connection: &mut PgConnection,
    pending: &Pending,
) -> Result<Vec<Outgoing>, Trouble> {
    type Message = (i64, String, String, String, Option<String>, OffsetDateTime);
    type Change = (i64, i64, String, String, String, String, String);
    let seqs: Vec<i64> = pending.keys().copied().collect();
    let messages: Vec<Message> = sqlx::query_as(MESSAGES)
        .bind(&seqs)
        .fetch_all(&mut *connection)
        .await?;
    let changes: Vec<Change> = sqlx::query_as(CHANGES)
        .bind(&seqs)
        .fetch_all(&mut *connection)
        .await?;
    let stored = messages
        .into_iter()
        .map(|(seq, id, room, user, to, sent_at)| {
            Event::Stored(StoredEvent {
                seq: Seq::from_i64(seq),
                id,
                room,
                user,
                to,
                timestamp: unix_ms(sent_at),
            })
        });
    let deleted = changes
        .into_iter()
        .filter_map(|(seq, target, id, room, user, mode, by)| {
            let (seq, target, mode) = (
                Seq::from_i64(seq),
                Seq::from_i64(target),
                Mode::parse(&mode)?,
            );
            Some(Event::Deleted(DeletedEvent {
                seq,
                target,
                id,
                room,
                user,
                mode,
                by,
            }))
        });
    let mut events: Vec<Event> = stored.chain(deleted).collect();
    events.sort_unstable_by_key(Event::seq);
    events
        .iter()
        .map(|event| outgoing(event, pending))
        .collect()
}

fn outgoing(event: &Event, pending: &Pending) -> Result<Outgoing, Trouble> {
    let (created_at, traceparent) = pending
        .get(&event.seq().as_i64())
        .map_or((OffsetDateTime::UNIX_EPOCH, None), Clone::clone);
    let time = created_at
        .format(&Rfc3339)
        .map_err(|error| Trouble::Publish(error.to_string()))?;
    Outgoing::new(event, &time, traceparent.as_deref())
}

/// Unix milliseconds.
fn unix_ms(at: OffsetDateTime) -> i64 {
    i64::try_from(at.unix_timestamp_nanos() / 1_000_000).unwrap_or_default()
}
