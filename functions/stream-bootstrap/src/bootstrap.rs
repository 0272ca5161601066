//! Checks everything and applies everything, one replica at a time.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::postgres::PgConnection;

use crate::compare::Config;
use crate::desired::{Desired, captured_requests, subjects};
use crate::error::Error;
use crate::foreign_events::ForeignEvents;
use crate::{reappend, replay, schema, sequence_guard};
use base::seq::Seq;
use base::subject::overlap;
use jetstream::api;
use nats::connection::Connection;
use postgres::lock::with_session_lock;
use protocol::audit::Replayed;
use protocol::bootstrap::{Check, Difference};
use protocol::reason::Reason;
use service::ctx::Ctx;
use timeline::chat::Chat;

/// The first version that appends batches atomically and keeps what it acknowledged.
const OLDEST_SERVER: [u64; 3] = [2, 14, 3];
/// A database that does not answer within this counts as down.
const PING_LIMIT: Duration = Duration::from_secs(2);
/// Below the deadline of a request.
const CHECK_LIMIT: Duration = Duration::from_secs(4);
/// Scanning a restored stream of some million messages takes minutes, and so does migrating large
/// tables.
const APPLY_LIMIT: Duration = Duration::from_secs(3_600);
/// The advisory lock of the replica that applies; a number that nobody else uses: "scrollb" in
/// ASCII.
pub const LOCK: i64 = 0x0073_6372_6f6c_6c62;

/// Compares the servers with the desired state, and applies it.
#[derive(Debug)]
pub struct Bootstrap {
    ctx: Ctx<Chat>,
    desired: Desired,
    foreign_events: ForeignEvents,
}

impl Bootstrap {
    /// For the servers of `ctx`.
    pub fn new(ctx: Ctx<Chat>, desired: Desired) -> Bootstrap {
        Bootstrap {
            ctx,
            desired,
            foreign_events: ForeignEvents::default(),
        }
    }

    /// What differs; changes nothing.
    ///
    /// # Errors
    /// A server does not answer.
    pub async fn check(&self) -> Result<Check, Error> {
        let nats = self.ctx.nats();
        let mut found = Vec::new();
        found.extend(old_server(nats));
        for object in self.desired.objects() {
            found.extend(object.check(nats).await?);
        }
        found.extend(self.foreign_events.check(nats).await?);
        let captured = streams(nats)
            .await?
            .iter()
            .flat_map(Stream::captured_requests)
            .collect::<Vec<String>>();
        let database = self
            .ctx
            .database()
            .run(CHECK_LIMIT, database_status)
            .await?;
        found.extend(database.schema.differences);
        if database.waiting > 0 {
            found.push(Difference {
                object: "table dead_letters".to_owned(),
                field: Reason::BelowFence.to_string(),
                wanted: 0.into(),
                actual: database.waiting.into(),
            });
        }
        let guard = match database.highest_stored {
            Some(stored) => sequence_guard::status(nats, stored).await?,
            None => None,
        };
        let migrations = database.schema.missing;
        let guard_holds = guard.is_none_or(|guard| guard.last >= guard.stored);
        let ok = found.is_empty() && captured.is_empty() && migrations.is_empty() && guard_holds;
        Ok(Check {
            ok,
            differences: found,
            swallowed: captured,
            migrations,
            fence: guard,
        })
    }

    /// Applies everything if something differs; returns what was done.
    ///
    /// # Errors
    /// As [`apply`](Bootstrap::apply).
    pub async fn reconcile(&self) -> Result<Vec<String>, Error> {
        if self.check().await?.ok {
            Ok(Vec::new())
        } else {
            self.apply().await
        }
    }

    /// Applies everything; returns what was done.
    ///
    /// # Errors
    /// [`Error::Busy`] while another replica applies; or a server does not answer, or refuses.
    pub async fn apply(&self) -> Result<Vec<String>, Error> {
        self.with_lock(async |connection| self.apply_locked(connection).await)
            .await
    }

    /// Applies everything, so that a lost database has its tables again, and then delivers the
    /// stream again from `from` on. Dead letters that wait for space in the stream do not prevent
    /// it.
    ///
    /// # Errors
    /// As [`apply`](Bootstrap::apply); or `from` is beyond the stream.
    pub async fn replay(&self, from: Seq) -> Result<(Vec<String>, Replayed), Error> {
        self.with_lock(async |connection| {
            let done = match self.apply_locked(connection).await {
                Err(Error::DeadLettersWaiting(_)) => Vec::new(),
                outcome => outcome?,
            };
            let replayed =
                replay::replay(self.ctx.stream(), self.ctx.nats(), connection, from).await?;
            Ok((done, replayed))
        })
        .await
    }

    /// Runs `work` on a connection that holds the lock; [`Error::Busy`] if another replica holds
    /// it.
    async fn with_lock<T>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        // A short ping first, because waiting for a connection may take half a minute in silence.
        self.ctx.database().run(PING_LIMIT, ping).await?;
        with_session_lock(self.ctx.database(), LOCK, APPLY_LIMIT, work)
            .await?
            .ok_or(Error::Busy)
    }

    /// Runs on the connection that holds the lock. If that connection breaks, another replica may
    /// start, and our next statement fails.
    async fn apply_locked(&self, connection: &mut PgConnection) -> Result<Vec<String>, Error> {
        let nats = self.ctx.nats();
        let limits = self.ctx.limits();
        if let Some(Difference { wanted, actual, .. }) = old_server(nats) {
            return Err(Error::Refused(format!(
                "nats-server {actual} is too old: {wanted} is needed"
            )));
        }
        if let Some(conflict) = self.conflict(&streams(nats).await?) {
            return Err(Error::Refused(conflict));
        }
        let mut done = schema::migrate(connection).await?;
        // Before the sequence guard, which has to find the last event.
        done.extend(self.foreign_events.remove(nats).await?);
        for object in self.desired.objects() {
            if sequence_guard::is_chat_stream(object) {
                done.extend(
                    sequence_guard::enforce(self.ctx.stream(), nats, connection, object, limits)
                        .await?,
                );
            }
            done.extend(object.apply(nats).await?);
        }
        done.extend(reappend::reappend(self.ctx.stream(), nats, connection, limits).await?);
        Ok(done)
    }

    /// Which other stream captures requests or one of our subjects, as a message. Our own
    /// streams do not count: they are about to get the desired subjects, which capture no requests.
    fn conflict(&self, streams: &[Stream]) -> Option<String> {
        let is_ours = |stream: &Stream| {
            self.desired
                .streams()
                .any(|object| object.kind.to_string() == stream.label())
        };
        let others: Vec<&Stream> = streams.iter().filter(|stream| !is_ours(stream)).collect();
        let mut captured = others.iter().flat_map(|stream| stream.captured_requests());
        captured.next().or_else(|| self.overlapping(&others))
    }

    /// Which of our subjects another stream captures, as a message. The server would refuse our
    /// stream and name neither.
    fn overlapping(&self, others: &[&Stream]) -> Option<String> {
        self.desired.streams().find_map(|ours| {
            let wanted = subjects(&ours.config);
            others.iter().find_map(|other| {
                let captured = subjects(&other.config);
                let captured = captured
                    .iter()
                    .find(|captured| wanted.iter().any(|wanted| overlap(wanted, captured)))?;
                Some(format!(
                    "{} takes in {captured}, which belongs to {}: narrow its subjects, or delete \
                     it",
                    other.label(),
                    ours.kind
                ))
            })
        })
    }
}

async fn ping(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("select").execute(connection).await.map(|_| ())
}

/// What a check needs from PostgreSQL.
struct DatabaseStatus {
    schema: schema::Status,
    /// `None` while the tables do not exist.
    highest_stored: Option<Seq>,
    /// Dead letters that wait to be appended again.
    waiting: i64,
}

async fn database_status(connection: &mut PgConnection) -> Result<DatabaseStatus, sqlx::Error> {
    let schema = schema::status(connection).await?;
    let highest_stored = sequence_guard::highest_stored(connection).await?;
    let waiting = if highest_stored.is_some() {
        reappend::count_waiting(connection).await?
    } else {
        0
    };
    Ok(DatabaseStatus {
        schema,
        highest_stored,
        waiting,
    })
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

/// A stream of the account, ours or not.
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

    fn captured_requests(&self) -> Vec<String> {
        captured_requests(&self.label(), &subjects(&self.config))
    }
}

/// Every stream of the account, page by page.
async fn streams(nats: &Connection) -> Result<Vec<Stream>, Error> {
    #[derive(Deserialize)]
    struct Page {
        total: usize,
        streams: Option<Vec<Stream>>,
    }
    let mut found: Vec<Stream> = Vec::new();
    loop {
        let page: Page = nats
            .api(api::STREAM_LIST, &json!({ "offset": found.len() }))
            .await?;
        let streams = page.streams.unwrap_or_default();
        let ended = streams.is_empty();
        found.extend(streams);
        if ended || found.len() >= page.total {
            return Ok(found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_server_is_recognised_by_its_version() {
        for old in ["2.14.2", "2.9.22", "1.99.99", "2.14", ""] {
            assert!(is_older(old), "{old}");
        }
        for good in ["2.14.3", "2.14.3-RC.1", "2.15.0-dev", "2.15.1", "3.0.0"] {
            assert!(!is_older(good), "{good}");
        }
    }
}
