//! The sequence fence: a log that was deleted, made anew or restored from a backup must not give out sequences
//! that are stored already. `README.md` beside this crate tells the steps and what was rejected.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::postgres::PgConnection;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::{Instant, sleep};

use crate::compare::Config;
use crate::letters;
use crate::object::{Kind, Object};
use crate::shipped::subjects;
use crate::trouble::Trouble;
use base::seq::Seq;
use jetstream::stream::{Limit, StreamReader};
use nats::connection::{ApiError, Connection};
use protocol::bootstrap::SequenceGuard;
use protocol::js_api;
use protocol::message::Limits;
use protocol::subject::{GUARD_SUBJECT, STREAM};
use timeline::published::told;

/// Nothing is delivered for so long, should we die before we resume. Longer than lifting takes, by far.
const PAUSE: Duration = Duration::from_secs(3_600);
/// What was delivered is being stored; when nothing was acknowledged for so long, nobody is storing.
const QUIET: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Sequences looked at together; each message may weigh `max_payload`.
const CHUNK: usize = 64;
const CHUNK_BYTES: usize = 64 << 20;
const CHUNK_TIME: Duration = Duration::from_secs(60);

/// The highest sequence PostgreSQL knows. Letters that wait below the fence count like the others: they were
/// taken from below it, so they never raise it. What has expired is remembered in `swept`.
const STORED: &str = "
    select greatest((select max(seq) from messages), (select max(seq) from dead_letters),
                    (select max(seq) from changes), (select max(seq) from duplicates), (select seq from swept), 0)";
const MADE: &str = "
    select bool_and(to_regclass(name) is not null)
      from unnest(array['messages', 'dead_letters', 'changes', 'duplicates', 'swept']) as names (name)";

#[derive(Debug, Deserialize)]
struct StreamInfo {
    state: State,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct State {
    first_seq: u64,
    last_seq: u64,
}

/// Whether the object is the log itself.
pub fn is_log(object: &Object) -> bool {
    matches!(&object.kind, Kind::Stream { name } if name == STREAM)
}

/// The highest sequence PostgreSQL knows; `None` before the tables are made.
///
/// # Errors
/// The database does not answer.
pub async fn stored(connection: &mut PgConnection) -> Result<Option<Seq>, sqlx::Error> {
    let made: bool = sqlx::query_scalar(MADE).fetch_one(&mut *connection).await?;
    if !made {
        return Ok(None);
    }
    let stored: i64 = sqlx::query_scalar(STORED).fetch_one(connection).await?;
    Ok(Some(Seq::from_i64(stored)))
}

/// The log's last sequence against what is stored or told; `None` when there is no log.
///
/// # Errors
/// JetStream does not answer.
pub async fn look(nats: &Connection, stored: Seq) -> Result<Option<SequenceGuard>, ApiError> {
    let (told, state) = (told(nats).await?, state(nats).await?);
    Ok(state.map(|state| SequenceGuard {
        last: state.last_seq,
        stored: stored.max(told).get(),
    }))
}

/// Makes sure that the next sequence lies above everything stored, and above everything told: a database that was lost with the
/// log knows nothing, and whoever reads events takes what is told under a known position for known. Says what was done.
/// Afterwards the log exists; its subjects may still be the fence's, and letters may wait: [`Object::apply`] and [`letters::append`] go on from there.
///
/// Wherever this is interrupted, doing it again from the beginning finishes it.
///
/// # Errors
/// JetStream or the database does not answer, or refuses.
pub async fn keep(
    log: &StreamReader,
    nats: &Connection,
    connection: &mut PgConnection,
    shipped: &Object,
    limits: Limits,
) -> Result<Vec<String>, Trouble> {
    let stored = stored(connection)
        .await?
        .unwrap_or(Seq::ZERO)
        .max(told(nats).await?);
    let (Some(state), Some(config)) = (state(nats).await?, shipped.actual(nats).await?) else {
        return create(nats, shipped, stored).await;
    };
    if state.last_seq >= stored.get() && !is_closed(&config) {
        return Ok(Vec::new());
    }
    let (mut done, refusal) = close(nats, shipped).await?;
    let paused = pause(nats, PAUSE).await?;
    // Again: a worker may have finished what it had taken from the lost log.
    let stored = self::stored(connection)
        .await?
        .unwrap_or(stored)
        .max(stored);
    let taken = take(log, nats, connection, stored, shipped, limits).await?;
    if state.last_seq < stored.get() {
        lift(nats, stored)
            .await
            .map_err(|error| refusal.unwrap_or(error))?;
        done.push(format!(
            "the next sequence was lifted from {} to {}",
            state.last_seq + 1,
            stored.next()
        ));
    }
    if taken > 0 {
        done.push(format!("{taken} messages from below the fence that nobody had stored were saved to the dead letters"));
    }
    if paused {
        resume(nats).await?;
    }
    Ok(done)
}

async fn state(nats: &Connection) -> Result<Option<State>, ApiError> {
    match nats
        .api::<StreamInfo>(js_api::STREAM_INFO, &json!({}))
        .await
    {
        Ok(info) => Ok(Some(info.state)),
        Err(error) if error.is(ApiError::NO_STREAM) => Ok(None),
        Err(error) => Err(error),
    }
}

async fn create(nats: &Connection, shipped: &Object, stored: Seq) -> Result<Vec<String>, Trouble> {
    let mut made = shipped.clone();
    if stored > Seq::ZERO {
        made.config
            .insert("first_seq".to_owned(), json!(stored.next()));
    }
    made.create(nats).await?;
    Ok(vec![format!(
        "{} was created; its first sequence is {}",
        shipped.kind,
        stored.next()
    )])
}

/// Publishers get an error from now on, not an acknowledgement of a message that is about to be purged. The other
/// fields are applied with it: what is to be taken must not meanwhile be dropped by a limit that is not ours.
///
/// A field the server refuses is no reason to leave the messages where they are: it is given back, and met
/// again when the log gets its subjects.
async fn close(
    nats: &Connection,
    shipped: &Object,
) -> Result<(Vec<String>, Option<Trouble>), Trouble> {
    let mut closed = shipped.clone();
    closed
        .config
        .insert("subjects".to_owned(), json!([GUARD_SUBJECT]));
    match closed.apply(nats).await {
        Ok(done) => Ok((done, None)),
        Err(refusal @ Trouble::Refused(_))
            if is_closed(&shipped.actual(nats).await?.unwrap_or_default()) =>
        {
            Ok((Vec::new(), Some(refusal)))
        }
        Err(error) => Err(error),
    }
}

fn is_closed(config: &Config) -> bool {
    subjects(config) == [GUARD_SUBJECT]
}

/// Keeps workers from storing what is being taken: nothing is delivered any more, and what was delivered before
/// gets its time. For `limit` at most, should nobody resume. Whether there was a consumer to hold back.
///
/// # Errors
/// JetStream does not answer.
pub async fn pause(nats: &Connection, limit: Duration) -> Result<bool, Trouble> {
    let until = (OffsetDateTime::now_utc() + limit)
        .format(&Rfc3339)
        .unwrap_or_default();
    if !hold(nats, &json!({ "pause_until": until })).await? {
        return Ok(false);
    }
    let (mut last, mut moved) = (u64::MAX, Instant::now());
    while moved.elapsed() < QUIET {
        let info: Value = match nats.api(js_api::CONSUMER_INFO, &json!({})).await {
            Err(error) if error.is(ApiError::NO_CONSUMER) => return Ok(false),
            info => info?,
        };
        let pending = info
            .get("num_ack_pending")
            .and_then(Value::as_u64)
            .unwrap_or(0);
        if pending == 0 {
            break;
        }
        if pending != last {
            (last, moved) = (pending, Instant::now());
        }
        sleep(LOOK_AGAIN).await;
    }
    Ok(true)
}

/// Deliveries go on.
///
/// # Errors
/// JetStream does not answer.
pub async fn resume(nats: &Connection) -> Result<(), Trouble> {
    hold(nats, &json!({})).await.map(|_| ())
}

async fn hold(nats: &Connection, request: &Value) -> Result<bool, Trouble> {
    match nats.api::<Value>(js_api::CONSUMER_PAUSE, request).await {
        Ok(_) => Ok(true),
        Err(error) if error.is(ApiError::NO_CONSUMER) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Copies what the log holds up to `stored` and nobody stored to the dead letters, in order; how many messages.
async fn take(
    log: &StreamReader,
    nats: &Connection,
    connection: &mut PgConnection,
    stored: Seq,
    shipped: &Object,
    limits: Limits,
) -> Result<u64, Trouble> {
    let taken_in = subjects(&shipped.config);
    let (mut taken, mut next) = (0, Seq::ZERO);
    loop {
        // Asked again each time: a publish may have been on its way when the subjects changed.
        let Some(State {
            first_seq,
            last_seq,
        }) = state(nats).await?
        else {
            return Ok(taken);
        };
        next = next.max(Seq::new(first_seq).unwrap_or(Seq::MAX));
        let last = Seq::new(last_seq).unwrap_or(Seq::MAX).min(stored);
        if next > last {
            return Ok(taken);
        }
        let found = log
            .scan(next, last, Limit::within(CHUNK, CHUNK_BYTES, CHUNK_TIME))
            .await?;
        taken += letters::take(connection, &found.messages, &taken_in, limits).await?;
        next = found.through.next();
    }
}

/// Purging up to a sequence above the last one makes it the next one.
async fn lift(nats: &Connection, stored: Seq) -> Result<(), Trouble> {
    let _: Value = nats
        .api(js_api::STREAM_PURGE, &json!({ "seq": stored.next() }))
        .await?;
    match state(nats).await? {
        Some(State { last_seq, .. }) if last_seq >= stored.get() => Ok(()),
        lifted => Err(Trouble::Refused(format!(
            "stream {STREAM}: the server purged and did not lift the sequence to {stored} ({lifted:?}); delete the stream, it is empty, and start again"
        ))),
    }
}
