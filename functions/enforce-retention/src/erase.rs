//! Erasing what a user wrote: a hard deletion for every message, as if they had deleted each. `persist-message` makes them.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use futures::future::try_join_all;
use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgRow};

use crate::{Own, letters};
use base::error::{Error, Result};
use base::seq::Seq;
use jetstream::append::append;
use jetstream::stream::{Limit, StreamError, StreamMessage};
use protocol::change::{Change, ChangeType, Deletion, Mode, change_subject};
use protocol::header;
use protocol::message::{Incoming, Limits};
use protocol::retention::{EraseRequest, Erased};
use protocol::subject::{CHANGES, STREAM};
use service::ctx::Ctx;
use timeline::message::parse;

/// Rows read together.
const ROWS: usize = 1_000;
/// Messages read from the log together.
const CHUNK: usize = 1_000;
const CHUNK_BYTES: usize = 4 << 20;
/// Deletions of one user that may wait to be stored; with more of them, the next part waits for that.
const MOST_UNDERWAY: usize = 1_000_000;
const CHUNK_TIME: Duration = Duration::from_secs(20);
/// Deletions under way at once: the log flushes for each, and one flush may serve many.
const UNDER_WAY: usize = 64;

/// By id, which the unique key gives in order: every message of theirs, tombstones too, since a soft deletion leaves the text in the log.
pub const THEIRS: &str = "
    select seq, rooms.name as room, recipient, messages.id, derived,
           floor(extract(epoch from sent_at) * 1000)::bigint as sent_ms, floor(extract(epoch from received_at) * 1000)::bigint as received_ms
      from messages join rooms on rooms.id = room_id
     where sender = $1 and (messages.id, derived) > ($2, $3)
       and not exists (select from changes
                        where target = messages.seq and (changes.sender, changes.id, mode) = (messages.sender, messages.id, 'hard'))
     order by sender, messages.id, derived limit 1000";

/// How many of those have no deletion waiting in the log, and how many have.
const COUNT: &str = "
    select count(*) filter (where waits.seq is null), count(waits.seq)
      from messages left join unnest($2::bigint[]) as waits (seq) on waits.seq = messages.seq
     where sender = $1
       and not exists (select from changes
                        where target = messages.seq and (changes.sender, changes.id, mode) = (messages.sender, messages.id, 'hard'))";

pub const INDEXED: &str = "
    select asked.seq
      from unnest($1::bigint[]) as asked (seq)
     cross join lateral (select from messages where messages.seq = asked.seq and sender = $2 limit 1) theirs";

/// A message of theirs, and the room it stands in.
#[derive(Debug)]
struct Theirs {
    room: String,
    deletion: Deletion,
}

/// One part of an erasure.
struct Part<'a> {
    ctx: &'a Ctx<Own>,
    asked: &'a EraseRequest,
    begun: Instant,
    enough: Instant,
    /// Positions for which a deletion waits in the log.
    underway: HashSet<Seq>,
    /// Positions this part has met.
    met: HashSet<Seq>,
    report: Erased,
}

/// The targets of the hard deletions of this user's messages that are not stored yet, read in steps,
/// so that only the targets are kept.
async fn underway(ctx: &Ctx<Own>, user: &str, floor: Seq) -> Result<HashSet<Seq>> {
    let (mut targets, mut next) = (HashSet::new(), floor.next());
    while targets.len() < MOST_UNDERWAY {
        let window = ctx
            .chat
            .stream()
            .first(CHANGES, next, Limit::within(CHUNK, CHUNK_BYTES, CHUNK_TIME))
            .await?;
        let parse = |message: &StreamMessage| {
            Change::parse(
                &message.subject,
                &message.payload,
                message.seq,
                message.received_ms,
            )
            .ok()
        };
        let hard =
            |change: &Change| change.deletion.user == user && change.deletion.mode == Mode::Hard;
        targets.extend(
            window
                .messages
                .iter()
                .filter_map(parse)
                .filter(hard)
                .map(|change| change.deletion.target),
        );
        match window.messages.last() {
            Some(last) if !window.complete => next = last.seq.next(),
            Some(_) | None => return Ok(targets),
        }
    }
    Err(StreamError::TooMuch("deletions that are not stored yet").into())
}

/// Does as much as there is time for.
///
/// # Errors
/// A server does not answer, or the log is full. What was done stays done.
pub async fn erase(ctx: &Ctx<Own>, asked: &EraseRequest, enough: Instant) -> Result<Erased> {
    let begun = Instant::now();
    // First: whatever is stored or set aside up to here is found in the database, the rest in the log.
    let floor = ctx.chat.stream().stored_through_now().await?;
    let underway = underway(ctx, &asked.user, floor).await?;
    let report = Erased {
        deletions: 0,
        underway: 0,
        letters: 0,
        unfit: 0,
        waiting: 0,
        through: asked.after,
        more: true,
        dry_run: asked.dry_run,
    };
    let mut part = Part {
        ctx,
        asked,
        begun,
        enough,
        underway,
        met: HashSet::new(),
        report,
    };
    part.report.more = if asked.dry_run {
        part.count_index().await?;
        !(part.log(floor).await? && part.count_letters().await?)
    } else {
        !(part.index().await? && part.log(floor).await? && part.letters().await?)
    };
    Ok(part.report)
}

impl Part<'_> {
    fn has_time(&self) -> bool {
        Instant::now() < self.enough
    }

    /// A query may be given up only when the request is.
    fn limit(&self) -> Duration {
        self.ctx.settings().request_deadline()
    }

    /// What is stored, all of it in the first part of a dry run.
    async fn count_index(&mut self) -> Result<()> {
        if self.asked.after > Seq::ZERO {
            return Ok(());
        }
        let underway: Vec<i64> = self.underway.iter().map(|seq| seq.as_i64()).collect();
        let user = &self.asked.user;
        let (deletions, waiting): (i64, i64) = self
            .ctx
            .chat
            .database()
            .run(self.limit(), async |connection: &mut PgConnection| {
                sqlx::query_as(COUNT)
                    .bind(user)
                    .bind(&underway)
                    .fetch_one(connection)
                    .await
            })
            .await?;
        self.report.deletions += deletions.unsigned_abs();
        self.report.underway += waiting.unsigned_abs();
        Ok(())
    }

    /// Which of these a dry run has counted in the index.
    async fn indexed(&self, messages: &[Theirs]) -> Result<HashSet<Seq>> {
        let seqs: Vec<i64> = messages
            .iter()
            .map(|message| message.deletion.target.as_i64())
            .collect();
        let user = &self.asked.user;
        let found: Vec<i64> = self
            .ctx
            .chat
            .database()
            .run(self.limit(), async |connection: &mut PgConnection| {
                sqlx::query_scalar(INDEXED)
                    .bind(&seqs)
                    .bind(user)
                    .fetch_all(connection)
                    .await
            })
            .await?;
        Ok(found
            .into_iter()
            .filter_map(|seq| Seq::new(seq.unsigned_abs()))
            .collect())
    }

    /// What is stored; whether that was all.
    async fn index(&mut self) -> Result<bool> {
        let (mut id, mut derived) = (String::new(), false);
        while self.has_time() {
            let user = &self.asked.user;
            let rows = self.ctx.chat.database().run(
                self.limit(),
                async |connection: &mut PgConnection| {
                    let rows = sqlx::query(THEIRS)
                        .bind(user)
                        .bind(&id)
                        .bind(derived)
                        .fetch_all(connection)
                        .await?;
                    rows.iter()
                        .map(|row| theirs(user, row))
                        .collect::<Result<Vec<Theirs>, sqlx::Error>>()
                },
            );
            let rows = rows.await?;
            let (complete, last) = (
                rows.len() < ROWS,
                rows.last()
                    .map(|last| (last.deletion.id.clone(), last.deletion.derived)),
            );
            if !self.delete(rows).await? {
                break;
            }
            match last {
                Some(last) if !complete => (id, derived) = last,
                _ => return Ok(true),
            }
        }
        Ok(false)
    }

    /// What the log holds, stored or not: what has expired is in the log for a while, and copies are. Whether that was all.
    async fn log(&mut self, floor: Seq) -> Result<bool> {
        let (first, last) = self.ctx.chat.stream().range().await?;
        let mut next = self.asked.after.next().max(first);
        while next <= last {
            let found = self
                .ctx
                .chat
                .stream()
                .every(next, Limit::within(CHUNK, CHUNK_BYTES, CHUNK_TIME))
                .await?;
            let Some((end, _)) = found.last() else { break };
            let end = end.seq;
            let mut messages = Vec::new();
            for (message, malformed) in found
                .iter()
                .filter(|(message, _)| !Change::is_change_subject(&message.subject))
            {
                match read(message, *malformed, self.ctx.chat.limits()) {
                    Some(incoming) if incoming.user == self.asked.user => {
                        messages.push(of_log(incoming, message.received_ms))
                    }
                    Some(_) => {}
                    None if letters::is_by(
                        &self.asked.user,
                        &message.subject,
                        &message.payload,
                    ) =>
                    {
                        self.unfit(message, floor).await?
                    }
                    None => {}
                }
            }
            if self.asked.dry_run {
                let indexed = self.indexed(&messages).await?;
                messages.retain(|message| !indexed.contains(&message.deletion.target));
            }
            if !self.delete(messages).await? {
                return Ok(false);
            }
            self.report.through = end;
            next = end.next();
            // After the first of them: however little time there is, the next part begins further on.
            if next <= last && !self.has_time() {
                return Ok(false);
            }
        }
        self.report.through = self.report.through.max(last);
        Ok(true)
    }

    /// What will not be stored has no place in the order to keep. Before it is a dead letter it must not go: it would be neither.
    async fn unfit(&mut self, message: &StreamMessage, floor: Seq) -> Result<()> {
        if message.seq > floor {
            self.report.waiting += 1;
            return Ok(());
        }
        let is = |found: &StreamMessage| {
            found.received_ms == message.received_ms && found.payload == message.payload
        };
        if self.asked.dry_run || self.ctx.chat.stream().erase(message.seq, is).await? {
            self.report.unfit += 1;
        }
        Ok(())
    }

    /// Whether that was all.
    async fn letters(&mut self) -> Result<bool> {
        let mut after = 0;
        loop {
            let (emptied, next) = letters::empty(
                self.ctx,
                &self.asked.user,
                after,
                self.asked.dry_run,
                self.limit(),
            )
            .await?;
            self.report.letters += emptied;
            match next {
                None => return Ok(true),
                Some(_) if !self.has_time() => return Ok(false),
                Some(next) => after = next,
            }
        }
    }

    /// Letters have no place for the next part to go on from: a part with little else to do counts those there is time for.
    /// Whether no other part has to.
    async fn count_letters(&mut self) -> Result<bool> {
        let late = self.begun.elapsed() > self.enough.duration_since(self.begun) / 2;
        let all = self.letters().await?;
        if !all && late {
            self.report.letters = 0;
            return Ok(false);
        }
        Ok(true)
    }

    /// Appends a deletion for each that has none; whether there was time for all. Those that were appended wait in the log, where
    /// the next part finds them.
    async fn delete(&mut self, messages: Vec<Theirs>) -> Result<bool> {
        let mut new = Vec::new();
        for message in messages
            .into_iter()
            .filter(|message| self.met.insert(message.deletion.target))
        {
            match self.underway.contains(&message.deletion.target) {
                true => self.report.underway += 1,
                false => new.push(message),
            }
        }
        if self.asked.dry_run {
            self.report.deletions += new.len() as u64;
            return Ok(true);
        }
        for some in new.chunks(UNDER_WAY) {
            if !self.has_time() {
                return Ok(false);
            }
            try_join_all(
                some.iter()
                    .map(|message| append_deletion(self.ctx, message))
                    .collect::<Vec<_>>(),
            )
            .await?;
            self.report.deletions += some.len() as u64;
        }
        Ok(true)
    }
}

/// A message as `persist-message` reads it: what it sets aside gets no tombstone.
fn read(message: &StreamMessage, malformed: bool, limits: Limits) -> Option<Incoming> {
    parse(message, limits).ok().filter(|_| !malformed)
}

fn of_log(incoming: Incoming, received_ms: i64) -> Theirs {
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
    Theirs {
        room: message.room,
        deletion,
    }
}

fn theirs(user: &str, row: &PgRow) -> Result<Theirs, sqlx::Error> {
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
    Ok(Theirs {
        room: row.try_get("room")?,
        deletion,
    })
}

async fn append_deletion(ctx: &Ctx<Own>, message: &Theirs) -> Result<()> {
    let Deletion {
        target, received, ..
    } = &message.deletion;
    let mut headers = HeaderMap::new();
    // The same as delete-message's: asked again, by whomever, it is appended once.
    headers.insert(
        header::MESSAGE_ID,
        format!("/delete/{target}/{received}/{}", Mode::Hard.as_str()).as_str(),
    );
    let payload = serde_json::to_vec(&message.deletion).map_err(Error::internal)?;
    let limit = ctx.settings().request_deadline() / 2;
    append(
        ctx.nats(),
        STREAM,
        &change_subject(&message.room),
        headers,
        payload.into(),
        limit,
    )
    .await?;
    Ok(())
}
