//! The sequence guard: a stream that was deleted, recreated or restored from a backup must not
//! assign sequences that are stored already. The README beside this crate lists the steps, and what
//! was rejected.

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::postgres::PgConnection;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::{Instant, sleep};

use crate::compare::Config;
use crate::desired::subjects;
use crate::error::Error;
use crate::object::{Kind, Object};
use crate::salvage;
use base::seq::Seq;
use jetstream::info::{ConsumerInfo, StreamInfo, StreamState};
use jetstream::stream::{Limit, StreamReader};
use nats::connection::{ApiError, Connection};
use protocol::bootstrap::SequenceGuard;
use protocol::js_api;
use protocol::message::Limits;
use protocol::subject::{GUARD_SUBJECT, STREAM, WORKER};
use timeline::highest_known_seq;
use timeline::published::published_through;

/// How long the consumer stays paused if this process dies before it resumes it. Salvaging and
/// advancing take far less.
const PAUSE: Duration = Duration::from_secs(3_600);
/// After pausing, delivered messages are still being stored. If none is acknowledged for this long,
/// we assume that no worker is storing them.
const QUIET: Duration = Duration::from_secs(3);
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Messages read together; each may be as large as `max_payload`.
const CHUNK: usize = 64;
const CHUNK_BYTES: usize = 64 << 20;
const CHUNK_TIME: Duration = Duration::from_secs(60);

/// Salvaged dead letters count like the others: they come from below the guard, so they never raise
/// it.
const STORED: &str = concat!("select ", highest_known_seq!());
const TABLES_EXIST: &str = "
    select bool_and(to_regclass(name) is not null)
      from unnest(array['messages', 'dead_letters', 'changes', 'duplicates', 'swept'])
           as names (name)";

/// Whether the object is the stream that holds the messages.
pub fn is_chat_stream(object: &Object) -> bool {
    matches!(&object.kind, Kind::Stream { name } if name == STREAM)
}

/// The highest sequence PostgreSQL knows; `None` while the tables do not exist.
///
/// # Errors
/// The database does not answer.
pub async fn highest_stored(connection: &mut PgConnection) -> Result<Option<Seq>, sqlx::Error> {
    let exist: bool = sqlx::query_scalar(TABLES_EXIST)
        .fetch_one(&mut *connection)
        .await?;
    if !exist {
        return Ok(None);
    }
    let stored: i64 = sqlx::query_scalar(STORED).fetch_one(connection).await?;
    Ok(Some(Seq::from_i64(stored)))
}

/// The stream's last sequence beside the highest one stored or published; `None` without a stream.
///
/// # Errors
/// JetStream does not answer.
pub async fn status(nats: &Connection, stored: Seq) -> Result<Option<SequenceGuard>, ApiError> {
    let published = published_through(nats).await?;
    let state = stream_state(nats).await?;
    Ok(state.map(|state| SequenceGuard {
        last: state.last_seq,
        stored: stored.max(published).get(),
    }))
}

/// Makes sure that the next sequence is higher than every stored and every published one. Published
/// ones count because a database that was lost together with the stream knows nothing, and readers
/// of events take an event below a known position for one they have seen.
///
/// Returns what was done. Afterwards the stream exists. Its subjects may still be the guard's, and
/// dead letters may wait: [`Object::apply`] and [`crate::reappend::reappend`] continue from there.
///
/// Interrupted at any point, running it again from the beginning finishes it.
///
/// # Errors
/// JetStream or the database does not answer, or refuses.
pub async fn enforce(
    stream: &StreamReader,
    nats: &Connection,
    connection: &mut PgConnection,
    desired: &Object,
    limits: Limits,
) -> Result<Vec<String>, Error> {
    let stored = highest_stored(connection)
        .await?
        .unwrap_or(Seq::ZERO)
        .max(published_through(nats).await?);
    let (Some(state), Some(config)) = (stream_state(nats).await?, desired.actual(nats).await?)
    else {
        return create(nats, desired, stored).await;
    };
    if state.last() >= stored && !is_closed(&config) {
        return Ok(Vec::new());
    }
    let (mut done, refusal) = close(nats, desired).await?;
    let paused = pause_consumer(nats, PAUSE).await?;
    // Once more, because a worker may meanwhile have stored messages of the lost stream.
    let stored = highest_stored(connection)
        .await?
        .unwrap_or(stored)
        .max(stored);
    let salvaged = salvage_up_to(stream, nats, connection, stored, desired, limits).await?;
    if state.last() < stored {
        advance(nats, stored)
            .await
            .map_err(|error| refusal.unwrap_or(error))?;
        done.push(format!(
            "the next sequence was advanced from {} to {}",
            state.last().next(),
            stored.next()
        ));
    }
    if salvaged > 0 {
        done.push(format!(
            "{salvaged} messages below the sequence guard that were not stored were saved as dead \
             letters"
        ));
    }
    if paused {
        resume_consumer(nats).await?;
    }
    Ok(done)
}

async fn stream_state(nats: &Connection) -> Result<Option<StreamState>, ApiError> {
    match StreamInfo::fetch(nats, STREAM).await {
        Ok(info) => Ok(Some(info.state)),
        Err(error) if error.is(ApiError::NO_STREAM) => Ok(None),
        Err(error) => Err(error),
    }
}

async fn create(nats: &Connection, desired: &Object, stored: Seq) -> Result<Vec<String>, Error> {
    let mut object = desired.clone();
    if stored > Seq::ZERO {
        object
            .config
            .insert("first_seq".to_owned(), json!(stored.next()));
    }
    object.create(nats).await?;
    Ok(vec![format!(
        "{} was created; its first sequence is {}",
        desired.kind,
        stored.next()
    )])
}

/// Closes the stream to publishers: from now on they get an error instead of an acknowledgement of
/// a message that is about to be purged. The other fields are applied at the same time, because
/// a limit that is not ours might drop messages before they are salvaged.
///
/// If the server refuses a field, the messages are salvaged all the same. The refusal is returned,
/// and comes up again when the stream gets its own subjects back.
async fn close(nats: &Connection, desired: &Object) -> Result<(Vec<String>, Option<Error>), Error> {
    let mut closed = desired.clone();
    closed
        .config
        .insert("subjects".to_owned(), json!([GUARD_SUBJECT]));
    match closed.apply(nats).await {
        Ok(done) => Ok((done, None)),
        Err(refusal @ Error::Refused(_))
            if is_closed(&desired.actual(nats).await?.unwrap_or_default()) =>
        {
            Ok((Vec::new(), Some(refusal)))
        }
        Err(error) => Err(error),
    }
}

fn is_closed(config: &Config) -> bool {
    subjects(config) == [GUARD_SUBJECT]
}

/// Keeps workers from storing what is being salvaged: pauses the consumer, then waits until the
/// messages delivered before are acknowledged. The pause ends by itself after `limit`, in case we
/// die. Returns whether there was a consumer to pause.
///
/// # Errors
/// JetStream does not answer.
pub async fn pause_consumer(nats: &Connection, limit: Duration) -> Result<bool, Error> {
    let until = (OffsetDateTime::now_utc() + limit)
        .format(&Rfc3339)
        .unwrap_or_default();
    if !request_pause(nats, &json!({ "pause_until": until })).await? {
        return Ok(false);
    }
    let mut last = u64::MAX;
    let mut changed = Instant::now();
    while changed.elapsed() < QUIET {
        let info = match ConsumerInfo::fetch(nats, STREAM, WORKER).await {
            Err(error) if error.is(ApiError::NO_CONSUMER) => return Ok(false),
            info => info?,
        };
        let pending = info.num_ack_pending;
        if pending == 0 {
            break;
        }
        if pending != last {
            last = pending;
            changed = Instant::now();
        }
        sleep(POLL_INTERVAL).await;
    }
    Ok(true)
}

/// Ends the consumer's pause.
///
/// # Errors
/// JetStream does not answer.
pub async fn resume_consumer(nats: &Connection) -> Result<(), Error> {
    request_pause(nats, &json!({})).await.map(|_| ())
}

async fn request_pause(nats: &Connection, request: &Value) -> Result<bool, Error> {
    match nats.api::<Value>(js_api::CONSUMER_PAUSE, request).await {
        Ok(_) => Ok(true),
        Err(error) if error.is(ApiError::NO_CONSUMER) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Adds what the stream holds up to `stored`, and PostgreSQL does not, to the dead letters, in
/// order; returns how many messages.
async fn salvage_up_to(
    stream: &StreamReader,
    nats: &Connection,
    connection: &mut PgConnection,
    stored: Seq,
    desired: &Object,
    limits: Limits,
) -> Result<u64, Error> {
    let stream_subjects = subjects(&desired.config);
    let mut salvaged = 0;
    let mut next = Seq::ZERO;
    loop {
        // Read again in each round: a publish may have been under way when the subjects changed.
        let Some(state) = stream_state(nats).await? else {
            return Ok(salvaged);
        };
        next = next.max(state.first());
        let last = state.last().min(stored);
        if next > last {
            return Ok(salvaged);
        }
        let scanned = stream
            .scan(next, last, Limit::within(CHUNK, CHUNK_BYTES, CHUNK_TIME))
            .await?;
        salvaged +=
            salvage::save_unstored(connection, &scanned.messages, &stream_subjects, limits).await?;
        next = scanned.through.next();
    }
}

/// Purging up to a sequence above the last one makes that the stream's next sequence.
async fn advance(nats: &Connection, stored: Seq) -> Result<(), Error> {
    let _: Value = nats
        .api(js_api::STREAM_PURGE, &json!({ "seq": stored.next() }))
        .await?;
    match stream_state(nats).await? {
        Some(state) if state.last() >= stored => Ok(()),
        state => Err(Error::Refused(format!(
            "stream {STREAM}: the server purged it, but did not advance its sequence to {stored} \
             ({state:?}); the stream is empty: delete it and start again"
        ))),
    }
}
