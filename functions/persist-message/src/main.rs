//! Moves the log into PostgreSQL: batches from the consumer all copies share, one statement a batch,
//! acknowledged after the commit.

use timeline::chat::Chat;
use timeline::settings::ChatSettings;

mod batch;
mod change;
mod erase;
mod letters;
mod probe;
mod seen;
mod store;

mod settings;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt::Display;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base::error::Fatal;
use batch::Batch;
use jetstream::consumer::{AckExtension, Delivery, Worker};
use nats::trace::{link, remote_parent};
use postgres::error::{Class, DatabaseError};
use seen::Seen;
use service::ctx::Ctx;
use service::function::Function;
use service::meter::Meter;
use service::this;
use settings::Settings;
use store::Stored;
use tracing::{Instrument, Span};

/// What batches share.
struct Shared {
    chat: Chat,
    /// The most messages one statement stores.
    batch: usize,
    stuck_after: Duration,
    seen: Seen,
}

/// A statement of a thousand rows takes milliseconds; one that takes this long is on a dead connection.
const STORE_DEADLINE: Duration = Duration::from_secs(15);
/// PostgreSQL's `deadlock_detected`.
const DEADLOCK: &str = "40P01";
/// Deadlocks in a row that are no reason to wait; each takes PostgreSQL a second to notice.
const DEADLOCKS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Shared> {
    Function::with(this!(protocol::PROJECT), async |ctx: Ctx| {
        let settings: Settings = ctx.read_settings()?;
        Ok(Shared {
            chat: Chat::open(&ctx)?,
            batch: settings.persist_batch,
            stuck_after: Duration::from_millis(settings.persist_stuck_after_ms),
            seen: Seen::default(),
        })
    })
    .settings::<ChatSettings>()
    .settings::<Settings>()
    .work(
        "store",
        protocol::subject::STREAM,
        "Stores the log's messages; requests are messages, errors are dead letters",
        persist_message,
    )
}

async fn persist_message(ctx: Ctx<Shared>, meter: Meter) -> Result<(), Fatal> {
    if !can_hold_every_character(&ctx).await? {
        return Ok(());
    }
    let worker = ctx.chat.worker(ctx.batch, ctx.stuck_after);
    worker
        .run(|deliveries| handle(ctx.clone(), worker.clone(), meter.clone(), deliveries))
        .await
}

/// Waits for PostgreSQL's answer; false when told to stop first.
async fn can_hold_every_character(ctx: &Ctx<Shared>) -> Result<bool, Fatal> {
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match ctx
            .chat
            .database()
            .run(STORE_DEADLINE, postgres::encoding::encoding_refusal)
            .await
        {
            Ok(None) => return Ok(true),
            Ok(Some(sentence)) => return Err(Fatal::new(sentence)),
            Err(error) => error,
        };
        if pause == FIRST_PAUSE {
            tracing::warn!(%error, "waiting for PostgreSQL; nothing is lost, the log keeps it");
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = ctx.stop().cancelled() => return Ok(false),
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Stores one batch, however long the database takes; false when told to stop before it was stored.
async fn handle(
    ctx: Ctx<Shared>,
    worker: Worker,
    meter: Meter,
    deliveries: Arc<[Delivery]>,
) -> bool {
    let begun = Instant::now();
    let receive = tracing::info_span!(
        parent: None,
        "receive",
        otel.name = format!("receive {}", protocol::subject::STREAM),
        otel.kind = "consumer",
        messaging.system = "nats",
        messaging.operation.name = "receive",
        messaging.destination.name = protocol::subject::STREAM,
        messaging.consumer.group.name = protocol::subject::WORKER,
        messaging.batch.message_count = deliveries.len(),
    );
    let spans = deliveries.iter().filter_map(|delivery| {
        Some((
            delivery.message.seq.as_i64(),
            process_span(&receive, delivery)?,
        ))
    });
    let processing: HashMap<i64, Span> = spans.collect();
    let batch = Batch::read(&deliveries, ctx.chat.limits());
    let (redelivered, mismatched) = (batch.redelivered, batch.mismatched);
    let Some(outcome) = store_all(&ctx, &worker, worker.extend_acks(&deliveries), batch)
        .instrument(receive)
        .await
    else {
        return false;
    };
    for (seq, reason) in &outcome.refused {
        meter.refused(format!("422:{reason}"));
        if let Some(span) = processing.get(seq) {
            span.record("otel.status_code", "ERROR");
            span.record("error.type", reason.as_str());
        }
    }
    meter.count("duplicates", outcome.duplicates);
    meter.count("redelivered", redelivered);
    // Operators know it by this name.
    meter.count("contradicted", mismatched);
    meter.count("changes", outcome.changed);
    meter.handled(deliveries.len() as u64, begun.elapsed());
    true
}

/// A sampled message gets a span in its sender's trace, and the batch a link to it.
fn process_span(receive: &Span, delivery: &Delivery) -> Option<Span> {
    let headers = delivery.message.headers.as_ref();
    if !link(receive, headers) {
        return None;
    }
    let span = tracing::info_span!(
        parent: None,
        "process",
        otel.name = format!("process {}", protocol::subject::subject_template(&delivery.message.subject)),
        otel.kind = "consumer",
        otel.status_code = tracing::field::Empty,
        error.r#type = tracing::field::Empty,
        messaging.system = "nats",
        messaging.operation.name = "process",
        messaging.destination.name = delivery.message.subject,
        messaging.destination.template = protocol::subject::subject_template(&delivery.message.subject),
        scrollback.seq = delivery.message.seq.get(),
    );
    remote_parent(&span, headers);
    Some(span)
}

/// What became of a batch.
#[derive(Debug, Default)]
struct Outcome {
    duplicates: u64,
    changed: u64,
    /// The dead letters, by their sequence.
    refused: Vec<(i64, protocol::reason::Reason)>,
}

/// Tries until every message is stored or a dead letter. While the database is away it waits and keeps
/// what it holds; a row the database refuses is found by halving. `None` when told to stop first.
async fn store_all(
    ctx: &Ctx<Shared>,
    worker: &Worker,
    mut work: AckExtension<'_>,
    batch: Batch,
) -> Option<Outcome> {
    let mut outcome = Outcome::default();
    let mut parts = batch.parts();
    let mut pause = FIRST_PAUSE;
    let mut deadlocks = 0;
    while let Some(part) = parts.pop() {
        let error = match ctx
            .chat
            .database()
            .run(STORE_DEADLINE, async |connection| {
                store::store(connection, &part, &ctx.seen).await
            })
            .await
        {
            Ok(stored) => {
                let (reused, conflicts) =
                    (stored.reused.len() as u64, stored.conflicts.len() as u64);
                outcome.duplicates += (part.messages().count() as u64)
                    .saturating_sub(stored.new + reused + conflicts);
                outcome.changed += stored.changed;
                if stored.new + stored.changed > 0 {
                    wake_relay(ctx).await;
                }
                erase_all(ctx, worker, &mut work, &stored).await?;
                outcome.refused.extend(
                    part.letters
                        .iter()
                        .map(|letter| (letter.original.seq, letter.reason)),
                );
                if pause > FIRST_PAUSE {
                    tracing::info!("PostgreSQL is back; storing again");
                    (pause, _) = (FIRST_PAUSE, worker.waiting(false));
                }
                if reused > 0 {
                    tracing::error!(
                        reused,
                        "sequences that are stored for other messages: the stream was made anew without its fence"
                    );
                }
                if reused + conflicts > 0 {
                    parts.push(part.letters_for(&stored.reused, &stored.conflicts));
                }
                continue;
            }
            Err(error) => error,
        };
        // PostgreSQL has ended one of two that waited for each other; the other one is done, or soon will be.
        if error.sqlstate.as_deref() == Some(DEADLOCK) && deadlocks < DEADLOCKS {
            deadlocks += 1;
            parts.push(part);
            continue;
        }
        let error = match blame(ctx, &part, error).await {
            Ok(error) => {
                parts.extend(part.halve(&error));
                continue;
            }
            Err(error) => error,
        };
        if pause == FIRST_PAUSE {
            match error.class {
                Class::Transient => {
                    tracing::warn!(%error, "waiting for PostgreSQL; nothing is lost, the log keeps it")
                }
                Class::Row => tracing::error!(
                    %error,
                    "PostgreSQL refuses even a message that is known to be good; nothing becomes a dead letter, the log keeps it: mend the \
                     table's constraints and triggers, or the database"
                ),
                Class::Deployment => {
                    tracing::error!(%error, "cannot store anything like this; waiting until it is mended (is stream-bootstrap running?)");
                }
            }
        }
        worker.waiting(true);
        parts.push(part);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = ctx.stop().cancelled() => return None,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    Some(outcome)
}

/// Tells relay-outbox that there is something to relay. Should this be lost, it looks by itself after a while.
async fn wake_relay(ctx: &Ctx<Shared>) {
    if let Err(error) = ctx
        .nats()
        .client()
        .publish(protocol::subject::OUTBOX_WAKE, "".into())
        .await
    {
        tracing::debug!(%error, "relay-outbox was not woken");
    }
}

/// Whether `error` is about something in `part`: then it is to be halved. Otherwise the error to wait for the end of.
async fn blame(
    ctx: &Ctx<Shared>,
    part: &Batch,
    mut error: DatabaseError,
) -> Result<DatabaseError, DatabaseError> {
    match error.class {
        Class::Row if part.refusable() > 0 => {}
        // A dead letter holds any bytes: the table is not as it has to be.
        Class::Row => {
            error.class = Class::Deployment;
            return Err(error);
        }
        Class::Transient | Class::Deployment => return Err(error),
    }
    // Before anything is set aside: a database that refuses everything would fill the dead letters with all there is.
    if part.refusable() == 1 && !Batch::is_reused(&error) {
        ctx.chat
            .database()
            .run(STORE_DEADLINE, probe::store_nothing)
            .await?;
    }
    Ok(error)
}

/// Erases from the log and the dead letters what was deleted for good, however long that takes: only then the deletion is
/// acknowledged, and should we die before, it comes again. `None` when told to stop first.
async fn erase_all(
    ctx: &Ctx<Shared>,
    worker: &Worker,
    work: &mut AckExtension<'_>,
    stored: &Stored,
) -> Option<()> {
    let mut erasures = stored.erase.clone();
    let mut all_named = stored.empty.is_empty();
    while !all_named {
        match work
            .part(ctx.chat.database().run(STORE_DEADLINE, letters::name_some))
            .await
        {
            Ok(more) => all_named = !more,
            Err(error) => wait(ctx, worker, &error).await?,
        }
    }
    let mut next = (!stored.empty.is_empty()).then_some(0);
    while let Some(after) = next {
        let some = ctx.chat.database().run(STORE_DEADLINE, async |connection| {
            letters::empty_some(connection, &stored.empty, after).await
        });
        match work.part(some).await {
            Ok((found, more)) => {
                erasures.extend(found);
                next = more;
            }
            Err(error) => wait(ctx, worker, &error).await?,
        }
    }
    for some in erasures.chunks(erase::TOGETHER) {
        while let Err(error) = work
            .part(erase::erase(ctx.chat.stream(), some, ctx.chat.limits()))
            .await
        {
            wait(ctx, worker, &error).await?;
        }
    }
    Some(())
}

/// Waits before what failed is tried again; `None` when told to stop.
async fn wait(ctx: &Ctx<Shared>, worker: &Worker, error: &(dyn Display + Sync)) -> Option<()> {
    tracing::warn!(%error, "a deleted text could not be erased yet; trying again until it is");
    worker.waiting(true);
    tokio::select! {
        () = tokio::time::sleep(LONGEST_PAUSE) => {}
        () = ctx.stop().cancelled() => return None,
    }
    worker.waiting(false);
    Some(())
}
