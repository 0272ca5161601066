//! What PostgreSQL says about ids, and whether it is still the database it was.
//!
//! A database may be emptied, or come back from a backup, while this process lives. Then what was stored is not, whatever
//! the ack floor says. So each look-up also asks for one row that was there before, the *witness*. When it is gone, so may be
//! everything up to the floor: that is the *gap*, and its ids are read from the log until it is filled again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgRow};

use crate::known::{Key, Stored};
use crate::secret::Secret;
use base::error::{Code, Error, Result};
use base::seq::Seq;
use postgres::span::query_span;
use service::ctx::Ctx;
use timeline::chat::Chat;

/// The index answers in a millisecond; a database that takes this long is away.
const DEADLINE: Duration = Duration::from_millis(1_500);
/// The first one finds no secret, the second one the one it made.
const ATTEMPTS: usize = 3;
/// As many messages may be stored in any order: so far below the first one that is missing, others may be missing, too.
const UNORDERED: u64 = 20_000;

/// The secret; the highest sequence stored, and the highest one below the witness; whether the witness is there; and where
/// the ids of some senders are stored, and as what. One row more than were found. Each id is a search of its own: no other plan
/// is possible, whatever the statistics say.
pub const LOOK: &str = "
    select own.secret, standing.top, standing.below, standing.witnessed, found.*
      from (select (select secret from send_secret) as secret) as own,
           (select greatest((select max(seq) from messages), (select max(seq) from dead_letters), (select max(seq) from changes),
                            (select max(seq) from duplicates), (select seq from swept), 0) as top,
                   coalesce((select max(seq) from messages where seq < $3), 0) as below,
                   $3 = 0 or exists (select from messages where seq = $3) or exists (select from changes where seq = $3)
                   or exists (select from duplicates where seq = $3) or exists (select from dead_letters where seq = $3)
                   or coalesce((select seq from swept) >= $3, false) as witnessed) as standing
      left join (select asked.sender, asked.id, stored.seq, (select name from rooms where rooms.id = stored.room_id) as room,
                        stored.text, stored.deleted
                   from unnest($1::text[], $2::text[]) as asked (sender, id)
                  cross join lateral (select seq, room_id, text, deleted from messages
                                       where (messages.sender, messages.id, messages.derived) = (asked.sender, asked.id, false)
                                       limit 1) as stored) as found on true";

/// The row is gone with the rest of an emptied database.
const NEW_SECRET: &str = "insert into send_secret default values on conflict do nothing";

/// What one look says.
#[derive(Debug)]
pub struct Looked {
    /// What is stored under the ids that were asked for.
    pub found: HashMap<Key, Stored>,
    /// Of the database that was looked into.
    pub secret: Secret,
    /// The highest sequence stored.
    pub top: Seq,
    /// How often it turned out not to be the database it was.
    pub generation: u64,
}

/// What was stored and is not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// Everything up to here is stored.
    pub after: Seq,
    /// The last one that may be missing.
    pub through: Seq,
    /// When this one is there again, so are the others, or the ack floor says that they are not.
    witness: Seq,
}

/// PostgreSQL, as `send-message` sees it.
#[derive(Debug)]
pub struct Index {
    ctx: Ctx<Chat>,
    state: Mutex<State>,
}

/// How the database stands.
#[derive(Debug, Clone)]
pub struct State {
    secret: Option<Secret>,
    /// JetStream knows ids under this secret since then.
    pub secret_since: Instant,
    /// The highest sequence seen.
    witness: Seq,
    /// What is missing although it was stored.
    pub gap: Option<Gap>,
    /// How often it turned out not to be the database it was.
    pub generation: u64,
}

/// A row of [`LOOK`], as far as it is the same in all of them.
struct Standing {
    secret: Option<Secret>,
    top: Seq,
    below: Seq,
    witnessed: bool,
}

impl Index {
    pub fn new(ctx: Ctx<Chat>) -> Index {
        let state = State {
            secret: None,
            secret_since: Instant::now(),
            witness: Seq::ZERO,
            gap: None,
            generation: 0,
        };
        Index {
            ctx,
            state: Mutex::new(state),
        }
    }

    /// The secret of the database that was looked into last; `None` before the first look.
    pub fn secret(&self) -> Option<Secret> {
        self.lock().secret.clone()
    }

    /// How the database stands, as it was when it was looked into last.
    pub fn standing(&self) -> State {
        self.lock().clone()
    }

    /// What is stored under `keys`; notices that the database is another one.
    ///
    /// # Errors
    /// 503 while the database is away.
    pub async fn look(&self, keys: &[Key]) -> Result<Looked> {
        for _ in 0..ATTEMPTS {
            let witness = {
                let state = self.lock();
                state.gap.map_or(state.witness, |gap| gap.witness)
            };
            let (standing, found) = self.ask(keys, witness).await?;
            let Some(secret) = standing.secret.clone() else {
                continue;
            };
            if !standing.witnessed && self.lock().gap.is_none() {
                let floor = self.ctx.stream().stored_through_now().await?;
                self.lost(&standing, witness, floor);
            }
            let mut state = self.lock();
            if state.secret.as_ref() != Some(&secret) {
                state.secret_since = Instant::now();
                state.generation += u64::from(state.secret.replace(secret.clone()).is_some());
            }
            match state.gap {
                Some(gap) if standing.witnessed && gap.witness == witness => {
                    tracing::info!(through = %gap.through, "the database has again what was missing");
                    state.gap = None;
                    state.witness = standing.top;
                }
                Some(_) => {}
                None => state.witness = state.witness.max(standing.top),
            }
            return Ok(Looked {
                found,
                secret,
                top: standing.top,
                generation: state.generation,
            });
        }
        Err(Error::internal("table send_secret does not keep its row"))
    }

    /// The log was stored up to `floor`, and the database has nothing above `top`, although the log still has `first`.
    pub fn missing(&self, top: Seq, first: Seq, floor: Seq) {
        self.open(Gap {
            after: top,
            through: floor,
            witness: first,
        });
    }

    /// What was missing is to be stored again: the ack floor says so, and from now on it is right.
    pub fn is_replayed(&self, floor: Seq) {
        let mut state = self.lock();
        if state.gap.is_some_and(|gap| floor <= gap.after) {
            tracing::info!(%floor, "what the database lacks is delivered again");
            state.gap = None;
            state.witness = Seq::ZERO;
        }
    }

    /// The log does not hold any more what is missing.
    pub fn is_trimmed(&self, first: Seq) {
        let mut state = self.lock();
        if state.gap.is_some_and(|gap| first > gap.through) {
            state.gap = None;
            state.witness = Seq::ZERO;
        }
    }

    fn lost(&self, standing: &Standing, witness: Seq, floor: Seq) {
        let after = standing
            .below
            .min(standing.top)
            .get()
            .saturating_sub(UNORDERED);
        self.open(Gap {
            after: Seq::new(after).unwrap_or(Seq::ZERO),
            through: witness.max(floor),
            witness,
        });
    }

    fn open(&self, gap: Gap) {
        let mut state = self.lock();
        if state.gap.is_none() {
            tracing::warn!(
                after = %gap.after,
                through = %gap.through,
                "the database lacks messages it had stored: ids are looked up in the stream; have bootstrap.replay deliver them again"
            );
            state.gap = Some(gap);
            state.generation += 1;
        }
    }

    async fn ask(&self, keys: &[Key], witness: Seq) -> Result<(Standing, HashMap<Key, Stored>)> {
        const AWAY: &str = "the database is away, so nobody can tell whether this id is new: try again, or send without an id";
        let looked = self
            .ctx
            .database()
            .run_if_there(DEADLINE, async |connection| {
                select(connection, keys, witness).await
            })
            .await?;
        looked.ok_or_else(|| Error::new(Code::Unavailable, AWAY))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn select(
    connection: &mut PgConnection,
    keys: &[Key],
    witness: Seq,
) -> Result<(Standing, HashMap<Key, Stored>), sqlx::Error> {
    let (senders, ids): (Vec<&str>, Vec<&str>) = keys
        .iter()
        .map(|(sender, id)| (sender.as_str(), id.as_str()))
        .unzip();
    let query = sqlx::query(LOOK)
        .bind(senders)
        .bind(ids)
        .bind(witness.as_i64());
    let rows = query_span("select", "messages", query.fetch_all(&mut *connection)).await?;
    let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let secret: Option<Vec<u8>> = first.try_get("secret")?;
    if secret.is_none() {
        sqlx::query(NEW_SECRET).execute(connection).await?;
    }
    let standing = Standing {
        secret: secret.map(Secret::new),
        top: Seq::from_i64(first.try_get("top")?),
        below: Seq::from_i64(first.try_get("below")?),
        witnessed: first.try_get("witnessed")?,
    };
    let found = rows
        .iter()
        .map(stored)
        .filter_map(Result::transpose)
        .collect::<Result<_, sqlx::Error>>()?;
    Ok((standing, found))
}

/// `None` in the one row of a look-up that found nothing.
fn stored(row: &PgRow) -> Result<Option<(Key, Stored)>, sqlx::Error> {
    let Some(seq) = row.try_get::<Option<i64>, _>("seq")? else {
        return Ok(None);
    };
    let room: Option<String> = row.try_get("room")?;
    let text: String = row.try_get("text")?;
    let deleted: bool = row.try_get("deleted")?;
    let content = (!deleted).then_some((room.unwrap_or_default(), text));
    Ok(Some((
        (row.try_get("sender")?, row.try_get("id")?),
        Stored {
            seq: Seq::from_i64(seq),
            content,
        },
    )))
}
