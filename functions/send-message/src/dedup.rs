//! The deduplication lookup: was a sender's id used before, also when JetStream has long forgotten
//! it?
//!
//! JetStream remembers the ids of its duplicate window. Everything older is in PostgreSQL, unless
//! `persist-message` is behind by more than that window; then the ids of messages that are not
//! stored yet are read from the stream. Whether it is behind has to be checked only twice per
//! window, because "everything received before this moment is stored" stays true.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::query::{Gap, Key, Projection, Stored};
use crate::secret::Secret;
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::info::StreamInfo;
use jetstream::stream::{EVERY_SUBJECT, Limit, StreamError, StreamMessage};
use protocol::change::Change;
use protocol::message::Limits;
use protocol::subject::STREAM;
use service::ctx::Ctx;
use timeline::chat::Chat;
use timeline::message::parse;

/// Read from the stream at once.
const CHUNK: usize = 1_000;
const CHUNK_BYTES: usize = 4 << 20;
const CHUNK_TIME: Duration = Duration::from_secs(4);
/// Ids of unstored messages kept in memory, some 100 bytes each.
const MAX_BACKLOG: usize = 500_000;

const TOO_FAR_BEHIND: &str = "the database is too far behind the stream to know whether this id is \
                              new: try again, or send without an id";

/// Looks ids up.
#[derive(Debug)]
pub struct Dedup {
    ctx: Ctx<Chat>,
    projection: Projection,
    stored_before: Mutex<Option<StoredBefore>>,
    backlog: Mutex<Backlog>,
}

/// Everything the stream received before `moment` is stored.
#[derive(Debug, Clone, Copy)]
struct StoredBefore {
    moment: Instant,
    /// JetStream's duplicate window.
    window: Duration,
    /// Of the database that was asked.
    generation: u64,
    /// Since when JetStream has remembered ids under the secret of that database.
    secret_since: Instant,
}

/// Ids of the stream's messages above the ack floor.
#[derive(Debug, Default)]
struct Backlog {
    through: Seq,
    ids: HashMap<Key, Seq>,
    /// Of the database for which they were read.
    generation: u64,
}

/// The result of a lookup.
#[derive(Debug)]
pub struct Found {
    /// The ids that were used before.
    pub ids: HashMap<Key, Stored>,
    /// JetStream remembers the other ids under this secret, if they were used within its window.
    pub secret: Secret,
}

impl Dedup {
    pub fn new(ctx: Ctx<Chat>) -> Dedup {
        Dedup {
            projection: Projection::new(ctx.clone()),
            ctx,
            stored_before: Mutex::default(),
            backlog: Mutex::default(),
        }
    }

    /// Which of `keys` were used before. Ids that JetStream's window covers may be missing.
    ///
    /// # Errors
    /// 503 when that cannot be known: the database is away, or too far behind.
    pub async fn find(&self, keys: &[Key]) -> Result<Found> {
        // In this order: what was stored at the ack floor is still there when the database is
        // asked.
        let stored_before = self.stored_before().await?;
        let looked_up = self.projection.look_up(keys).await?;
        let mut ids = looked_up.found;
        if !stored_before.is_fresh() || stored_before.generation != looked_up.generation {
            for (key, seq) in self.find_unstored(keys, looked_up.generation).await? {
                let first = ids.entry(key).or_insert(Stored::at(seq));
                if seq < first.seq {
                    *first = Stored::at(seq);
                }
            }
        }
        Ok(Found {
            ids,
            secret: looked_up.secret,
        })
    }

    /// What PostgreSQL has under `keys`.
    ///
    /// # Errors
    /// 503 while the database is away.
    pub async fn find_in_projection(&self, keys: &[Key]) -> Result<HashMap<Key, Stored>> {
        Ok(self.projection.look_up(keys).await?.found)
    }

    /// The secret of the database, as of the last lookup.
    pub fn secret(&self) -> Option<Secret> {
        self.projection.secret()
    }

    /// Up to when everything is stored. If the result is not fresh, there may be messages that
    /// JetStream has forgotten and PostgreSQL does not have yet.
    async fn stored_before(&self) -> Result<StoredBefore> {
        let mut cached = self.stored_before.lock().await;
        match *cached {
            Some(known) if known.is_fresh() => Ok(known),
            _ => Ok(*cached.insert(self.fetch_stored_before().await?)),
        }
    }

    async fn fetch_stored_before(&self) -> Result<StoredBefore> {
        let stream = self.ctx.stream();
        let asked = Instant::now();
        let info = StreamInfo::fetch(self.ctx.nats(), STREAM)
            .await
            .map_err(StreamError::from)?;
        let now_ms = info.answered_ms().map_err(Error::internal)?;
        // In this order: what was stored at the ack floor is there, unless the database lost it.
        let ack_floor = stream.stored_through().await?;
        self.projection.note_first(info.state.first());
        self.projection.note_ack_floor(ack_floor);
        let top = self.projection.look_up(&[]).await?.top;
        if top < ack_floor
            && let Some(first) = stream.next(EVERY_SUBJECT, top.next()).await?
            && first.message.seq <= ack_floor
        {
            self.projection
                .note_missing(top, first.message.seq, ack_floor);
        }
        let state = self.projection.state();
        let stored_through = stored_through(ack_floor, state.gap);
        let unstored = stream.next(EVERY_SUBJECT, stored_through.next()).await?;
        // Both times are the server's; our clock may be wrong.
        let age = unstored.map_or(Duration::ZERO, |first| {
            let age_ms = now_ms.saturating_sub(first.message.received_ms);
            Duration::from_millis(u64::try_from(age_ms).unwrap_or(0))
        });
        let window = Duration::from_nanos(info.config.duplicate_window);
        // Where the monotonic clock does not reach back that far: not fresh, whatever the window
        // is.
        let (moment, window) = match asked.checked_sub(age) {
            Some(moment) => (moment, window),
            None => (asked, Duration::ZERO),
        };
        let state = self.projection.state();
        Ok(StoredBefore {
            moment,
            window,
            generation: state.generation,
            secret_since: state.secret_since,
        })
    }

    /// Which of `keys` the stream has above what is stored.
    async fn find_unstored(&self, keys: &[Key], generation: u64) -> Result<Vec<(Key, Seq)>> {
        let stream = self.ctx.stream();
        let limits = self.ctx.limits();
        let ack_floor = stream.stored_through().await?;
        let gap = self.projection.state().gap;
        let stored_through = stored_through(ack_floor, gap);
        let mut backlog = self.backlog.lock().await;
        if backlog.generation != generation {
            *backlog = Backlog {
                generation,
                ..Backlog::default()
            };
        }
        if backlog.ids.len() >= MAX_BACKLOG {
            let in_gap = |seq: Seq| gap.is_some_and(|gap| seq <= gap.through);
            backlog
                .ids
                .retain(|_, seq| *seq > ack_floor || in_gap(*seq));
        }
        // A request that runs out of time leaves what it has read to the next one.
        while backlog.ids.len() < MAX_BACKLOG {
            let from = backlog.through.max(stored_through).next();
            let limit = Limit::within(CHUNK, CHUNK_BYTES, CHUNK_TIME);
            let window = stream.first(EVERY_SUBJECT, from, limit).await?;
            if let Some(last) = window.messages.last() {
                backlog.through = last.seq;
            }
            for message in &window.messages {
                if let Some((key, seq)) = used_id(message, limits) {
                    backlog.ids.entry(key).or_insert(seq);
                }
            }
            if window.complete || window.messages.is_empty() {
                let found = keys.iter().filter_map(|key| {
                    let seq = backlog.ids.get(key)?;
                    Some((key.clone(), *seq))
                });
                return Ok(found.collect());
            }
        }
        Err(Error::new(Code::Unavailable, TOO_FAR_BEHIND))
    }
}

/// The ack floor, unless the database lost messages that it had stored.
fn stored_through(ack_floor: Seq, gap: Option<Gap>) -> Seq {
    gap.map_or(ack_floor, |gap| ack_floor.min(gap.after))
}

/// The id that a message of the stream uses, and the sequence of the message it belongs to. A
/// deletion uses the id of the deleted message, which may be erased.
fn used_id(message: &StreamMessage, limits: Limits) -> Option<(Key, Seq)> {
    if !Change::is_change_subject(&message.subject) {
        let incoming = parse(message, limits).ok()?;
        return Some(((incoming.user, incoming.id?), incoming.seq));
    }
    let change = Change::parse(
        &message.subject,
        &message.payload,
        message.seq,
        message.received_ms,
    );
    let deletion = change.ok()?.deletion;
    (!deletion.derived).then_some(((deletion.user, deletion.id), deletion.target))
}

impl StoredBefore {
    /// At most half a window old: the other half is for the time between this lookup and the
    /// append.
    fn is_fresh(&self) -> bool {
        self.moment >= self.secret_since && self.moment.elapsed() < self.window / 2
    }
}
