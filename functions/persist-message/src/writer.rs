//! Writes one batch, until every message is stored or a dead letter.
//!
//! While the database is away the writer waits and keeps the batch. When the database refuses a
//! row, the writer finds it by halving the batch; only that message becomes a dead letter.

use std::fmt::Display;
use std::time::Duration;

use crate::batch::Batch;
use crate::erase::erase_in_stream;
use crate::store::{Stored, store};
use crate::{Shared, dead_letters, erase, probe};
use base::backoff::Backoff;
use base::log_once::LogOnce;
use jetstream::consumer::{AckExtension, Delivery, PullConsumer};
use postgres::error::{Class, DatabaseError};
use protocol::reason::Reason;
use protocol::subject::OUTBOX_WAKE;
use service::ctx::Ctx;

/// A statement of a thousand rows takes milliseconds; one that takes this long is on a dead
/// connection.
pub const STORE_DEADLINE: Duration = Duration::from_secs(15);
/// The first pause while the database is away.
pub const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause while the database is away.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// PostgreSQL's `deadlock_detected`.
const DEADLOCK: &str = "40P01";
/// So many deadlocks are retried at once; PostgreSQL takes a second to notice each.
const MAX_DEADLOCKS: u32 = 5;

/// What became of a batch.
#[derive(Debug, Default)]
pub struct Written {
    /// Messages that were stored before.
    pub duplicates: u64,
    /// Changes that are new.
    pub changes: u64,
    /// Sequences and reasons of the dead letters.
    pub dead_letters: Vec<(i64, Reason)>,
}

/// Writes one batch.
pub struct Writer<'a> {
    ctx: &'a Ctx<Shared>,
    consumer: &'a PullConsumer,
    /// Keeps the batch from being delivered again while texts are erased, which may take long.
    acks: AckExtension<'a>,
    written: Written,
    backoff: Backoff,
    log: LogOnce,
    deadlocks: u32,
}

impl<'a> Writer<'a> {
    /// For the batch `deliveries`, whose processing begins now.
    pub fn new(
        ctx: &'a Ctx<Shared>,
        consumer: &'a PullConsumer,
        deliveries: &'a [Delivery],
    ) -> Writer<'a> {
        Writer {
            ctx,
            consumer,
            acks: consumer.extend_acks(deliveries),
            written: Written::default(),
            backoff: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
            log: LogOnce::default(),
            deadlocks: 0,
        }
    }

    /// Writes `batch`; `None` when asked to stop first.
    pub async fn write(mut self, batch: Batch) -> Option<Written> {
        let mut parts = batch.parts();
        while let Some(part) = parts.pop() {
            match self.store(&part).await {
                Ok(stored) => {
                    self.finish(&part, &stored).await?;
                    if stored.reused.len() + stored.conflicts.len() > 0 {
                        parts.push(part.dead_letters_for(&stored.reused, &stored.conflicts));
                    }
                }
                // PostgreSQL has ended one of two transactions; the other one is done, or soon will
                // be.
                Err(error) if self.is_worth_retrying_now(&error) => parts.push(part),
                Err(error) => match self.blame(&part, error).await {
                    Ok(refusal) => parts.extend(part.halve(&refusal)),
                    Err(error) => {
                        parts.push(part);
                        self.wait_for_database(&error).await?;
                    }
                },
            }
        }
        Some(self.written)
    }

    async fn store(&self, part: &Batch) -> Result<Stored, DatabaseError> {
        let database = self.ctx.chat.database();
        let storing = database.run(STORE_DEADLINE, async |connection| {
            store(connection, part, &self.ctx.last_seen).await
        });
        storing.await
    }

    /// What follows a commit; `None` when asked to stop first.
    async fn finish(&mut self, part: &Batch, stored: &Stored) -> Option<()> {
        let reused = stored.reused.len() as u64;
        let conflicts = stored.conflicts.len() as u64;
        let messages = part.messages().count() as u64;
        self.written.duplicates += messages.saturating_sub(stored.new + reused + conflicts);
        self.written.changes += stored.changed;
        if stored.new + stored.changed > 0 {
            self.wake_relay().await;
        }
        self.erase_deleted(stored).await?;
        for dead_letter in &part.dead_letters {
            self.written
                .dead_letters
                .push((dead_letter.original.seq, dead_letter.reason));
        }
        if self.log.recovered() {
            tracing::info!("PostgreSQL is back; storing again");
            self.backoff.reset();
            self.consumer.pause_watchdog(false);
        }
        if reused > 0 {
            tracing::error!(
                reused,
                "messages have sequences under which other messages are stored: the stream was \
                 recreated without its sequence guard. They become dead letters; is \
                 stream-bootstrap running?"
            );
        }
        Some(())
    }

    fn is_worth_retrying_now(&mut self, error: &DatabaseError) -> bool {
        let deadlock = error.sqlstate.as_deref() == Some(DEADLOCK);
        if deadlock && self.deadlocks < MAX_DEADLOCKS {
            self.deadlocks += 1;
            return true;
        }
        false
    }

    /// Whether the refusal is about a row of `part`, so that halving finds it; otherwise the error
    /// whose end we have to wait for.
    async fn blame(
        &self,
        part: &Batch,
        mut error: DatabaseError,
    ) -> Result<DatabaseError, DatabaseError> {
        match error.class {
            Class::Row if part.refusable() > 0 => {}
            // A dead letter may hold any bytes, so the table is not as it has to be.
            Class::Row => {
                error.class = Class::Deployment;
                return Err(error);
            }
            Class::Transient | Class::Deployment => return Err(error),
        }
        // Before a message becomes a dead letter: a database that refuses everything would turn all
        // of the stream into dead letters.
        if part.refusable() == 1 && !Batch::is_reused(&error) {
            let database = self.ctx.chat.database();
            database
                .run(STORE_DEADLINE, probe::store_and_roll_back)
                .await?;
        }
        Ok(error)
    }

    /// Waits before the same part is stored again; `None` when asked to stop.
    async fn wait_for_database(&mut self, error: &DatabaseError) -> Option<()> {
        if self.log.is_news(&error.to_string()) {
            log_waiting(error);
        }
        self.consumer.pause_watchdog(true);
        tokio::select! {
            () = tokio::time::sleep(self.backoff.next_pause()) => {}
            () = self.ctx.stop().cancelled() => return None,
        }
        Some(())
    }

    /// Wakes relay-outbox. If this is lost, it looks for itself after a while.
    async fn wake_relay(&self) {
        let client = self.ctx.nats().client();
        if let Err(error) = client.publish(OUTBOX_WAKE, "".into()).await {
            tracing::debug!(%error, "relay-outbox could not be woken; it relays a little later");
        }
    }

    /// Erases the texts of hard-deleted messages from dead letters and stream, however long that
    /// takes. Only then is the deletion acknowledged; if we die before, it is delivered again.
    /// `None` when asked to stop first.
    async fn erase_deleted(&mut self, stored: &Stored) -> Option<()> {
        let mut erasures = stored.erasures.clone();
        if !stored.deleted.is_empty() {
            self.identify_dead_letters().await?;
            let mut after = Some(0);
            while let Some(from) = after {
                let database = self.ctx.chat.database();
                let erasing = database.run(STORE_DEADLINE, async |connection| {
                    dead_letters::erase_some(connection, &stored.deleted, from).await
                });
                match self.acks.during(erasing).await {
                    Ok((found, next)) => {
                        erasures.extend(found);
                        after = next;
                    }
                    Err(error) => self.wait_to_erase(&error).await?,
                }
            }
        }
        for some in erasures.chunks(erase::CONCURRENCY) {
            let stream = self.ctx.chat.stream();
            let limits = self.ctx.chat.limits();
            while let Err(error) = self
                .acks
                .during(erase_in_stream(stream, some, limits))
                .await
            {
                self.wait_to_erase(&error).await?;
            }
        }
        Some(())
    }

    /// `None` when asked to stop.
    async fn identify_dead_letters(&mut self) -> Option<()> {
        loop {
            let database = self.ctx.chat.database();
            let identifying = database.run(STORE_DEADLINE, dead_letters::identify_some);
            match self.acks.during(identifying).await {
                Ok(true) => {}
                Ok(false) => return Some(()),
                Err(error) => self.wait_to_erase(&error).await?,
            }
        }
    }

    /// Waits before an erasure is tried again; `None` when asked to stop.
    async fn wait_to_erase(&self, error: &(dyn Display + Sync)) -> Option<()> {
        tracing::warn!(
            %error,
            "a deleted text could not be erased yet; trying again until it is. The deletion is \
             acknowledged only then"
        );
        self.consumer.pause_watchdog(true);
        tokio::select! {
            () = tokio::time::sleep(LONGEST_PAUSE) => {}
            () = self.ctx.stop().cancelled() => return None,
        }
        self.consumer.pause_watchdog(false);
        Some(())
    }
}

fn log_waiting(error: &DatabaseError) {
    match error.class {
        Class::Transient => tracing::warn!(
            %error,
            "PostgreSQL does not answer; waiting for it. Nothing is lost: the stream keeps the \
             messages"
        ),
        Class::Row => tracing::error!(
            %error,
            "PostgreSQL refuses even a message that is known to be good; waiting. Nothing becomes \
             a dead letter and nothing is lost: the stream keeps the messages. Correct the tables' \
             constraints and triggers, or the database"
        ),
        Class::Deployment => tracing::error!(
            %error,
            "PostgreSQL can store nothing of this kind; waiting until that is corrected. Is \
             stream-bootstrap running?"
        ),
    }
}
