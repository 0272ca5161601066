//! Stream and database, as a function uses them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::settings::ChatSettings;
use base::error::Fatal;
use base::time::system_time_ms;
use jetstream::consumer::{Options, PullConsumer};
use jetstream::stream::{Names, StreamReader};
use postgres::database::Database;
use protocol::message::Limits;
use protocol::subject::{STREAM, WORKER};
use service::config::Vars;
use service::ctx::{Clock, Ctx};

/// How long PostgreSQL may take to answer the health probe.
const PROBE_LIMIT: Duration = Duration::from_secs(4);
const DAY_MS: i64 = 24 * 60 * 60 * 1_000;

/// Stream and database, as a function uses them.
#[derive(Clone)]
pub struct Chat {
    stream: Arc<StreamReader>,
    database: Database,
    settings: ChatSettings,
    clock: Clock,
}

impl fmt::Debug for Chat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chat")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Chat {
    /// Opens both as the environment says; they connect when first used. From now on the function
    /// is healthy only while PostgreSQL answers, and it closes its connections when it stops.
    ///
    /// # Errors
    /// A variable that is missing or wrong, or a function that did not declare [`ChatSettings`].
    pub fn open<S>(ctx: &Ctx<S>) -> Result<Chat, Fatal> {
        let settings: ChatSettings = ctx.read_settings()?;
        let database = Database::new(&settings.database(), ctx.identity().name)?;
        let stream = StreamReader::new(
            ctx.nats().clone(),
            ctx.settings().nats.clone(),
            ctx.identity().name,
            Names {
                stream: STREAM,
                consumer: WORKER,
            },
            ctx.stop().clone(),
        );
        let probed = database.clone();
        ctx.add_health_check(move || {
            let database = probed.clone();
            async move {
                database
                    .ping(PROBE_LIMIT)
                    .await
                    .map_err(|error| format!("PostgreSQL does not answer: {error}"))
            }
        });
        let closed = database.clone();
        ctx.on_stop(async move { closed.close().await });
        Ok(Chat {
            stream,
            database,
            settings,
            clock: ctx.clock(),
        })
    }

    /// The stream, for reading.
    pub fn stream(&self) -> &StreamReader {
        &self.stream
    }

    /// PostgreSQL.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// The settings that are the same for all functions.
    pub fn settings(&self) -> &ChatSettings {
        &self.settings
    }

    /// The limits of a message.
    pub fn limits(&self) -> Limits {
        Limits {
            text_bytes: self.settings.max_text_bytes,
        }
    }

    /// The cutoff while PostgreSQL is away: by our clock, and without the table `retention`. What
    /// the stream received at this time, in Unix milliseconds, or before has expired. `None` where
    /// nothing expires.
    pub fn cutoff_ms(&self) -> Option<i64> {
        let now_ms = system_time_ms((self.clock)());
        (self.settings.expire_days > 0)
            .then(|| now_ms.saturating_sub(i64::from(self.settings.expire_days) * DAY_MS))
    }

    /// Consumes the stream: at most `max_batch` messages at once, and an error when
    /// nothing moves for `stuck_after`.
    pub fn consumer(&self, max_batch: usize, stuck_after: Duration) -> PullConsumer {
        PullConsumer::new(self.stream.clone(), Options::new(max_batch, stuck_after))
    }
}

/// The database that the environment names, as the function `application` connects to it.
///
/// # Errors
/// A variable that is missing or wrong.
pub fn open_database(vars: &Vars, application: &str) -> Result<Database, Fatal> {
    Database::new(&vars.read::<ChatSettings>()?.database(), application)
}
