//! Looking at everything, and applying everything, one copy at a time.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::postgres::PgConnection;
use tokio::time::timeout;

use crate::compare::Config;
use crate::events::Foreign;
use crate::shipped::{Shipped, subjects, swallowed};
use crate::trouble::Trouble;
use crate::{fence, letters, replay, schema};
use base::error::Fatal;
use base::seq::Seq;
use base::subject::overlap;
use nats::connection::Connection;
use protocol::audit::Replayed;
use protocol::bootstrap::{Check, Difference};
use protocol::js_api;
use protocol::reason::Reason;
use service::ctx::Ctx;
use timeline::chat::Chat;

/// The first one that appends atomically and keeps what it acknowledged.
const OLDEST_SERVER: [u64; 3] = [2, 14, 3];
/// After this without a connection, the database counts as away.
const PING_LIMIT: Duration = Duration::from_secs(2);
/// Below the deadline of a request.
const CHECK_LIMIT: Duration = Duration::from_secs(4);
/// Walking a restored log of some million messages takes minutes; migrating large tables, too.
const APPLY_LIMIT: Duration = Duration::from_secs(3_600);
/// Answering takes longer only when the connection is cut.
const UNLOCK_LIMIT: Duration = Duration::from_secs(5);
/// The advisory lock that one applying copy holds; any number nobody else uses: "scrollb" in ASCII.
pub const LOCK: i64 = 0x0073_6372_6f6c_6c62;

/// What the handlers work with.
#[derive(Debug)]
pub struct Bootstrap {
    ctx: Ctx<Chat>,
    shipped: Shipped,
    foreign: Foreign,
}

impl Bootstrap {
    /// `shipped` on the servers of `ctx`.
    pub fn new(ctx: Ctx<Chat>, shipped: Shipped) -> Bootstrap {
        Bootstrap {
            ctx,
            shipped,
            foreign: Foreign::default(),
        }
    }

    /// What differs; changes nothing.
    ///
    /// # Errors
    /// A server does not answer.
    pub async fn check(&self) -> Result<Check, Trouble> {
        let nats = self.ctx.nats();
        let mut found = Vec::new();
        found.extend(old_server(nats));
        for object in self.shipped.objects() {
            found.extend(object.check(nats).await?);
        }
        found.extend(self.foreign.check(nats).await?);
        let swallowed = streams(nats)
            .await?
            .iter()
            .flat_map(Stream::swallowed)
            .collect::<Vec<String>>();
        let (standing, stored, waiting) = self
            .ctx
            .database()
            .run(CHECK_LIMIT, look_at_database)
            .await?;
        found.extend(standing.differences);
        if waiting > 0 {
            found.push(Difference {
                object: "table dead_letters".to_owned(),
                field: Reason::BelowFence.to_string(),
                wanted: 0.into(),
                actual: waiting.into(),
            });
        }
        let fence = match stored {
            Some(stored) => fence::look(nats, stored).await?,
            None => None,
        };
        let holds = fence.is_none_or(|fence| fence.last >= fence.stored);
        let ok = found.is_empty() && swallowed.is_empty() && standing.missing.is_empty() && holds;
        Ok(Check {
            ok,
            differences: found,
            swallowed,
            migrations: standing.missing,
            fence,
        })
    }

    /// Applies everything; says what was done. [`Trouble::Busy`] when another copy is at it.
    ///
    /// # Errors
    /// A server does not answer, or refuses.
    pub async fn apply(&self) -> Result<Vec<String>, Trouble> {
        self.alone(async |connection| self.apply_locked(connection).await)
            .await
    }

    /// Applies everything, so that a database that was lost has its tables again, and delivers the log again from
    /// `from` on. Letters that wait for room in the log do not stand in the way.
    ///
    /// # Errors
    /// As [`apply`](Bootstrap::apply); `from` is beyond the log.
    pub async fn replay(&self, from: Seq) -> Result<(Vec<String>, Replayed), Trouble> {
        self.alone(async |connection| {
            let done = match self.apply_locked(connection).await {
                Err(Trouble::LettersWait(_)) => Vec::new(),
                outcome => outcome?,
            };
            Ok((
                done,
                replay::replay(self.ctx.stream(), self.ctx.nats(), connection, from).await?,
            ))
        })
        .await
    }

    /// Runs `work` on a connection that holds the lock. [`Trouble::Busy`] when another copy holds it.
    async fn alone<T>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        // Asked first with a short limit: waiting for a connection may take half a minute, without a word.
        self.ctx.database().run(PING_LIMIT, ping).await?;
        let mut outcome = Err(Trouble::Busy);
        let released =
            self.ctx
                .database()
                .run_once(APPLY_LIMIT, async |connection: &mut PgConnection| {
                    let locked: bool = sqlx::query_scalar("select pg_try_advisory_lock($1)")
                        .bind(LOCK)
                        .fetch_one(&mut *connection)
                        .await?;
                    if locked {
                        outcome = work(connection).await;
                    }
                    // What failed may be the session, such as one to a former primary: it is closed, which gives the lock up, and
                    // not used again.
                    if matches!(outcome, Err(Trouble::Database(_))) {
                        return Err(sqlx::Error::WorkerCrashed);
                    }
                    unlock(connection).await
                });
        match (released.await, outcome) {
            (Err(error), Err(Trouble::Busy)) => Err(error.into()),
            (_, outcome) => outcome,
        }
    }

    /// On the connection that holds the lock: when that breaks, another copy may begin, and we notice at the next statement.
    async fn apply_locked(&self, connection: &mut PgConnection) -> Result<Vec<String>, Trouble> {
        let (nats, limits) = (self.ctx.nats(), self.ctx.limits());
        if let Some(Difference { wanted, actual, .. }) = old_server(nats) {
            return Err(Trouble::Refused(format!(
                "nats-server {actual} is too old: {wanted} is needed"
            )));
        }
        // Ours is about to be made as shipped, and what is shipped swallows nothing.
        let foreign = |stream: &&Stream| {
            !self
                .shipped
                .streams()
                .any(|object| object.kind.to_string() == stream.label())
        };
        let streams = streams(nats).await?;
        let foreign: Vec<&Stream> = streams.iter().filter(foreign).collect();
        let mut refusals = foreign.iter().flat_map(|stream| stream.swallowed());
        if let Some(sentence) = refusals.next().or_else(|| self.taken_by(&foreign)) {
            return Err(Trouble::Refused(sentence));
        }
        let mut done = schema::migrate(connection).await?;
        // Before the fence: it has to find the last event.
        done.extend(self.foreign.remove(nats).await?);
        for object in self.shipped.objects() {
            if fence::is_log(object) {
                done.extend(
                    fence::keep(self.ctx.stream(), nats, connection, object, limits).await?,
                );
            }
            done.extend(object.apply(nats).await?);
        }
        done.extend(letters::append(self.ctx.stream(), nats, connection, limits).await?);
        Ok(done)
    }

    /// Which of our subjects another stream takes in, in one sentence. The server refuses ours then, and names neither.
    fn taken_by(&self, foreign: &[&Stream]) -> Option<String> {
        self.shipped.streams().find_map(|ours| {
            let wanted = subjects(&ours.config);
            foreign.iter().find_map(|stream| {
                let taken = subjects(&stream.config);
                let taken = taken
                    .iter()
                    .find(|taken| wanted.iter().any(|wanted| overlap(wanted, taken)))?;
                Some(format!(
                    "{} takes in {taken}, which belongs to {}: narrow its subjects, or delete it",
                    stream.label(),
                    ours.kind
                ))
            })
        })
    }
}

async fn ping(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("select").execute(connection).await.map(|_| ())
}

/// Ours, and sqlx's own, which it keeps when a migration fails.
async fn unlock(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let unlock = sqlx::query("select pg_advisory_unlock_all()").execute(connection);
    timeout(UNLOCK_LIMIT, unlock)
        .await
        .map_err(|_| sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))?
        .map(|_| ())
}

async fn look_at_database(
    connection: &mut PgConnection,
) -> Result<(schema::Standing, Option<Seq>, i64), sqlx::Error> {
    let standing = schema::standing(connection).await?;
    let stored = fence::stored(connection).await?;
    let waiting = if stored.is_some() {
        letters::waiting(connection).await?
    } else {
        0
    };
    Ok((standing, stored, waiting))
}

fn old_server(nats: &Connection) -> Option<Difference> {
    let version = nats.client().server_info().version;
    is_older(&version).then(|| Difference {
        object: "nats-server".to_owned(),
        field: "version".to_owned(),
        wanted: Value::String(format!(
            ">= {}",
            OLDEST_SERVER.map(|part| part.to_string()).join(".")
        )),
        actual: Value::String(version),
    })
}

fn is_older(version: &str) -> bool {
    let number = |part: &str| {
        part.split(|c: char| !c.is_ascii_digit())
            .next()
            .and_then(|digits| digits.parse().ok())
            .unwrap_or(0)
    };
    let parts: Vec<u64> = version
        .split('.')
        .take(OLDEST_SERVER.len())
        .map(number)
        .collect();
    parts[..] < OLDEST_SERVER[..]
}

/// A stream of the account.
#[derive(Debug, Deserialize)]
struct Stream {
    config: Config,
}

impl Stream {
    fn label(&self) -> String {
        format!(
            "stream {}",
            self.config
                .get("name")
                .and_then(Value::as_str)
                .unwrap_or_default()
        )
    }

    fn swallowed(&self) -> Vec<String> {
        swallowed(&self.label(), &subjects(&self.config))
    }
}

/// Every stream of the account, page by page.
async fn streams(nats: &Connection) -> Result<Vec<Stream>, Trouble> {
    #[derive(Deserialize)]
    struct Page {
        total: usize,
        streams: Option<Vec<Stream>>,
    }
    let mut found: Vec<Stream> = Vec::new();
    loop {
        let page: Page = nats
            .api(js_api::STREAM_LIST, &json!({ "offset": found.len() }))
            .await?;
        let streams = page.streams.unwrap_or_default();
        let ended = streams.is_empty();
        found.extend(streams);
        if ended || found.len() >= page.total {
            return Ok(found);
        }
    }
}

/// The function's own settings.
#[derive(Debug, Deserialize)]
pub struct Own {
    /// `BOOTSTRAP_CONFIG`: a directory with `streams/` and `consumers/`, instead of what is shipped.
    pub bootstrap_config: Option<std::path::PathBuf>,
    /// `BOOTSTRAP_INTERVAL_MS`: how often everything is looked at.
    #[serde(default = "default_interval_ms")]
    bootstrap_interval_ms: u64,
    /// `BOOTSTRAP_ALLOW_REPLICAS`: `num_replicas` above 1 are taken.
    #[serde(default)]
    pub bootstrap_allow_replicas: bool,
}

const MAX_INTERVAL_MS: u64 = 24 * 60 * 60 * 1_000;

const fn default_interval_ms() -> u64 {
    30_000
}

impl Own {
    /// # Errors
    /// Names the variable that is wrong.
    pub fn interval(&self) -> Result<Duration, Fatal> {
        match self.bootstrap_interval_ms {
            0 => Err(Fatal::new(
                "configuration: BOOTSTRAP_INTERVAL_MS must be at least 1",
            )),
            milliseconds if milliseconds > MAX_INTERVAL_MS => Err(Fatal::new(format!(
                "configuration: BOOTSTRAP_INTERVAL_MS must be at most {MAX_INTERVAL_MS}, a day"
            ))),
            milliseconds => Ok(Duration::from_millis(milliseconds)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_server_is_told_by_its_version() {
        for old in ["2.14.2", "2.9.22", "1.99.99", "2.14", ""] {
            assert!(is_older(old), "{old}");
        }
        for good in ["2.14.3", "2.14.3-RC.1", "2.15.0-dev", "2.15.1", "3.0.0"] {
            assert!(!is_older(good), "{good}");
        }
    }
}
