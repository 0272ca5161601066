//! The audit: what became of every message the stream holds. Each one is looked up where our
//! guarantees say that it is.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;
use time::OffsetDateTime;

use crate::error::Error;
use crate::state::State;
use base::seq::Seq;
use base::time::from_unix_ms;
use jetstream::stream::{Limit, StreamMessage, StreamReader};
use protocol::audit::{Audit, AuditCounts, AuditRequest, Offender};
use protocol::change::Change;
use service::ctx::Ctx;
use timeline::cutoffs::Cutoffs;
use timeline::message::parse_of_any_length;

/// Messages looked up together.
const CHUNK: usize = 1_000;
const CHUNK_BYTES: usize = 8 << 20;
const CHUNK_TIME: Duration = Duration::from_secs(20);
/// Percent of the request's deadline after which no new chunk starts. The rest is for the chunk
/// under way and for the reply.
const PART_OF_DEADLINE: u32 = 60;

const MESSAGES: &str = "
    select seq, sender, id, derived, received_at, deleted from messages
     where seq between $1 and $2";

const CHANGES: &str = "
    select seq, target, sender, id from changes where seq between $1 and $2";

/// If a message was dead-lettered more than once, the first dead letter has the reason.
const DEAD_LETTERS: &str = "
    select distinct on (seq) seq, reason from dead_letters
     where seq between $1 and $2 order by seq, id";

/// The lateral join makes each id an index search of its own, whatever the statistics say.
pub const ELSEWHERE: &str = "
    select candidate.seq
      from unnest($1::bigint[], $2::text[], $3::text[]) as candidate (seq, sender, id)
     cross join lateral (select from messages
                          where (messages.sender, messages.id, messages.derived)
                                = (candidate.sender, candidate.id, false)
                            and messages.seq <> candidate.seq limit 1) as stored";

/// Audits the stream from `request.from` on, until most of the request's time is used.
///
/// # Errors
/// The stream or the database does not answer.
pub async fn audit(ctx: &Ctx<State>, request: AuditRequest) -> Result<Audit, Error> {
    let started = Instant::now();
    let deadline = ctx.settings().request_deadline();
    let time_limit = deadline * PART_OF_DEADLINE / 100;
    let stream = ctx.chat.stream();
    let (first, last) = stream.range().await?;
    let from = request.from.max(first);
    let mut tally = Tally {
        counts: AuditCounts::default(),
        offenders: Vec::new(),
        max_offenders: request.offenders,
    };
    let mut next = from;
    while next <= last {
        let messages = read_chunk(stream, next, last).await?;
        let Some(end) = messages.last().map(|found| found.message.seq) else {
            next = last.next();
            break;
        };
        // Before PostgreSQL is read: everything up to here was committed before this moment.
        let stored_through = stream.stored_through().await?;
        let left = deadline
            .saturating_sub(started.elapsed())
            .max(Duration::from_millis(1));
        let stored = ctx
            .chat
            .database()
            .run(left, async |connection| {
                Stored::load(connection, &messages).await
            })
            .await?;
        messages
            .iter()
            .for_each(|found| tally.count(found, &stored, stored_through));
        next = end.next();
        if started.elapsed() >= time_limit {
            break;
        }
    }
    Ok(Audit {
        from,
        through: next.previous().min(last),
        more: next <= last,
        counts: tally.counts,
        offenders: tally.offenders,
    })
}

/// The next messages up to `last`. Messages appended meanwhile are left for another audit;
/// otherwise it would never end while users write.
async fn read_chunk(stream: &StreamReader, from: Seq, last: Seq) -> Result<Vec<Found>, Error> {
    let found = stream
        .every(from, Limit::within(CHUNK, CHUNK_BYTES, CHUNK_TIME))
        .await?;
    Ok(found
        .into_iter()
        .filter(|(message, _)| message.seq <= last)
        .map(|(message, malformed)| Found::parse(message, malformed))
        .collect())
}

/// A message of the stream, and what PostgreSQL should know of it.
struct Found {
    message: StreamMessage,
    content: Content,
    /// The room, and when the stream received the message; of a deletion, when the stream received
    /// its target. `None` for a message that cannot be stored.
    age: Option<(String, i64)>,
}

enum Content {
    Message {
        sender: String,
        id: String,
        derived: bool,
    },
    Change {
        target: i64,
        sender: String,
        id: String,
    },
    /// It cannot be stored, so it should be a dead letter.
    Unparseable,
}

impl Found {
    fn parse(message: StreamMessage, malformed: bool) -> Found {
        let parsed = if malformed {
            None
        } else {
            parse_change(&message).or_else(|| parse_message(&message))
        };
        let (content, age) = match parsed {
            Some((content, age)) => (content, Some(age)),
            None => (Content::Unparseable, None),
        };
        Found {
            message,
            content,
            age,
        }
    }
}

type Parsed = (Content, (String, i64));

fn parse_change(message: &StreamMessage) -> Option<Parsed> {
    let change = Change::parse(
        &message.subject,
        &message.payload,
        message.seq,
        message.received_ms,
    );
    let Change { deletion, room, .. } = change.ok()?;
    let content = Content::Change {
        target: deletion.target.as_i64(),
        sender: deletion.user,
        id: deletion.id,
    };
    Some((content, (room, deletion.received)))
}

fn parse_message(message: &StreamMessage) -> Option<Parsed> {
    // A message that was stored under another limit is stored.
    let incoming = parse_of_any_length(message).ok()?;
    let content = Content::Message {
        id: incoming.shown_id(),
        derived: incoming.id.is_none(),
        sender: incoming.user,
    };
    Some((content, (incoming.room, message.received_ms)))
}

/// A row of `messages`.
struct Row {
    sender: String,
    id: String,
    derived: bool,
    received_at: OffsetDateTime,
    deleted: bool,
}

/// What PostgreSQL has between two sequences, as far as the audit needs it.
struct Stored {
    rows: HashMap<i64, Row>,
    /// Target, sender and id of each change.
    changes: HashMap<i64, (i64, String, String)>,
    /// The reason of each dead letter.
    dead_letters: BTreeMap<i64, String>,
    /// Sequences of messages whose sender and id are stored at another sequence.
    elsewhere: HashSet<i64>,
    /// By room, without the rooms in which nothing expires.
    cutoffs: Cutoffs,
}

impl Stored {
    async fn load(
        connection: &mut PgConnection,
        messages: &[Found],
    ) -> Result<Stored, sqlx::Error> {
        let seq = |found: Option<&Found>| found.map_or(0, |found| found.message.seq.as_i64());
        let first = seq(messages.first());
        let last = seq(messages.last());
        let mut stored = Stored {
            rows: load_rows(connection, first, last).await?,
            changes: HashMap::new(),
            dead_letters: BTreeMap::new(),
            elsewhere: HashSet::new(),
            cutoffs: Cutoffs::default(),
        };
        let without_row: Vec<&Found> = messages
            .iter()
            .filter(|found| stored.row(found).is_none())
            .collect();
        // Nearly always every message has its row.
        if without_row.is_empty() {
            return Ok(stored);
        }
        let changes: Vec<(i64, i64, String, String)> = sqlx::query_as(CHANGES)
            .bind(first)
            .bind(last)
            .fetch_all(&mut *connection)
            .await?;
        let dead_letters: Vec<(i64, String)> = sqlx::query_as(DEAD_LETTERS)
            .bind(first)
            .bind(last)
            .fetch_all(&mut *connection)
            .await?;
        stored.changes = changes
            .into_iter()
            .map(|(seq, target, sender, id)| (seq, (target, sender, id)))
            .collect();
        stored.dead_letters = dead_letters.into_iter().collect();
        stored.elsewhere = load_elsewhere(connection, &without_row).await?;
        stored.cutoffs = load_cutoffs(connection, &without_row).await?;
        Ok(stored)
    }

    /// The message's own row. A lost stream may have had another message of the same sender at this
    /// sequence; the time of receipt distinguishes them.
    fn row(&self, found: &Found) -> Option<&Row> {
        let Content::Message {
            sender,
            id,
            derived,
        } = &found.content
        else {
            return None;
        };
        let row = self.rows.get(&found.message.seq.as_i64())?;
        let same = row.sender == *sender && row.id == *id && row.derived == *derived;
        (same && row.received_at == from_unix_ms(found.message.received_ms)).then_some(row)
    }

    /// Whether it is older than its room keeps messages.
    fn has_expired(&self, found: &Found) -> bool {
        let Some((room, received_ms)) = &found.age else {
            return false;
        };
        self.cutoffs.is_expired(room, *received_ms)
    }

    fn has_change(&self, found: &Found) -> bool {
        let Content::Change { target, sender, id } = &found.content else {
            return false;
        };
        let row = self.changes.get(&found.message.seq.as_i64());
        row.is_some_and(|(row_target, row_sender, row_id)| {
            (row_target, row_sender, row_id) == (target, sender, id)
        })
    }
}

async fn load_rows(
    connection: &mut PgConnection,
    first: i64,
    last: i64,
) -> Result<HashMap<i64, Row>, sqlx::Error> {
    let rows: Vec<(i64, String, String, bool, OffsetDateTime, bool)> = sqlx::query_as(MESSAGES)
        .bind(first)
        .bind(last)
        .fetch_all(connection)
        .await?;
    let by_seq = |(seq, sender, id, derived, received_at, deleted)| {
        let row = Row {
            sender,
            id,
            derived,
            received_at,
            deleted,
        };
        (seq, row)
    };
    Ok(rows.into_iter().map(by_seq).collect())
}

async fn load_elsewhere(
    connection: &mut PgConnection,
    messages: &[&Found],
) -> Result<HashSet<i64>, sqlx::Error> {
    let mut seqs = Vec::new();
    let mut senders = Vec::new();
    let mut ids = Vec::new();
    for found in messages {
        if let Content::Message {
            sender,
            id,
            derived: false,
        } = &found.content
        {
            seqs.push(found.message.seq.as_i64());
            senders.push(sender.as_str());
            ids.push(id.as_str());
        }
    }
    let elsewhere: Vec<i64> = sqlx::query_scalar(ELSEWHERE)
        .bind(seqs)
        .bind(senders)
        .bind(ids)
        .fetch_all(connection)
        .await?;
    Ok(elsewhere.into_iter().collect())
}

async fn load_cutoffs(
    connection: &mut PgConnection,
    messages: &[&Found],
) -> Result<Cutoffs, sqlx::Error> {
    let mut rooms: Vec<&str> = messages
        .iter()
        .filter_map(|found| Some(found.age.as_ref()?.0.as_str()))
        .collect();
    rooms.sort_unstable();
    rooms.dedup();
    Cutoffs::load(connection, &rooms).await
}

/// The counts of one request.
struct Tally {
    counts: AuditCounts,
    offenders: Vec<Offender>,
    max_offenders: usize,
}

impl Tally {
    fn count(&mut self, found: &Found, stored: &Stored, stored_through: Seq) {
        let seq = found.message.seq;
        let counts = &mut self.counts;
        if let Some(row) = stored.row(found) {
            *(if row.deleted {
                &mut counts.deleted
            } else {
                &mut counts.stored
            }) += 1;
            return;
        }
        if stored.has_change(found) {
            counts.changes += 1;
            return;
        }
        if let Some(reason) = stored.dead_letters.get(&seq.as_i64()) {
            *counts.dead_letters.entry(reason.clone()).or_default() += 1;
            return;
        }
        let mut missing = false;
        if stored.elsewhere.contains(&seq.as_i64()) {
            counts.duplicates += 1;
        } else if seq > stored_through {
            counts.waiting += 1;
        } else if stored.has_expired(found) {
            counts.expired += 1;
        } else {
            counts.missing += 1;
            missing = true;
        }
        // Whatever became of this message, no other message may be stored at its sequence.
        let is_taken =
            stored.rows.contains_key(&seq.as_i64()) || stored.changes.contains_key(&seq.as_i64());
        let what = match (is_taken, missing) {
            (true, _) => "another message is stored here",
            (false, true) => "acknowledged, and neither stored nor a dead letter",
            (false, false) => return,
        };
        if self.offenders.len() < self.max_offenders {
            self.offenders.push(Offender {
                seq,
                subject: found.message.subject.clone(),
                what: what.to_owned(),
            });
        }
    }
}
