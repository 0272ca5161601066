//! Sweeping what has expired from the index, in small steps.
//!
//! Readers leave expired messages out by themselves; this gives the space back. Rows are found by their position, which is the
//! order of receipt: an index on the time would cost every message that is stored.

use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;

use crate::alone::{alone, refused};
use crate::moves::Moves;
use crate::swept::Swept;
use crate::{Own, clock};
use base::error::Result;
use base::seq::Seq;
use protocol::retention::{DEFAULT_ROOMS, DIRECT_ROOMS};
use service::ctx::Ctx;
use timeline::message::parse_of_any_length;

/// The advisory lock of the one copy that sweeps; any number nobody else uses: "sweep" in ASCII.
const LOCK: i64 = 0x0073_7765_6570;
/// Rows looked at, and deleted, in one transaction: some 50 ms.
const STEP: usize = 5_000;
/// After each step, so many times as long as it took: sweeping takes a tenth of one connection's time, however much
/// there is to sweep, and storing goes on beside it.
const PAUSES: u32 = 9;
/// Walks begin anew after this: for rooms whose days were changed, and for what a replay stored again. Marks are walked this often.
const REWALK: Duration = Duration::from_secs(3_600);

const NOTE_DEFAULT: &str = "
    insert into retention (room, days) values ('*', $1)
    on conflict (room) do update set days = excluded.days where retention.days is distinct from excluded.days";

/// The rooms with days of their own: few, and each is walked by itself.
const ROOMS: &str = "
    select room from retention where room not in ('*', 'dm.*') and days is not null order by room";

/// Some rows behind a position: whether their room has let them expire, and whether the walk goes on behind them. The limit is
/// part of the text, so that the plan is one for few rows.
pub const WALK: &str = "
    with walked as materialized (
        select seq, room_id, received_at from messages where seq > $1 order by seq limit 5000
    ), due as materialized (
        select id, cutoff(name) as at from rooms where id in (select room_id from walked)
    )
    select seq, received_at <= at as expired, received_at <= (select cutoff($2)) as within
      from walked join due on due.id = walked.room_id order by seq";

/// Of one room.
pub const WALK_ROOM: &str = "
    with walked as materialized (
        select seq, received_at from messages
         where room_id = (select id from rooms where name = $2) and seq > $1 order by seq limit 5000
    )
    select seq, received_at <= (select cutoff($2)) as expired, received_at <= (select cutoff($2)) as within
      from walked order by seq";

/// As far as anything may have expired: for counting, since what is not deleted would be met by several walks.
pub const COUNT: &str = "
    with walked as materialized (
        select seq, room_id, received_at from messages where seq > $1 order by seq limit 5000
    ), due as materialized (
        select id, cutoff(name) as at from rooms where id in (select room_id from walked)
    )
    select seq, received_at <= at as expired, received_at <= (select max(cutoff(room)) from retention where $2 <> '') as within
      from walked join due on due.id = walked.room_id order by seq";

/// Deletions whose message went before them, or never came.
pub const CHANGES: &str = "
    with walked as materialized (
        select seq, room_id, received_at from changes where seq > $1 order by seq limit 5000
    ), due as materialized (
        select id, cutoff(name) as at from rooms where id in (select room_id from walked)
    )
    select seq, received_at <= at as expired, received_at <= (select cutoff($2)) as within
      from walked join due on due.id = walked.room_id order by seq";

/// Messages with their deletions, and what is known of copies in the log: those go there, too, or a replay would store one
/// of them as if it were new.
pub const DELETE: &str = "
    with gone as (
        delete from messages where seq = any($1) returning seq, room_id, sender, id, derived, received_at
    ), changed as (
        delete from changes using gone
         where changes.target = gone.seq and (changes.sender, changes.id) = (gone.sender, gone.id) returning changes.seq
    ), copies as (
        delete from duplicates using gone
         where (duplicates.sender, duplicates.id) = (gone.sender, gone.id) and not gone.derived
        returning duplicates.seq, duplicates.sender, duplicates.id
    ), noted as (
        update swept set seq = greatest(swept.seq, (select max(gone.seq) from gone), (select max(changed.seq) from changed),
                                        (select max(copies.seq) from copies))
    )
    select (select count(*) from gone), array(select distinct room_id from gone),
           (select floor(extract(epoch from max(received_at)) * 1000)::bigint from gone),
           array(select seq from copies order by seq), array(select sender from copies order by seq),
           array(select id from copies order by seq)";

pub const DELETE_CHANGES: &str = "
    with gone as (
        delete from changes where seq = any($1) returning seq, room_id, received_at
    ), noted as (
        update swept set seq = greatest(swept.seq, (select max(gone.seq) from gone))
    )
    select count(*), array(select distinct room_id from gone), floor(extract(epoch from max(received_at)) * 1000)::bigint,
           '{}'::bigint[], '{}'::text[], '{}'::text[]
      from gone";

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Messages.
    pub expired: u64,
    /// Moves of marks.
    pub moves: u64,
    /// Nothing that has expired is left.
    pub done: bool,
}

/// Which rows are walked.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Walk {
    /// All, as far as rooms without days of their own reach.
    Rooms,
    /// All, as far as direct messages without days of their own reach.
    Direct,
    /// A room with days of its own.
    Room(String),
    /// Deletions.
    Changes,
    /// All, without deleting any.
    Count,
}

impl Walk {
    const fn sql(&self) -> (&'static str, &'static str) {
        match self {
            Walk::Rooms | Walk::Direct => (WALK, DELETE),
            Walk::Room(_) => (WALK_ROOM, DELETE),
            Walk::Changes => (CHANGES, DELETE_CHANGES),
            Walk::Count => (COUNT, DELETE),
        }
    }

    /// Whose cutoff ends it.
    fn room(&self) -> &str {
        match self {
            Walk::Rooms | Walk::Changes | Walk::Count => DEFAULT_ROOMS,
            Walk::Direct => DIRECT_ROOMS,
            Walk::Room(room) => room,
        }
    }
}

/// How far sweeping has come.
#[derive(Debug, Default)]
pub struct Sweep {
    /// What is to be walked in this pass, last one first.
    left: Vec<Walk>,
    /// Where the walk under way goes on.
    after: Option<Seq>,
    /// Then the moves of marks, if it is time to.
    moves: Option<Moves>,
    /// Where the walks over everything go on in the next pass: what they leave behind belongs to rooms that keep it longer.
    rooms: Seq,
    direct: Seq,
    since: Option<Instant>,
    /// What the pass took, until the log has it.
    swept: Swept,
}

impl Sweep {
    /// Sweeps the next rows, or in a dry run counts them. `None` while another copy is at it. After the last step of a pass, the
    /// next one begins a new pass.
    ///
    /// # Errors
    /// A server does not answer; the step is as if it had not been.
    pub async fn step(&mut self, ctx: &Ctx<Own>, dry_run: bool) -> Result<Option<Step>> {
        if self.left.is_empty() && self.moves.is_none() {
            let Some(rooms) = alone(ctx, LOCK, rooms).await? else {
                return Ok(None);
            };
            self.begin(rooms, dry_run);
        }
        let Some(walk) = self.left.last().cloned() else {
            return self.step_moves(ctx, dry_run).await;
        };
        let after = self.after.unwrap_or(match walk {
            Walk::Rooms => self.rooms,
            Walk::Direct => self.direct,
            Walk::Room(_) | Walk::Changes | Walk::Count => Seq::ZERO,
        });
        let stepped = alone(ctx, LOCK, async |connection| {
            clock::agree(ctx, connection).await?;
            let rows = look(connection, &walk, after).await?;
            let due: Vec<i64> = rows.iter().filter(|row| row.1).map(|row| row.0).collect();
            let gone = match &due[..] {
                [] => Gone::default(),
                due if dry_run => Gone {
                    count: due.len() as u64,
                    ..Gone::default()
                },
                due => delete(ctx, connection, &walk, due).await?,
            };
            Ok((rows, gone))
        });
        let Some((rows, gone)) = stepped.await? else {
            return Ok(None);
        };
        match walk {
            _ if dry_run => {}
            Walk::Changes => self
                .swept
                .note_deletions(gone.count, &gone.rooms, gone.until_ms),
            _ => self
                .swept
                .note_messages(gone.count, &gone.rooms, gone.until_ms),
        }
        // The clock may have gone back once: a single row from the future ends nothing.
        let within = rows
            .iter()
            .rev()
            .find(|row| row.2)
            .map(|row| Seq::from_i64(row.0));
        let goes_on = within.filter(|_| rows.len() == STEP);
        if let Some(reached) = within {
            match walk {
                Walk::Rooms => self.rooms = reached,
                Walk::Direct => self.direct = reached,
                Walk::Room(_) | Walk::Changes | Walk::Count => {}
            }
        }
        self.after = goes_on;
        if goes_on.is_none() {
            self.left.pop();
        }
        let (expired, done) = (
            if walk == Walk::Changes { 0 } else { gone.count },
            self.left.is_empty() && self.moves.is_none(),
        );
        self.swept.tell(done);
        Ok(Some(Step {
            expired,
            moves: 0,
            done,
        }))
    }

    async fn step_moves(&mut self, ctx: &Ctx<Own>, dry_run: bool) -> Result<Option<Step>> {
        let mut walk = self.moves.clone().unwrap_or_default();
        let stepped = alone(ctx, LOCK, async |connection| {
            clock::agree(ctx, connection).await?;
            walk.step(connection, dry_run).await
        });
        let Some((moves, done)) = stepped.await? else {
            return Ok(None);
        };
        self.moves = Some(walk).filter(|_| !done);
        if !dry_run {
            self.swept.note_moves(moves);
            self.swept.tell(done);
        }
        Ok(Some(Step {
            expired: 0,
            moves,
            done,
        }))
    }

    fn begin(&mut self, rooms: Vec<String>, dry_run: bool) {
        if dry_run {
            self.left.push(Walk::Count);
            self.moves = Some(Moves::default());
            return;
        }
        if self.since.is_none_or(|since| since.elapsed() > REWALK) {
            (self.rooms, self.direct, self.since) = (Seq::ZERO, Seq::ZERO, Some(Instant::now()));
            self.moves = Some(Moves::default());
        }
        self.left.extend([Walk::Changes, Walk::Direct, Walk::Rooms]);
        self.left.extend(rooms.into_iter().map(Walk::Room));
    }
}

/// What a step has earned itself.
pub fn pause_after(took: Duration) -> Duration {
    took * PAUSES
}

/// Writes EXPIRE_DAYS to where every reader finds it.
///
/// # Errors
/// The database does not answer.
pub async fn note_default(ctx: &Ctx<Own>) -> Result<()> {
    let days = i32::try_from(ctx.chat.settings().expire_days)
        .ok()
        .filter(|days| *days > 0);
    let limit = ctx.settings().request_deadline();
    ctx.chat
        .database()
        .run(limit, async |connection| {
            sqlx::query(NOTE_DEFAULT)
                .bind(days)
                .execute(connection)
                .await
                .map(|_| ())
        })
        .await?;
    Ok(())
}

async fn rooms(connection: &mut PgConnection) -> Result<Vec<String>> {
    sqlx::query_scalar(ROOMS)
        .fetch_all(connection)
        .await
        .map_err(refused)
}

/// Position, whether it has expired, whether the walk goes on behind it.
async fn look(
    connection: &mut PgConnection,
    walk: &Walk,
    after: Seq,
) -> Result<Vec<(i64, bool, bool)>> {
    sqlx::query_as(walk.sql().0)
        .bind(after.as_i64())
        .bind(walk.room())
        .fetch_all(connection)
        .await
        .map_err(refused)
}

/// What a step deleted.
#[derive(Debug, Default)]
struct Gone {
    count: u64,
    rooms: Vec<i32>,
    /// When the last of it was received, in Unix milliseconds.
    until_ms: Option<i64>,
}

async fn delete(
    ctx: &Ctx<Own>,
    connection: &mut PgConnection,
    walk: &Walk,
    due: &[i64],
) -> Result<Gone> {
    type Row = (
        i64,
        Vec<i32>,
        Option<i64>,
        Vec<i64>,
        Vec<String>,
        Vec<String>,
    );
    let (count, rooms, until_ms, seqs, senders, ids): Row = sqlx::query_as(walk.sql().1)
        .bind(due)
        .fetch_one(connection)
        .await
        .map_err(refused)?;
    // Before the commit: should the log be away, the copies are known still when it is back.
    for ((seq, sender), id) in seqs.into_iter().zip(senders).zip(ids) {
        let is = |found: &jetstream::stream::StreamMessage| {
            parse_of_any_length(found)
                .is_ok_and(|message| message.user == sender && message.id.as_ref() == Some(&id))
        };
        ctx.chat.stream().erase(Seq::from_i64(seq), is).await?;
    }
    Ok(Gone {
        count: count.unsigned_abs(),
        rooms,
        until_ms,
    })
}
