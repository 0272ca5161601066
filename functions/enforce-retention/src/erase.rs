//! Erases what a user wrote: appends a hard deletion for each message, as if the user had deleted
//! each. `persist-message` applies them.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgRow};

use crate::dead_letters;
use crate::state::State;
use base::error::Result;
use base::seq::Seq;
use jetstream::stream::{Limit, StreamError, StreamMessage};
use protocol::change::{Change, ChangeType, Deletion, Mode};
use protocol::message::{Incoming, Limits};
use protocol::retention::{EraseRequest, Erased};
use protocol::subject::CHANGES;
use service::ctx::Ctx;
use timeline::deletion::append_deletion;
use timeline::message::parse;

/// Rows read together.
const ROWS: usize = 1_000;
/// Messages read from the stream together.
const CHUNK: usize = 1_000;
const CHUNK_BYTES: usize = 4 << 20;
const CHUNK_TIME: Duration = Duration::from_secs(20);
/// The most deletions of one user that may be in the stream and not stored. Beyond this the request
/// fails until they are stored.
const MAX_PENDING: usize = 1_000_000;
/// Deletions appended at once: the stream flushes for each, and one flush may serve many.
const CONCURRENCY: usize = 64;

/// Messages of the user without a hard deletion.
pub const USER_MESSAGES: &str = include_str!("erase_user_messages.sql");

/// How many of those have no deletion waiting in the stream, and how many have one.
const COUNT: &str = "
    select count(*) filter (where pending.seq is null), count(pending.seq)
      from messages left join unnest($2::bigint[]) as pending (seq) on pending.seq = messages.seq
     where sender = $1
       and not exists (select from changes
                        where target = messages.seq
                          and (changes.sender, changes.id, mode)
                              = (messages.sender, messages.id, 'hard'))";

pub const STORED: &str = "
    select candidate.seq
      from unnest($1::bigint[]) as candidate (seq)
     cross join lateral (select from messages
                          where messages.seq = candidate.seq and sender = $2 limit 1) stored";

/// A deletion to append, and the room it belongs to.
#[derive(Debug)]
struct NewDeletion {
    room: String,
    deletion: Deletion,
}

/// Erases as much as there is time for.
///
/// # Errors
/// A server does not answer, or the stream is full. What was done stays done.
pub async fn erase(
    ctx: &Ctx<State>,
    request: &EraseRequest,
    time_limit: Instant,
) -> Result<Erased> {
    let started = Instant::now();
    // First of all: everything up to here is in PostgreSQL, stored or dead-lettered. The rest is
    // found in the stream.
    let stored_through = ctx.chat.stream().stored_through_now().await?;
    let pending = pending_deletions(ctx, &request.user, stored_through).await?;
    let report = Erased {
        deletions: 0,
        underway: 0,
        letters: 0,
        unfit: 0,
        waiting: 0,
        through: request.after,
        more: true,
        dry_run: request.dry_run,
    };
    let mut part = Part {
        ctx,
        request,
        started,
        time_limit,
        stored_through,
        pending,
        seen: HashSet::new(),
        report,
    };
    let complete = if request.dry_run {
        part.count_stored().await?;
        part.erase_from_stream().await? && part.count_dead_letters().await?
    } else {
        part.erase_stored().await?
            && part.erase_from_stream().await?
            && part.erase_dead_letters().await?
    };
    part.report.more = !complete;
    Ok(part.report)
}

/// The targets of the user's hard deletions that are in the stream and not stored yet. They are
/// read in chunks, so that only the targets stay in memory.
async fn pending_deletions(
    ctx: &Ctx<State>,
    user: &str,
    stored_through: Seq,
) -> Result<HashSet<Seq>> {
    let is_wanted =
        |change: &Change| change.deletion.user == user && change.deletion.mode == Mode::Hard;
    let mut targets = HashSet::new();
    let mut next = stored_through.next();
    while targets.len() < MAX_PENDING {
        let window = ctx
            .chat
            .stream()
            .first(CHANGES, next, Limit::within(CHUNK, CHUNK_BYTES, CHUNK_TIME))
            .await?;
        targets.extend(
            window
                .messages
                .iter()
                .filter_map(parse_change)
                .filter(is_wanted)
                .map(|change| change.deletion.target),
        );
        match window.messages.last() {
            Some(last) if !window.complete => next = last.seq.next(),
            Some(_) | None => return Ok(targets),
        }
    }
    Err(StreamError::TooMuch("deletions that are not stored yet").into())
}

fn parse_change(message: &StreamMessage) -> Option<Change> {
    Change::parse(
        &message.subject,
        &message.payload,
        message.seq,
        message.received_ms,
    )
    .ok()
}

/// The part of an erasure that one request does.
struct Part<'a> {
    ctx: &'a Ctx<State>,
    request: &'a EraseRequest,
    started: Instant,
    time_limit: Instant,
    stored_through: Seq,
    /// Sequences whose deletion is in the stream already.
    pending: HashSet<Seq>,
    /// Sequences that this part has seen.
    seen: HashSet<Seq>,
    report: Erased,
}

impl Part<'_> {
    fn has_time(&self) -> bool {
        Instant::now() < self.time_limit
    }

    /// The limit of a query. It is longer than our own time limit: a query is cancelled only when
    /// the request itself has run out of time.
    fn query_limit(&self) -> Duration {
        self.ctx.settings().request_deadline()
    }

    /// Counts what is stored. The first part of a dry run counts all of it.
    async fn count_stored(&mut self) -> Result<()> {
        if self.request.after > Seq::ZERO {
            return Ok(());
        }
        let pending: Vec<i64> = self.pending.iter().map(|seq| seq.as_i64()).collect();
        let user = &self.request.user;
        let (new, pending): (i64, i64) = self
            .ctx
            .chat
            .database()
            .run(self.query_limit(), async |connection: &mut PgConnection| {
                sqlx::query_as(COUNT)
                    .bind(user)
                    .bind(&pending)
                    .fetch_one(connection)
                    .await
            })
            .await?;
        self.report.deletions += new.unsigned_abs();
        self.report.underway += pending.unsigned_abs();
        Ok(())
    }

    /// Those of the deletions whose message is stored, which a dry run has counted there.
    async fn stored_targets(&self, deletions: &[NewDeletion]) -> Result<HashSet<Seq>> {
        let seqs: Vec<i64> = deletions
            .iter()
            .map(|new| new.deletion.target.as_i64())
            .collect();
        let user = &self.request.user;
        let stored: Vec<i64> = self
            .ctx
            .chat
            .database()
            .run(self.query_limit(), async |connection: &mut PgConnection| {
                sqlx::query_scalar(STORED)
                    .bind(&seqs)
                    .bind(user)
                    .fetch_all(connection)
                    .await
            })
            .await?;
        Ok(stored
            .into_iter()
            .filter_map(|seq| Seq::new(seq.unsigned_abs()))
            .collect())
    }

    /// Deletes what is stored; returns whether that was everything.
    async fn erase_stored(&mut self) -> Result<bool> {
        let mut id = String::new();
        let mut derived = false;
        while self.has_time() {
            let user = &self.request.user;
            let deletions = self.ctx.chat.database().run(
                self.query_limit(),
                async |connection: &mut PgConnection| {
                    let rows = sqlx::query(USER_MESSAGES)
                        .bind(user)
                        .bind(&id)
                        .bind(derived)
                        .fetch_all(connection)
                        .await?;
                    rows.iter()
                        .map(|row| from_row(user, row))
                        .collect::<Result<Vec<NewDeletion>, sqlx::Error>>()
                },
            );
            let deletions = deletions.await?;
            let complete = deletions.len() < ROWS;
            let last = deletions
                .last()
                .map(|last| (last.deletion.id.clone(), last.deletion.derived));
            if !self.append(deletions).await? {
                break;
            }
            match last {
                Some(last) if !complete => (id, derived) = last,
                _ => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Deletes what the stream holds, stored or not: it still holds expired messages for a while,
    /// and duplicates. Returns whether that was everything.
    async fn erase_from_stream(&mut self) -> Result<bool> {
        let (first, last) = self.ctx.chat.stream().range().await?;
        let mut next = self.request.after.next().max(first);
        while next <= last {
            let found = self
                .ctx
                .chat
                .stream()
                .every(next, Limit::within(CHUNK, CHUNK_BYTES, CHUNK_TIME))
                .await?;
            let Some((end, _)) = found.last() else { break };
            let end = end.seq;
            let mut deletions = self.deletions_for(&found).await?;
            if self.request.dry_run {
                let stored = self.stored_targets(&deletions).await?;
                deletions.retain(|new| !stored.contains(&new.deletion.target));
            }
            if !self.append(deletions).await? {
                return Ok(false);
            }
            self.report.through = end;
            next = end.next();
            // Checked only after a chunk: however little time there is, the next part starts later.
            if next <= last && !self.has_time() {
                return Ok(false);
            }
        }
        self.report.through = self.report.through.max(last);
        Ok(true)
    }

    /// The deletions for the user's messages in this chunk. What cannot be parsed is removed at
    /// once.
    async fn deletions_for(&mut self, found: &[(StreamMessage, bool)]) -> Result<Vec<NewDeletion>> {
        let user = &self.request.user;
        let mut deletions = Vec::new();
        for (message, malformed) in found {
            if Change::is_change_subject(&message.subject) {
                continue;
            }
            match parse_message(message, *malformed, self.ctx.chat.limits()) {
                Some(incoming) if incoming.user == *user => {
                    deletions.push(from_stream(incoming, message.received_ms));
                }
                Some(_) => {}
                None if dead_letters::is_by(user, &message.subject, &message.payload) => {
                    self.erase_unparseable(message).await?;
                }
                None => {}
            }
        }
        Ok(deletions)
    }

    /// Removes a message that cannot be parsed from the stream. It has no place in a room's order
    /// that would have to be kept. It must not be removed before it is a dead letter, because then
    /// nothing would be left of it.
    async fn erase_unparseable(&mut self, message: &StreamMessage) -> Result<()> {
        if message.seq > self.stored_through {
            self.report.waiting += 1;
            return Ok(());
        }
        let is_same = |found: &StreamMessage| {
            found.received_ms == message.received_ms && found.payload == message.payload
        };
        if self.request.dry_run || self.ctx.chat.stream().erase(message.seq, is_same).await? {
            self.report.unfit += 1;
        }
        Ok(())
    }

    /// Erases the user's dead letters, or counts them; returns whether those were all.
    async fn erase_dead_letters(&mut self) -> Result<bool> {
        let mut after = 0;
        loop {
            let (erased, next) = dead_letters::erase(
                self.ctx,
                &self.request.user,
                after,
                self.request.dry_run,
                self.query_limit(),
            )
            .await?;
            self.report.letters += erased;
            match next {
                None => return Ok(true),
                Some(_) if !self.has_time() => return Ok(false),
                Some(next) => after = next,
            }
        }
    }

    /// Counts the dead letters. The reply has no field that shows the next part where to continue
    /// counting. So they are counted by a part that has most of its time left, as far as it gets.
    /// Returns whether no other part has to count them.
    async fn count_dead_letters(&mut self) -> Result<bool> {
        let half = self.time_limit.duration_since(self.started) / 2;
        let is_late = self.started.elapsed() > half;
        let all = self.erase_dead_letters().await?;
        if !all && is_late {
            self.report.letters = 0;
            return Ok(false);
        }
        Ok(true)
    }

    /// Appends the deletions that are not in the stream yet; returns whether there was time for
    /// all. The next part finds those that were appended in the stream.
    async fn append(&mut self, deletions: Vec<NewDeletion>) -> Result<bool> {
        let mut missing = Vec::new();
        for new in deletions {
            if !self.seen.insert(new.deletion.target) {
                continue;
            }
            if self.pending.contains(&new.deletion.target) {
                self.report.underway += 1;
            } else {
                missing.push(new);
            }
        }
        if self.request.dry_run {
            self.report.deletions += missing.len() as u64;
            return Ok(true);
        }
        let limit = self.ctx.settings().request_deadline() / 2;
        for group in missing.chunks(CONCURRENCY) {
            if !self.has_time() {
                return Ok(false);
            }
            try_join_all(
                group
                    .iter()
                    .map(|new| append_deletion(self.ctx.nats(), &new.room, &new.deletion, limit))
                    .collect::<Vec<_>>(),
            )
            .await?;
            self.report.deletions += group.len() as u64;
        }
        Ok(true)
    }
}

/// Parses a message as `persist-message` does: what it dead-letters needs no tombstone.
fn parse_message(message: &StreamMessage, malformed: bool, limits: Limits) -> Option<Incoming> {
    parse(message, limits).ok().filter(|_| !malformed)
}

fn from_stream(incoming: Incoming, received_ms: i64) -> NewDeletion {
    let derived = incoming.id.is_none();
    let message = incoming.into_message();
    let deletion = Deletion {
        kind: ChangeType::Delete,
        target: message.seq,
        id: message.id,
        by: message.user.clone(),
        user: message.user,
        to: message.to,
        derived,
        timestamp: message.timestamp,
        received: received_ms,
        mode: Mode::Hard,
    };
    NewDeletion {
        room: message.room,
        deletion,
    }
}

fn from_row(user: &str, row: &PgRow) -> Result<NewDeletion, sqlx::Error> {
    let deletion = Deletion {
        kind: ChangeType::Delete,
        target: Seq::from_i64(row.try_get("seq")?),
        id: row.try_get("id")?,
        user: user.to_owned(),
        to: row.try_get("recipient")?,
        derived: row.try_get("derived")?,
        timestamp: row.try_get("sent_ms")?,
        received: row.try_get("received_ms")?,
        mode: Mode::Hard,
        by: user.to_owned(),
    };
    Ok(NewDeletion {
        room: row.try_get("room")?,
        deletion,
    })
}
