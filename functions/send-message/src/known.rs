//! Whether a sender's id was used before, also when JetStream has long forgotten it.
//!
//! JetStream remembers the ids of its duplicate window. Everything older is in the index, unless `persist-message` is
//! behind by more than that window; then what it has not stored is read from the log. That it is not behind has to be
//! looked at twice a window only: "whatever was received before this moment is stored" stays true once it was.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;
use sqlx::types::time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::Mutex;

use crate::index::Index;
use crate::secret::Secret;
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::stream::{Limit, StreamMessage};
use protocol::change::Change;
use protocol::js_api;
use protocol::message::{Incoming, Limits};
use service::ctx::Ctx;
use timeline::chat::Chat;
use timeline::message::parse;

/// Every subject of the log.
const EVERYTHING: &str = ">";
/// Messages read from the log at once.
const CHUNK: usize = 1_000;
const CHUNK_BYTES: usize = 4 << 20;
const CHUNK_TIME: Duration = Duration::from_secs(4);
/// Ids of unstored messages kept in memory, some 100 bytes each.
const MAX_BACKLOG: usize = 500_000;

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
    ctx: Ctx<Chat>,
    index: Index,
    stored_before: Mutex<Option<StoredBefore>>,
    backlog: Mutex<Backlog>,
}

/// Whatever the log received before `moment` is stored.
#[derive(Debug, Clone, Copy)]
struct StoredBefore {
    moment: Instant,
    /// JetStream's duplicate window.
    window: Duration,
    /// Of the database that was looked into.
    generation: u64,
    /// JetStream knows what came since then by the secret of that database.
    secret_since: Instant,
}

/// Ids of what the log has above the ack floor.
#[derive(Debug, Default)]
struct Backlog {
    through: Seq,
    ids: HashMap<Key, Seq>,
    /// Of the database for which they were read.
    generation: u64,
}

/// What was found out about ids.
#[derive(Debug)]
pub struct Found {
    /// Which of them were used before.
    pub ids: HashMap<Key, Stored>,
    /// By this secret JetStream knows what else was used.
    pub secret: Secret,
}

impl Known {
    pub fn new(ctx: Ctx<Chat>) -> Known {
        Known {
            index: Index::new(ctx.clone()),
            ctx,
            stored_before: Mutex::default(),
            backlog: Mutex::default(),
        }
    }

    /// Which of `keys` were used before. What JetStream's window still covers may be missing.
    ///
    /// # Errors
    /// 503 when it cannot be told: the database is away, or the index is too far behind.
    pub async fn find(&self, keys: &[Key]) -> Result<Found> {
        // In this order: what is stored by the time the index is read was stored when the floor was.
        let stored_before = self.stored_before().await?;
        let looked = self.index.look(keys).await?;
        let mut ids = looked.found;
        if !stored_before.is_fresh() || stored_before.generation != looked.generation {
            for (key, seq) in self.unstored(keys, looked.generation).await? {
                let first = ids.entry(key).or_insert(Stored { seq, content: None });
                if seq < first.seq {
                    *first = Stored { seq, content: None };
                }
            }
        }
        Ok(Found {
            ids,
            secret: looked.secret,
        })
    }

    /// What the index has under `keys`.
    ///
    /// # Errors
    /// 503 while the database is away.
    pub async fn index(&self, keys: &[Key]) -> Result<HashMap<Key, Stored>> {
        Ok(self.index.look(keys).await?.found)
    }

    /// The secret of the database, as it was when it was looked into last.
    pub fn secret(&self) -> Option<Secret> {
        self.index.secret()
    }

    /// Up to when everything is stored. Not fresh: there may be messages that JetStream has forgotten and the index does
    /// not have.
    async fn stored_before(&self) -> Result<StoredBefore> {
        let mut known = self.stored_before.lock().await;
        match *known {
            Some(known) if known.is_fresh() => Ok(known),
            _ => Ok(*known.insert(self.look_at_floor().await?)),
        }
    }

    /// Asks the log up to where it is stored. Ages are differences of the server's own clock; ours may be wrong.
    async fn look_at_floor(&self) -> Result<StoredBefore> {
        let (nats, log) = (self.ctx.nats(), self.ctx.stream());
        let asked = Instant::now();
        let info: Info = nats
            .api(js_api::STREAM_INFO, &json!({}))
            .await
            .map_err(jetstream::stream::StreamError::from)?;
        let now = OffsetDateTime::parse(&info.ts, &Rfc3339).map_err(Error::internal)?;
        // In this order: what was stored when the floor was is there, unless the database lost it.
        let floor = log.stored_through().await?;
        self.index
            .is_trimmed(Seq::new(info.state.first_seq).unwrap_or(Seq::MAX));
        self.index.is_replayed(floor);
        let top = self.index.look(&[]).await?.top;
        if top < floor
            && let Some(first) = log.next(EVERYTHING, top.next()).await?
            && first.message.seq <= floor
        {
            self.index.missing(top, first.message.seq, floor);
        }
        let unstored = log
            .next(EVERYTHING, self.stored_through(floor).next())
            .await?;
        let age = unstored.map_or(Duration::ZERO, |first| {
            let now_ms = i64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX);
            Duration::from_millis(
                u64::try_from(now_ms.saturating_sub(first.message.received_ms)).unwrap_or(0),
            )
        });
        let window = Duration::from_nanos(info.config.duplicate_window);
        // Where the clock does not reach back that far: not fresh, whatever the window.
        let (moment, window) = asked
            .checked_sub(age)
            .map_or((asked, Duration::ZERO), |moment| (moment, window));
        let standing = self.index.standing();
        Ok(StoredBefore {
            moment,
            window,
            generation: standing.generation,
            secret_since: standing.secret_since,
        })
    }

    /// The ack floor, unless the database lost what it had stored.
    fn stored_through(&self, floor: Seq) -> Seq {
        self.index
            .standing()
            .gap
            .map_or(floor, |gap| floor.min(gap.after))
    }

    /// Which of `keys` stand in the log above what is stored.
    async fn unstored(&self, keys: &[Key], generation: u64) -> Result<Vec<(Key, Seq)>> {
        const TOO_FAR: &str = "the index is too far behind to tell whether this id is new: try again, or send without an id";
        let (log, limits) = (self.ctx.stream(), self.ctx.limits());
        let floor = log.stored_through().await?;
        let (stored_through, gap) = (self.stored_through(floor), self.index.standing().gap);
        let mut backlog = self.backlog.lock().await;
        if backlog.generation != generation {
            *backlog = Backlog {
                generation,
                ..Backlog::default()
            };
        }
        if backlog.ids.len() >= MAX_BACKLOG {
            backlog
                .ids
                .retain(|_, seq| *seq > floor || gap.is_some_and(|gap| *seq <= gap.through));
        }
        // A request that runs out of time leaves its progress to the next.
        while backlog.ids.len() < MAX_BACKLOG {
            let from = backlog.through.max(stored_through).next();
            let window = log
                .first(
                    EVERYTHING,
                    from,
                    Limit::within(CHUNK, CHUNK_BYTES, CHUNK_TIME),
                )
                .await?;
            if let Some(last) = window.messages.last() {
                backlog.through = last.seq;
            }
            for message in &window.messages {
                if let Some((key, seq)) = names(message, limits) {
                    backlog.ids.entry(key).or_insert(seq);
                }
            }
            if window.complete || window.messages.is_empty() {
                return Ok(keys
                    .iter()
                    .filter_map(|key| Some((key.clone(), *backlog.ids.get(key)?)))
                    .collect());
            }
        }
        Err(Error::new(Code::Unavailable, TOO_FAR))
    }
}

/// Which id a message of the log uses, and where it stands: its own, or, of a deletion, that of the message, which may be erased.
fn names(message: &StreamMessage, limits: Limits) -> Option<(Key, Seq)> {
    if Change::is_change_subject(&message.subject) {
        let deletion = Change::parse(
            &message.subject,
            &message.payload,
            message.seq,
            message.received_ms,
        )
        .ok()?
        .deletion;
        return (!deletion.derived).then_some(((deletion.user, deletion.id), deletion.target));
    }
    let Incoming { user, id, seq, .. } = parse(message, limits).ok()?;
    Some(((user, id?), seq))
}

impl StoredBefore {
    /// Half a window old at most: the other half is for what happens between this look and the append.
    fn is_fresh(&self) -> bool {
        self.moment >= self.secret_since && self.moment.elapsed() < self.window / 2
    }
}

#[derive(Debug, Deserialize)]
struct Info {
    config: Config,
    state: State,
    /// When the server answered.
    ts: String,
}

#[derive(Debug, Deserialize)]
struct Config {
    /// In nanoseconds.
    duplicate_window: u64,
}

#[derive(Debug, Deserialize)]
struct State {
    first_seq: u64,
}
