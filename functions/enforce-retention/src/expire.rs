//! Deletes expired messages from PostgreSQL, in small steps.
//!
//! Readers leave out expired messages by themselves; this gives the space back. Messages are
//! scanned in the order of their sequence, which is the order of receipt: an index on the time
//! would make storing every message more expensive.

use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;

use crate::clock;
use crate::lock::{database_error, with_lock};
use crate::receipt_history;
use crate::state::State;
use crate::summary::Summary;
use base::error::Result;
use base::seq::Seq;
use protocol::retention::{DEFAULT_ROOMS, DIRECT_ROOMS};
use service::ctx::Ctx;
use timeline::message::parse_of_any_length;

/// The advisory lock of the replica that expires messages; a number that nobody else uses: "sweep"
/// in ASCII.
const LOCK: i64 = 0x0073_7765_6570;
/// Rows read, and deleted at most, in one transaction: some 50 ms.
const STEP: usize = 5_000;
/// After each step we pause this many times as long as it took. So expiring takes a tenth of one
/// connection's time, however much has expired, and storing continues beside it.
const PAUSES: u32 = 9;
/// Scans start from the beginning after this long: a room may keep messages for less long than
/// before, and a replay may have stored expired ones again. The receipt history is scanned this
/// often.
const RESCAN: Duration = Duration::from_secs(3_600);

const SET_DEFAULT: &str = "
    insert into retention (room, days) values ('*', $1)
    on conflict (room) do update set days = excluded.days
     where retention.days is distinct from excluded.days";

/// The rooms with a retention of their own. There are few, so each gets its own scan.
const ROOMS: &str = "
    select room from retention where room not in ('*', 'dm.*') and days is not null order by room";

/// The next rows after a sequence. `expired`: their room has let them expire. `within`: the scan
/// continues after them. The limit is part of the text, so that the plan is one for few rows.
pub const SCAN: &str = "
    with scanned as materialized (
        select seq, room_id, received_at from messages where seq > $1 order by seq limit 5000
    ), due as materialized (
        select id, cutoff(name) as at from rooms where id in (select room_id from scanned)
    )
    select seq, received_at <= at as expired, received_at <= (select cutoff($2)) as within
      from scanned join due on due.id = scanned.room_id order by seq";

/// The next rows of one room.
pub const SCAN_ROOM: &str = "
    with scanned as materialized (
        select seq, received_at from messages
         where room_id = (select id from rooms where name = $2) and seq > $1 order by seq limit 5000
    )
    select seq, received_at <= (select cutoff($2)) as expired,
           received_at <= (select cutoff($2)) as within
      from scanned order by seq";

/// The next rows, as far as anything may have expired. For counting, because several scans would
/// count a row that is not deleted several times.
pub const COUNT: &str = "
    with scanned as materialized (
        select seq, room_id, received_at from messages where seq > $1 order by seq limit 5000
    ), due as materialized (
        select id, cutoff(name) as at from rooms where id in (select room_id from scanned)
    )
    select seq, received_at <= at as expired,
           received_at <= (select max(cutoff(room)) from retention where $2 <> '') as within
      from scanned join due on due.id = scanned.room_id order by seq";

/// The next deletions: some whose message is gone already, or never came.
pub const SCAN_CHANGES: &str = "
    with scanned as materialized (
        select seq, room_id, received_at from changes where seq > $1 order by seq limit 5000
    ), due as materialized (
        select id, cutoff(name) as at from rooms where id in (select room_id from scanned)
    )
    select seq, received_at <= at as expired, received_at <= (select cutoff($2)) as within
      from scanned join due on due.id = scanned.room_id order by seq";

pub const DELETE: &str = include_str!("expire_delete.sql");
pub const DELETE_CHANGES: &str = include_str!("expire_delete_changes.sql");

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Messages deleted.
    pub expired: u64,
    /// Entries of the receipt history deleted.
    pub receipts: u64,
    /// The pass is complete: nothing that has expired is left.
    pub done: bool,
}

/// Which rows are scanned.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Scan {
    /// All, up to the cutoff of rooms without a retention of their own.
    Rooms,
    /// All, up to the cutoff of direct messages without a retention of their own.
    Direct,
    /// Those of a room with a retention of its own.
    Room(String),
    /// Deletions.
    Changes,
    /// All, without deleting any.
    Count,
}

impl Scan {
    const fn select(&self) -> &'static str {
        match self {
            Scan::Rooms | Scan::Direct => SCAN,
            Scan::Room(_) => SCAN_ROOM,
            Scan::Changes => SCAN_CHANGES,
            Scan::Count => COUNT,
        }
    }

    const fn delete(&self) -> &'static str {
        match self {
            Scan::Changes => DELETE_CHANGES,
            Scan::Rooms | Scan::Direct | Scan::Room(_) | Scan::Count => DELETE,
        }
    }

    /// The entry of `retention` whose cutoff ends the scan.
    fn room(&self) -> &str {
        match self {
            Scan::Rooms | Scan::Changes | Scan::Count => DEFAULT_ROOMS,
            Scan::Direct => DIRECT_ROOMS,
            Scan::Room(room) => room,
        }
    }
}

/// A pass over everything that may have expired, and its progress.
#[derive(Debug, Default)]
pub struct Pass {
    /// The scans that this pass has still to do, last one first.
    scans: Vec<Scan>,
    /// Where the current scan continues.
    after: Option<Seq>,
    /// The scan of the receipt history, which comes last, if it is due.
    receipt_history: Option<receipt_history::Scan>,
    /// Where the scans over everything continue in the next pass: rows below belong to rooms that
    /// keep them longer.
    rooms: Seq,
    direct: Seq,
    /// When the scans last started from the beginning.
    rescanned: Option<Instant>,
    /// What the pass deleted and did not log yet.
    summary: Summary,
}

impl Pass {
    /// Deletes the next expired rows, or in a dry run counts them. `None` while another replica
    /// does so. After the last step of a pass, the next step starts another pass.
    ///
    /// # Errors
    /// A server does not answer. Nothing has changed then.
    pub async fn step(&mut self, ctx: &Ctx<State>, dry_run: bool) -> Result<Option<Step>> {
        if self.scans.is_empty() && self.receipt_history.is_none() {
            let Some(rooms) = with_lock(ctx, LOCK, rooms).await? else {
                return Ok(None);
            };
            self.start(rooms, dry_run);
        }
        let Some(scan) = self.scans.last().cloned() else {
            return self.step_receipt_history(ctx, dry_run).await;
        };
        let after = self.after.unwrap_or(match scan {
            Scan::Rooms => self.rooms,
            Scan::Direct => self.direct,
            Scan::Room(_) | Scan::Changes | Scan::Count => Seq::ZERO,
        });
        let stepped = with_lock(ctx, LOCK, async |connection| {
            clock::check(ctx, connection).await?;
            let rows = next_rows(connection, &scan, after).await?;
            let expired: Vec<i64> = rows
                .iter()
                .filter(|row| row.expired)
                .map(|row| row.seq)
                .collect();
            let deleted = match &expired[..] {
                [] => Deleted::default(),
                expired if dry_run => Deleted {
                    count: expired.len() as u64,
                    ..Deleted::default()
                },
                expired => delete(ctx, connection, &scan, expired).await?,
            };
            Ok((rows, deleted))
        });
        let Some((rows, deleted)) = stepped.await? else {
            return Ok(None);
        };
        if !dry_run {
            self.add_to_summary(&scan, &deleted);
        }
        self.advance(&scan, &rows);
        let done = self.scans.is_empty() && self.receipt_history.is_none();
        self.summary.log(done);
        Ok(Some(Step {
            expired: if scan == Scan::Changes {
                0
            } else {
                deleted.count
            },
            receipts: 0,
            done,
        }))
    }

    fn add_to_summary(&mut self, scan: &Scan, deleted: &Deleted) {
        let Deleted {
            count,
            rooms,
            until_ms,
        } = deleted;
        if *scan == Scan::Changes {
            self.summary.add_deletions(*count, rooms, *until_ms);
        } else {
            self.summary.add_messages(*count, rooms, *until_ms);
        }
    }

    /// Notes where the scan continues, or that it is complete.
    fn advance(&mut self, scan: &Scan, rows: &[Row]) {
        // The last row that is within the cutoff, not the first that is beyond it: a clock may once
        // have been ahead, so that a single row has a time of receipt in the future.
        let within = rows
            .iter()
            .rev()
            .find(|row| row.within)
            .map(|row| Seq::from_i64(row.seq));
        if let Some(reached) = within {
            match scan {
                Scan::Rooms => self.rooms = reached,
                Scan::Direct => self.direct = reached,
                Scan::Room(_) | Scan::Changes | Scan::Count => {}
            }
        }
        self.after = within.filter(|_| rows.len() == STEP);
        if self.after.is_none() {
            self.scans.pop();
        }
    }

    async fn step_receipt_history(
        &mut self,
        ctx: &Ctx<State>,
        dry_run: bool,
    ) -> Result<Option<Step>> {
        let mut scan = self.receipt_history.clone().unwrap_or_default();
        let stepped = with_lock(ctx, LOCK, async |connection| {
            clock::check(ctx, connection).await?;
            scan.step(connection, dry_run).await
        });
        let Some((receipts, done)) = stepped.await? else {
            return Ok(None);
        };
        self.receipt_history = Some(scan).filter(|_| !done);
        if !dry_run {
            self.summary.add_receipts(receipts);
            self.summary.log(done);
        }
        Ok(Some(Step {
            expired: 0,
            receipts,
            done,
        }))
    }

    fn start(&mut self, rooms: Vec<String>, dry_run: bool) {
        if dry_run {
            self.scans.push(Scan::Count);
            self.receipt_history = Some(receipt_history::Scan::default());
            return;
        }
        if self.rescanned.is_none_or(|at| at.elapsed() > RESCAN) {
            self.rooms = Seq::ZERO;
            self.direct = Seq::ZERO;
            self.rescanned = Some(Instant::now());
            self.receipt_history = Some(receipt_history::Scan::default());
        }
        self.scans
            .extend([Scan::Changes, Scan::Direct, Scan::Rooms]);
        self.scans.extend(rooms.into_iter().map(Scan::Room));
    }
}

/// How long to pause after a step that took this long.
pub fn pause_after(took: Duration) -> Duration {
    took * PAUSES
}

/// Writes `EXPIRE_DAYS` to table `retention`, where every reader finds it.
///
/// # Errors
/// The database does not answer.
pub async fn set_default(ctx: &Ctx<State>) -> Result<()> {
    let days = i32::try_from(ctx.chat.settings().expire_days)
        .ok()
        .filter(|days| *days > 0);
    let limit = ctx.settings().request_deadline();
    ctx.chat
        .database()
        .run(limit, async |connection| {
            sqlx::query(SET_DEFAULT)
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
        .map_err(database_error)
}

/// A scanned row.
struct Row {
    seq: i64,
    expired: bool,
    /// The scan continues after it.
    within: bool,
}

async fn next_rows(connection: &mut PgConnection, scan: &Scan, after: Seq) -> Result<Vec<Row>> {
    let rows: Vec<(i64, bool, bool)> = sqlx::query_as(scan.select())
        .bind(after.as_i64())
        .bind(scan.room())
        .fetch_all(connection)
        .await
        .map_err(database_error)?;
    let row = |(seq, expired, within)| Row {
        seq,
        expired,
        within,
    };
    Ok(rows.into_iter().map(row).collect())
}

/// What a step deleted.
#[derive(Debug, Default)]
struct Deleted {
    count: u64,
    rooms: Vec<i32>,
    /// When the youngest of them was received, in Unix milliseconds.
    until_ms: Option<i64>,
}

async fn delete(
    ctx: &Ctx<State>,
    connection: &mut PgConnection,
    scan: &Scan,
    expired: &[i64],
) -> Result<Deleted> {
    type Row = (
        i64,
        Vec<i32>,
        Option<i64>,
        Vec<i64>,
        Vec<String>,
        Vec<String>,
    );
    let (count, rooms, until_ms, seqs, senders, ids): Row = sqlx::query_as(scan.delete())
        .bind(expired)
        .fetch_one(connection)
        .await
        .map_err(database_error)?;
    // Erase the duplicates before the commit: if the stream is down, PostgreSQL still knows them.
    for ((seq, sender), id) in seqs.into_iter().zip(senders).zip(ids) {
        let is_duplicate = |found: &jetstream::stream::StreamMessage| {
            parse_of_any_length(found)
                .is_ok_and(|message| message.user == sender && message.id.as_ref() == Some(&id))
        };
        ctx.chat
            .stream()
            .erase(Seq::from_i64(seq), is_duplicate)
            .await?;
    }
    Ok(Deleted {
        count: count.unsigned_abs(),
        rooms,
        until_ms,
    })
}
