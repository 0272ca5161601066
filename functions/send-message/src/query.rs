//! What PostgreSQL knows about ids, and whether it is still the same database.
//!
//! While this process runs, the database may be emptied or restored from a backup. Then messages
//! are missing, although the consumer has acknowledged them. So each lookup also asks for one row
//! that was there before, the *witness*. If the witness is gone, everything up to the ack floor may
//! be gone, too. This is the *gap*: its ids are looked up in the stream until the database has them
//! again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgRow};

use crate::secret::Secret;
use base::error::{Code, Error, Result};
use base::seq::Seq;
use postgres::span::query_span;
use service::ctx::Ctx;
use timeline::chat::Chat;
use timeline::highest_known_seq;

/// A lookup takes a millisecond; a database that takes this long is away.
const DEADLINE: Duration = Duration::from_millis(1_500);
/// The first attempt finds no secret, the second one the secret that the first one made.
const ATTEMPTS: usize = 3;
/// So many messages may be stored in any order: below the first missing message, that many may be
/// missing, too.
const UNORDERED: u64 = 20_000;

/// The secret; the highest sequence stored (`top`), and the highest one below the witness; whether
/// the witness is there; and the messages under some ids. One row more than messages were found.
/// Each id is an index search of its own: no other plan is possible, whatever the statistics are.
pub const LOOK_UP: &str = concat!(
    "
    select own.secret, snapshot.top, snapshot.below, snapshot.witnessed, found.*
      from (select (select secret from send_secret) as secret) as own,
           (select ",
    highest_known_seq!(),
    " as top,
                   coalesce((select max(seq) from messages where seq < $3), 0) as below,
                   $3 = 0
                   or exists (select from messages where seq = $3)
                   or exists (select from changes where seq = $3)
                   or exists (select from duplicates where seq = $3)
                   or exists (select from dead_letters where seq = $3)
                   or coalesce((select seq from swept) >= $3, false) as witnessed) as snapshot
      left join (select asked.sender, asked.id, stored.seq,
                        (select name from rooms where rooms.id = stored.room_id) as room,
                        stored.text, stored.deleted
                   from unnest($1::text[], $2::text[]) as asked (sender, id)
                  cross join lateral (
                        select seq, room_id, text, deleted from messages
                         where (messages.sender, messages.id, messages.derived)
                               = (asked.sender, asked.id, false)
                         limit 1) as stored) as found on true"
);

/// An emptied database has lost this row, too.
const INSERT_SECRET: &str = "insert into send_secret default values on conflict do nothing";

/// Sender and id.
pub type Key = (String, String);

/// A message whose id is in use.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The sequence of the first message with the id.
    pub seq: Seq,
    /// Room and text; `None` if they have to be read from the stream, which may still have the text
    /// of a deleted message.
    pub content: Option<(String, String)>,
}

impl Stored {
    /// Known by its sequence only.
    pub fn at(seq: Seq) -> Stored {
        Stored { seq, content: None }
    }
}

/// The result of a lookup.
#[derive(Debug)]
pub struct LookedUp {
    /// The messages stored under the ids.
    pub found: HashMap<Key, Stored>,
    /// The secret of this database.
    pub secret: Secret,
    /// The highest sequence stored.
    pub top: Seq,
    /// See [`State::generation`].
    pub generation: u64,
}

/// Messages that were stored once and may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// Everything up to here is stored.
    pub after: Seq,
    /// The last sequence that may be missing.
    pub through: Seq,
    /// Once this message is there again, so are the others, or the ack floor shows that they are
    /// not.
    witness: Seq,
}

/// What we know about the database.
#[derive(Debug, Clone)]
pub struct State {
    secret: Option<Secret>,
    /// Since when JetStream has remembered ids under this secret.
    pub secret_since: Instant,
    /// The highest sequence seen.
    witness: Seq,
    /// What is missing although it was stored.
    pub gap: Option<Gap>,
    /// How often the database turned out to be another one.
    pub generation: u64,
}

/// The part of [`LOOK_UP`] that is the same in every row.
struct Snapshot {
    secret: Option<Secret>,
    top: Seq,
    below: Seq,
    witnessed: bool,
}

/// The projection of the stream in PostgreSQL, as `send-message` asks it.
#[derive(Debug)]
pub struct Projection {
    ctx: Ctx<Chat>,
    state: Mutex<State>,
}

impl Projection {
    pub fn new(ctx: Ctx<Chat>) -> Projection {
        let state = State {
            secret: None,
            secret_since: Instant::now(),
            witness: Seq::ZERO,
            gap: None,
            generation: 0,
        };
        Projection {
            ctx,
            state: Mutex::new(state),
        }
    }

    /// The secret, as of the last lookup; `None` before the first one.
    pub fn secret(&self) -> Option<Secret> {
        self.lock().secret.clone()
    }

    /// What is known about the database, as of the last lookup.
    pub fn state(&self) -> State {
        self.lock().clone()
    }

    /// Looks ids up, and notices when the database is another one.
    ///
    /// # Errors
    /// 503 while the database is away.
    pub async fn look_up(&self, keys: &[Key]) -> Result<LookedUp> {
        for _ in 0..ATTEMPTS {
            let witness = {
                let state = self.lock();
                state.gap.map_or(state.witness, |gap| gap.witness)
            };
            let (snapshot, found) = self.query(keys, witness).await?;
            let Some(secret) = snapshot.secret.clone() else {
                continue;
            };
            if !snapshot.witnessed && self.lock().gap.is_none() {
                let ack_floor = self.ctx.stream().stored_through_now().await?;
                self.note_lost_witness(&snapshot, witness, ack_floor);
            }
            let generation = self.note_snapshot(&snapshot, witness, &secret);
            return Ok(LookedUp {
                found,
                secret,
                top: snapshot.top,
                generation,
            });
        }
        Err(Error::internal("table send_secret does not keep its row"))
    }

    fn note_snapshot(&self, snapshot: &Snapshot, witness: Seq, secret: &Secret) -> u64 {
        let mut state = self.lock();
        if state.secret.as_ref() != Some(secret) {
            state.secret_since = Instant::now();
            let replaced = state.secret.replace(secret.clone()).is_some();
            state.generation += u64::from(replaced);
        }
        match state.gap {
            Some(gap) if snapshot.witnessed && gap.witness == witness => {
                tracing::info!(
                    through = %gap.through,
                    "the database has the missing messages again; ids are looked up there again"
                );
                state.gap = None;
                state.witness = snapshot.top;
            }
            Some(_) => {}
            None => state.witness = state.witness.max(snapshot.top),
        }
        state.generation
    }

    /// Notes that everything up to `ack_floor` was stored, but the database has nothing above
    /// `top`, although the stream still holds `first`.
    pub fn note_missing(&self, top: Seq, first: Seq, ack_floor: Seq) {
        self.open_gap(Gap {
            after: top,
            through: ack_floor,
            witness: first,
        });
    }

    /// Notes the ack floor: once the consumer was reset to before the gap, the missing messages are
    /// delivered again, and the ack floor is right again.
    pub fn note_ack_floor(&self, ack_floor: Seq) {
        let mut state = self.lock();
        if state.gap.is_some_and(|gap| ack_floor <= gap.after) {
            tracing::info!(%ack_floor, "the messages that the database lacks are delivered again");
            state.gap = None;
            state.witness = Seq::ZERO;
        }
    }

    /// Notes the stream's first sequence: once it is above the gap, the stream no longer holds what
    /// is missing.
    pub fn note_first(&self, first: Seq) {
        let mut state = self.lock();
        if state.gap.is_some_and(|gap| first > gap.through) {
            state.gap = None;
            state.witness = Seq::ZERO;
        }
    }

    fn note_lost_witness(&self, snapshot: &Snapshot, witness: Seq, ack_floor: Seq) {
        let known = snapshot.below.min(snapshot.top).get();
        self.open_gap(Gap {
            after: Seq::new(known.saturating_sub(UNORDERED)).unwrap_or(Seq::ZERO),
            through: witness.max(ack_floor),
            witness,
        });
    }

    fn open_gap(&self, gap: Gap) {
        let mut state = self.lock();
        if state.gap.is_none() {
            tracing::warn!(
                after = %gap.after,
                through = %gap.through,
                "the database lacks messages that it had stored; until it has them again, ids are \
                 looked up in the stream. To have the messages delivered again: bootstrap.replay"
            );
            state.gap = Some(gap);
            state.generation += 1;
        }
    }

    async fn query(&self, keys: &[Key], witness: Seq) -> Result<(Snapshot, HashMap<Key, Stored>)> {
        const AWAY: &str = "the database is away, so nobody knows whether this id is new: try \
                            again, or send without an id";
        let database = self.ctx.database();
        let found = database.run_if_there(DEADLINE, async |connection| {
            select(connection, keys, witness).await
        });
        found
            .await?
            .ok_or_else(|| Error::new(Code::Unavailable, AWAY))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn select(
    connection: &mut PgConnection,
    keys: &[Key],
    witness: Seq,
) -> Result<(Snapshot, HashMap<Key, Stored>), sqlx::Error> {
    let senders: Vec<&str> = keys.iter().map(|(sender, _)| sender.as_str()).collect();
    let ids: Vec<&str> = keys.iter().map(|(_, id)| id.as_str()).collect();
    let query = sqlx::query(LOOK_UP)
        .bind(senders)
        .bind(ids)
        .bind(witness.as_i64());
    let rows = query_span("select", "messages", query.fetch_all(&mut *connection)).await?;
    let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let secret: Option<Vec<u8>> = first.try_get("secret")?;
    if secret.is_none() {
        sqlx::query(INSERT_SECRET).execute(connection).await?;
    }
    let snapshot = Snapshot {
        secret: secret.map(Secret::new),
        top: Seq::from_i64(first.try_get("top")?),
        below: Seq::from_i64(first.try_get("below")?),
        witnessed: first.try_get("witnessed")?,
    };
    let found = rows.iter().map(stored).filter_map(Result::transpose);
    Ok((snapshot, found.collect::<Result<_, sqlx::Error>>()?))
}

/// `None` for the one row of a lookup that found nothing.
fn stored(row: &PgRow) -> Result<Option<(Key, Stored)>, sqlx::Error> {
    let Some(seq) = row.try_get::<Option<i64>, _>("seq")? else {
        return Ok(None);
    };
    let key = (row.try_get("sender")?, row.try_get("id")?);
    let room: Option<String> = row.try_get("room")?;
    let text: String = row.try_get("text")?;
    let deleted: bool = row.try_get("deleted")?;
    let content = (!deleted).then(|| (room.unwrap_or_default(), text));
    let seq = Seq::from_i64(seq);
    Ok(Some((key, Stored { seq, content })))
}
