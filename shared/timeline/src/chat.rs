//! Stream and database as one function uses them.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;

use base::error::Fatal;
use jetstream::consumer::Worker;
use jetstream::stream::{Names, StreamReader};
use postgres::database::Database;
use protocol::message::Limits;
use protocol::subject::{STREAM, WORKER};
use service::config::Vars;
use service::ctx::{Clock, Ctx};

/// How long PostgreSQL may take to answer the health probe.
const PROBE_LIMIT: Duration = Duration::from_secs(4);
/// A century: beyond it is a mistake, and 0 says "for ever".
const MAX_EXPIRE_DAYS: u32 = 36_500;
const DAY_MS: i64 = 24 * 60 * 60 * 1_000;

/// What all functions must agree on.
#[derive(Debug, Clone, Deserialize)]
pub struct Settings {
    /// `MAX_TEXT_BYTES`: the longest text; the same for every function.
    #[serde(default = "default_max_text_bytes")]
    pub max_text_bytes: usize,
    /// `EXPIRE_DAYS`: how long messages are kept, unless table `retention` says otherwise; 0 is for ever. The same for every
    /// function: it decides while PostgreSQL is away.
    #[serde(default = "default_expire_days")]
    pub expire_days: u32,
}

fn default_max_text_bytes() -> usize {
    Limits::default().text_bytes
}

const fn default_expire_days() -> u32 {
    30
}

impl Settings {
    /// Reads and checks.
    ///
    /// # Errors
    /// Names the variable that is wrong.
    pub fn read(vars: &Vars) -> Result<Settings, Fatal> {
        let settings: Settings = vars.read()?;
        if settings.max_text_bytes == 0 {
            return Err(Fatal::new(
                "configuration: MAX_TEXT_BYTES must be at least 1",
            ));
        }
        if settings.max_text_bytes > 1 << 30 {
            return Err(Fatal::new(format!(
                "configuration: MAX_TEXT_BYTES must be at most {}",
                1 << 30
            )));
        }
        if settings.expire_days > MAX_EXPIRE_DAYS {
            return Err(Fatal::new(format!(
                "configuration: EXPIRE_DAYS must be from 1 to {MAX_EXPIRE_DAYS}, or 0 for ever"
            )));
        }
        Ok(settings)
    }
}

/// Stream and database as one function uses them.
#[derive(Clone)]
pub struct Chat {
    stream: Arc<StreamReader>,
    database: Database,
    settings: Settings,
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
    /// Opens both as the environment says, connecting when first used. From now on the function counts as healthy only while
    /// PostgreSQL answers, and closes its connections when it stops.
    ///
    /// # Errors
    /// A variable that is missing or wrong.
    pub fn open<S>(ctx: &Ctx<S>) -> Result<Chat, Fatal> {
        let settings = Settings::read(ctx.vars())?;
        let database = open_database(ctx.vars(), ctx.identity().name)?;
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

    /// What all functions agree on.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What a message may weigh.
    pub fn limits(&self) -> Limits {
        Limits {
            text_bytes: self.settings.max_text_bytes,
        }
    }

    /// What the stream received at this time, in Unix milliseconds, or before has expired, by our clock and without asking the table
    /// `retention`: for while PostgreSQL is away. `None` where nothing expires.
    pub fn cutoff_ms(&self) -> Option<i64> {
        let now: SystemTime = (self.clock)();
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ms = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
        (self.settings.expire_days > 0)
            .then(|| now_ms.saturating_sub(i64::from(self.settings.expire_days) * DAY_MS))
    }

    /// This replica's part in consuming the stream: at most `max_batch` messages at once, and an error when
    /// nothing moves for `stuck_after`.
    pub fn worker(&self, max_batch: usize, stuck_after: Duration) -> Worker {
        Worker::new(self.stream.clone(), max_batch, stuck_after)
    }
}

/// The database that the environment names, as the function `application` connects to it.
///
/// # Errors
/// A variable that is missing or wrong.
pub fn open_database(vars: &Vars, application: &str) -> Result<Database, Fatal> {
    Database::new(&database_settings(vars)?, application)
}

fn database_settings(vars: &Vars) -> Result<postgres::settings::Settings, Fatal> {
    let settings: postgres::settings::Settings = vars.read()?;
    settings.check()?;
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Result<postgres::settings::Settings, Fatal> {
        let vars = Vars::from_pairs(
            pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned())),
        )?;
        service::config::Settings::read(&vars)?;
        Settings::read(&vars)?;
        database_settings(&vars)
    }

    #[test]
    fn a_wrong_configuration_is_named_in_one_line() {
        for (pairs, named) in [
            (vec![], "DATABASE_URL is not set"),
            (vec![("DATABASE_URL", "")], "DATABASE_URL is not set"),
            (
                vec![("DATABASE_URL", "x"), ("DATABASE_CONNECTIONS", "many")],
                "DATABASE_CONNECTIONS",
            ),
            (
                vec![("DATABASE_URL", "x"), ("DATABASE_IDLE_TIMEOUT_MS", "0")],
                "DATABASE_IDLE_TIMEOUT_MS must be at least 1",
            ),
            (
                vec![("DATABASE_URL", "x"), ("DATABASE_MAX_LIFETIME_MS", "30m")],
                "DATABASE_MAX_LIFETIME_MS",
            ),
            (
                vec![("DATABASE_URL", "x"), ("MAX_TEXT_BYTES", "0")],
                "MAX_TEXT_BYTES must be at least 1",
            ),
            (
                vec![
                    ("DATABASE_URL", "x"),
                    ("MAX_CONCURRENT_REQUESTS", "18446744073709551615"),
                ],
                "MAX_CONCURRENT_REQUESTS must be at most",
            ),
            (
                vec![
                    ("DATABASE_URL", "x"),
                    ("DATABASE_CONNECTIONS", "4294967295"),
                ],
                "DATABASE_CONNECTIONS must be at most 10000",
            ),
            (
                vec![
                    ("DATABASE_URL", "x"),
                    ("REQUEST_DEADLINE_MS", "18446744073709551615"),
                ],
                "REQUEST_DEADLINE_MS must be at most 3600000",
            ),
            (
                vec![("DATABASE_URL", "x"), ("EXPIRE_DAYS", "-1")],
                "EXPIRE_DAYS",
            ),
            (
                vec![("DATABASE_URL", "x"), ("EXPIRE_DAYS", "36501")],
                "EXPIRE_DAYS must be from 1 to 36500",
            ),
            (
                vec![("DATABASE_URL", "x"), ("MAX_WAITING_REQUESTS", "0")],
                "MAX_WAITING_REQUESTS must be at least 1",
            ),
            (
                vec![("DATABASE_URL", "x"), ("MAX_WAITING_BYTES", "1")],
                "MAX_WAITING_BYTES must be at least 2097152",
            ),
            (
                vec![("DATABASE_URL_FILE", "no/such/file")],
                "DATABASE_URL_FILE=no/such/file cannot be read",
            ),
        ] {
            let line = settings(&pairs).unwrap_err().to_string();
            assert!(line.contains(named), "{line}");
            assert!(!line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn a_secret_may_stand_in_a_file() {
        let path = std::env::temp_dir().join(format!("scrollback-secret-{}", std::process::id()));
        std::fs::write(&path, "postgres://here\n").unwrap();
        let read = settings(&[("DATABASE_URL_FILE", path.to_str().unwrap())]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read.unwrap().database_url, "postgres://here");
    }

    #[test]
    fn no_secret_is_ever_printed() {
        let pairs = [
            ("NATS_URL", "nats://bob:hunter2@a:1,tls://eve:hunter2@b"),
            ("NATS_PASS", "hunter2"),
            (
                "DATABASE_URL",
                "postgres://x:hunter2@db:5432/chat?password=hunter2",
            ),
        ];
        let vars =
            Vars::from_pairs(pairs.map(|(key, value)| (key.to_owned(), value.to_owned()))).unwrap();
        let printed = format!(
            "{vars:?} {:?} {:?}",
            service::config::Settings::read(&vars).unwrap(),
            database_settings(&vars).unwrap()
        );
        assert!(
            !printed.contains("hunter2") && !printed.contains("bob"),
            "{printed}"
        );
        assert!(
            printed.contains("nats://a:1,tls://b") && printed.contains("postgres://db:5432/chat"),
            "{printed}"
        );
    }
}
