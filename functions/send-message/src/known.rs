//! Whether a sender's id was used before, also when JetStream has long forgotten it.
//!
//! JetStream remembers the ids of its duplicate window. Everything older is in the index, unless `persist-message` is
//! behind by more than that window; then what it has not stored is read from the log. That it is not behind has to be
//! looked at twice a window only: "whatever was received before this moment is stored" stays true once it was.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use runtime::{Connection, Ctx, Error, Limit, Log, LogMessage, Result, query_span};
use serde::Deserialize;
use serde_json::json;
use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::types::time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::Mutex;
use wire::{Change, Code, Incoming, Limits, Seq, jetstream};

/// The index answers in a millisecond; a database that takes this long is away.
const DEADLINE: Duration = Duration::from_millis(1_500);
/// Every subject of the log.
const EVERYTHING: &str = ">";
/// Messages read from the log at once.
const CHUNK: usize = 1_000;
const CHUNK_BYTES: usize = 4 << 20;
const CHUNK_TIME: Duration = Duration::from_secs(4);
/// Ids of unstored messages kept in memory, some 100 bytes each.
const MAX_BACKLOG: usize = 500_000;

/// Where the ids of some senders are stored, and as what.
const KNOWN: &str = "
    select sender, id, seq, (select name from rooms where rooms.id = room_id) as room, text, deleted
      from messages
     where (sender, id) in (select * from unnest($1::text[], $2::text[])) and not derived";

/// Sender and id.
pub type Key = (String, String);

/// A message that has an id already.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The first one with the id.
    pub seq: Seq,
    /// Room and text, as the index has them; `None` when they have to be read from the log, which may still have the text
    /// of a deleted one.
    pub content: Option<(String, String)>,
}

/// What is known about ids.
#[derive(Debug)]
pub struct Known {
    ctx: Ctx,
    stored_before: Mutex<Option<StoredBefore>>,
    backlog: Mutex<Backlog>,
}

/// Whatever the log received before `moment` is stored.
#[derive(Debug, Clone, Copy)]
struct StoredBefore {
    moment: Instant,
    /// JetStream's duplicate window.
    window: Duration,
}

/// Ids of what the log has above the ack floor.
#[derive(Debug, Default)]
struct Backlog {
    through: Seq,
    ids: HashMap<Key, Seq>,
}

impl Known {
    pub fn new(ctx: Ctx) -> Known {
        Known { ctx, stored_before: Mutex::default(), backlog: Mutex::default() }
    }

    /// Which of `keys` were used before. What JetStream's window still covers may be missing.
    ///
    /// # Errors
    /// 503 when it cannot be told: the database is away, or the index is too far behind.
    pub async fn find(&self, keys: &[Key]) -> Result<HashMap<Key, Stored>> {
        // In this order: what is stored by the time the index is read was stored when the floor was.
        let behind = self.is_behind().await?;
        let mut found = self.index(keys).await?;
        if behind {
            for (key, seq) in self.unstored(keys).await? {
                let first = found.entry(key).or_insert(Stored { seq, content: None });
                if seq < first.seq {
                    *first = Stored { seq, content: None };
                }
            }
        }
        Ok(found)
    }

    /// What the index has under `keys`.
    ///
    /// # Errors
    /// 503 while the database is away.
    pub async fn index(&self, keys: &[Key]) -> Result<HashMap<Key, Stored>> {
        const AWAY: &str = "the database is away, so nobody can tell whether this id is new: try again, or send without an id";
        let found = self.ctx.database().run_if_there(DEADLINE, async |connection| select(connection, keys).await).await?;
        found.ok_or_else(|| Error::new(Code::Unavailable, AWAY))
    }

    /// Whether there may be messages that JetStream has forgotten and the index does not have yet.
    async fn is_behind(&self) -> Result<bool> {
        let mut known = self.stored_before.lock().await;
        if !known.as_ref().is_some_and(StoredBefore::is_fresh) {
            *known = Some(stored_before(self.ctx.nats(), self.ctx.log()).await?);
        }
        Ok(!known.as_ref().is_some_and(StoredBefore::is_fresh))
    }

    /// Which of `keys` stand in the log above the ack floor.
    async fn unstored(&self, keys: &[Key]) -> Result<Vec<(Key, Seq)>> {
        const TOO_FAR: &str = "the index is too far behind to tell whether this id is new: try again, or send without an id";
        let (log, limits) = (self.ctx.log(), self.ctx.settings().limits());
        let floor = log.floor().await?;
        let mut backlog = self.backlog.lock().await;
        if backlog.ids.len() >= MAX_BACKLOG {
            backlog.ids.retain(|_, seq| *seq > floor);
        }
        // A request that runs out of time leaves its progress to the next.
        while backlog.ids.len() < MAX_BACKLOG {
            let from = backlog.through.max(floor).next();
            let window = log.first(EVERYTHING, from, Limit::within(CHUNK, CHUNK_BYTES, CHUNK_TIME)).await?;
            if let Some(last) = window.messages.last() {
                backlog.through = last.seq;
            }
            for message in &window.messages {
                if let Some((key, seq)) = names(message, limits) {
                    backlog.ids.entry(key).or_insert(seq);
                }
            }
            if window.complete || window.messages.is_empty() {
                return Ok(keys.iter().filter_map(|key| Some((key.clone(), *backlog.ids.get(key)?))).collect());
            }
        }
        Err(Error::new(Code::Unavailable, TOO_FAR))
    }
}

/// Which id a message of the log uses, and where it stands: its own, or, of a deletion, that of the message, which may be erased.
fn names(message: &LogMessage, limits: Limits) -> Option<(Key, Seq)> {
    if Change::is_on(&message.subject) {
        let deletion = Change::parse(&message.subject, &message.payload, message.seq, message.received_ms).ok()?.deletion;
        return (!deletion.derived).then_some(((deletion.user, deletion.id), deletion.target));
    }
    let Incoming { user, id, seq, .. } = parse(message, limits)?;
    Some(((user, id?), seq))
}

/// A message of the log as `persist-message` reads it; `None` when it becomes a dead letter.
pub fn parse(message: &LogMessage, limits: Limits) -> Option<Incoming> {
    Incoming::parse(&message.subject, message.message_id(), &message.payload, message.seq, message.received_ms, limits).ok()
}

impl StoredBefore {
    /// Half a window old at most: the other half is for what happens between this look and the append.
    fn is_fresh(&self) -> bool {
        self.moment.elapsed() < self.window / 2
    }
}

/// Asks the log up to where it is stored. Ages are differences of the server's own clock; ours may be wrong.
async fn stored_before(nats: &Connection, log: &Log) -> Result<StoredBefore> {
    let asked = Instant::now();
    let info: Info = nats.api(jetstream::STREAM_INFO, &json!({})).await.map_err(runtime::LogError::from)?;
    let now = OffsetDateTime::parse(&info.ts, &Rfc3339).map_err(Error::internal)?;
    let unstored = log.next(EVERYTHING, log.floor().await?.next()).await?;
    let age = unstored.map_or(Duration::ZERO, |first| {
        let now_ms = i64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX);
        Duration::from_millis(u64::try_from(now_ms.saturating_sub(first.message.received_ms)).unwrap_or(0))
    });
    let window = Duration::from_nanos(info.config.duplicate_window);
    // Where the clock does not reach back that far: not fresh, whatever the window.
    let moment = asked.checked_sub(age);
    Ok(StoredBefore { window: if moment.is_some() { window } else { Duration::ZERO }, moment: moment.unwrap_or(asked) })
}

#[derive(Debug, Deserialize)]
struct Info {
    config: Config,
    /// When the server answered.
    ts: String,
}

#[derive(Debug, Deserialize)]
struct Config {
    /// In nanoseconds.
    duplicate_window: u64,
}

async fn select(connection: &mut PgConnection, keys: &[Key]) -> Result<HashMap<Key, Stored>, sqlx::Error> {
    let (senders, ids): (Vec<&str>, Vec<&str>) = keys.iter().map(|(sender, id)| (sender.as_str(), id.as_str())).unzip();
    let rows = query_span("select", "messages", sqlx::query(KNOWN).bind(senders).bind(ids).fetch_all(connection)).await?;
    rows.iter().map(row).collect()
}

fn row(row: &PgRow) -> Result<(Key, Stored), sqlx::Error> {
    let room: Option<String> = row.try_get("room")?;
    let text: String = row.try_get("text")?;
    let deleted: bool = row.try_get("deleted")?;
    let content = (!deleted).then_some((room.unwrap_or_default(), text));
    Ok(((row.try_get("sender")?, row.try_get("id")?), Stored { seq: Seq::from_i64(row.try_get("seq")?), content }))
}
