//! What became of every message the log holds: each one looked up where the promise says that it is.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;
use time::OffsetDateTime;

use crate::State;
use crate::letters::instant;
use crate::trouble::Trouble;
use base::seq::Seq;
use jetstream::stream::{Limit, StreamMessage, StreamReader};
use protocol::audit::{Audit, AuditCounts, AuditRequest, Offender};
use protocol::change::Change;
use protocol::message::Limits;
use service::ctx::Ctx;
use timeline::message::parse;

/// Messages looked up together.
const CHUNK: usize = 1_000;
const CHUNK_BYTES: usize = 8 << 20;
const CHUNK_TIME: Duration = Duration::from_secs(20);
/// Of the request's deadline, in percent: the rest is for the last chunk and the way back.
const PART_OF_DEADLINE: u32 = 60;
/// Any text: what was stored under another limit is stored.
const NO_LIMITS: Limits = Limits {
    text_bytes: 1 << 30,
};

const ROWS: &str = "
    select seq, sender, id, derived, received_at, deleted from messages where seq between $1 and $2";

const CHANGES: &str = "
    select seq, target, sender, id from changes where seq between $1 and $2";

/// Whatever became of a letter afterwards, the first one says why.
const LETTERS: &str = "
    select distinct on (seq) seq, reason from dead_letters where seq between $1 and $2 order by seq, id";

/// What was received at this time, in Unix milliseconds, or before has expired, by room.
const CUTOFFS: &str = "
    select name, cutoff_ms(name) from unnest($1::text[]) as name";

/// Each id is a search of its own: no other plan is possible, whatever the statistics say.
pub const ELSEWHERE: &str = "
    select asked.seq
      from unnest($1::bigint[], $2::text[], $3::text[]) as asked (seq, sender, id)
     cross join lateral (select from messages
                          where (messages.sender, messages.id, messages.derived) = (asked.sender, asked.id, false)
                            and messages.seq <> asked.seq limit 1) as stored";

/// Looks at the log from `asked.from` on until most of the request's time is used.
///
/// # Errors
/// The log or the database does not answer.
pub async fn audit(ctx: &Ctx<State>, asked: AuditRequest) -> Result<Audit, Trouble> {
    let begun = Instant::now();
    let deadline = ctx.settings().request_deadline();
    let enough = deadline * PART_OF_DEADLINE / 100;
    let (first, last) = ctx.chat.stream().range().await?;
    let from = asked.from.max(first);
    let mut page = Page {
        counts: AuditCounts::default(),
        offenders: Vec::new(),
        room: asked.offenders,
    };
    let mut next = from;
    while next <= last {
        let messages = read(ctx.chat.stream(), next, last).await?;
        let Some(end) = messages.last().map(|found| found.message.seq) else {
            next = last.next();
            break;
        };
        // Before the index is looked at: what lies at or below this floor was committed before.
        let floor = ctx.chat.stream().stored_through().await?;
        let left = deadline
            .saturating_sub(begun.elapsed())
            .max(Duration::from_millis(1));
        let index = ctx
            .chat
            .database()
            .run(left, async |connection| {
                Index::read(connection, &messages).await
            })
            .await?;
        messages
            .iter()
            .for_each(|found| page.count(found, &index, floor));
        next = end.next();
        if begun.elapsed() >= enough {
            break;
        }
    }
    Ok(Audit {
        from,
        through: next.previous().min(last),
        more: next <= last,
        counts: page.counts,
        offenders: page.offenders,
    })
}

/// The next messages up to `last`. What is appended meanwhile is for another part, or an audit would never end while
/// people talk.
async fn read(log: &StreamReader, from: Seq, last: Seq) -> Result<Vec<Found>, Trouble> {
    let found = log
        .every(from, Limit::within(CHUNK, CHUNK_BYTES, CHUNK_TIME))
        .await?;
    Ok(found
        .into_iter()
        .filter(|(message, _)| message.seq <= last)
        .map(Found::read)
        .collect())
}

/// A message of the log, as far as the index would know it.
struct Found {
    message: StreamMessage,
    content: Content,
    /// Whose it is and when the log received it; of a deletion, when it received the message. `None` for what cannot be stored.
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
    /// Nothing that can be stored: a dead letter, if the promise holds.
    Unfit,
}

impl Found {
    fn read((message, malformed): (StreamMessage, bool)) -> Found {
        let StreamMessage {
            seq,
            ref subject,
            ref payload,
            received_ms,
            ..
        } = message;
        let (content, age) = if malformed {
            (Content::Unfit, None)
        } else if let Ok(Change { deletion, room, .. }) =
            Change::parse(subject, payload, seq, received_ms)
        {
            let age = (room, deletion.received);
            (
                Content::Change {
                    target: deletion.target.as_i64(),
                    sender: deletion.user,
                    id: deletion.id,
                },
                Some(age),
            )
        } else {
            match parse(&message, NO_LIMITS) {
                Ok(incoming) => {
                    let age = (incoming.room.clone(), received_ms);
                    let (id, derived) = (incoming.shown_id(), incoming.id.is_none());
                    (
                        Content::Message {
                            id,
                            derived,
                            sender: incoming.user,
                        },
                        Some(age),
                    )
                }
                Err(_) => (Content::Unfit, None),
            }
        };
        Found {
            message,
            content,
            age,
        }
    }
}

/// A row of `messages`.
struct Row {
    sender: String,
    id: String,
    derived: bool,
    received_at: OffsetDateTime,
    deleted: bool,
}

/// What PostgreSQL has between two positions, as far as it is needed.
struct Index {
    rows: HashMap<i64, Row>,
    changes: HashMap<i64, (i64, String, String)>,
    letters: BTreeMap<i64, String>,
    elsewhere: HashSet<i64>,
    /// By room; without those in which nothing expires.
    cutoffs: HashMap<String, i64>,
}

impl Index {
    async fn read(connection: &mut PgConnection, messages: &[Found]) -> Result<Index, sqlx::Error> {
        let ends = [messages.first(), messages.last()]
            .map(|found| found.map_or(0, |found| found.message.seq.as_i64()));
        let rows: Vec<(i64, String, String, bool, OffsetDateTime, bool)> = sqlx::query_as(ROWS)
            .bind(ends[0])
            .bind(ends[1])
            .fetch_all(&mut *connection)
            .await?;
        let row = |(seq, sender, id, derived, received_at, deleted)| {
            (
                seq,
                Row {
                    sender,
                    id,
                    derived,
                    received_at,
                    deleted,
                },
            )
        };
        let mut index = Index {
            rows: rows.into_iter().map(row).collect(),
            changes: HashMap::new(),
            letters: BTreeMap::new(),
            elsewhere: HashSet::new(),
            cutoffs: HashMap::new(),
        };
        // Nearly always that is all.
        let left: Vec<&Found> = messages
            .iter()
            .filter(|found| index.stored(found).is_none())
            .collect();
        if left.is_empty() {
            return Ok(index);
        }
        let changes: Vec<(i64, i64, String, String)> = sqlx::query_as(CHANGES)
            .bind(ends[0])
            .bind(ends[1])
            .fetch_all(&mut *connection)
            .await?;
        let letters: Vec<(i64, String)> = sqlx::query_as(LETTERS)
            .bind(ends[0])
            .bind(ends[1])
            .fetch_all(&mut *connection)
            .await?;
        let named: Vec<(i64, &str, &str)> = left
            .iter()
            .filter_map(|found| match &found.content {
                Content::Message {
                    sender,
                    id,
                    derived: false,
                } => Some((found.message.seq.as_i64(), sender.as_str(), id.as_str())),
                _ => None,
            })
            .collect();
        let elsewhere: Vec<i64> = sqlx::query_scalar(ELSEWHERE)
            .bind(named.iter().map(|(seq, _, _)| *seq).collect::<Vec<i64>>())
            .bind(
                named
                    .iter()
                    .map(|(_, sender, _)| *sender)
                    .collect::<Vec<&str>>(),
            )
            .bind(named.iter().map(|(_, _, id)| *id).collect::<Vec<&str>>())
            .fetch_all(&mut *connection)
            .await?;
        let mut rooms: Vec<&str> = left
            .iter()
            .filter_map(|found| Some(found.age.as_ref()?.0.as_str()))
            .collect();
        rooms.sort_unstable();
        rooms.dedup();
        let cutoffs: Vec<(String, Option<i64>)> = sqlx::query_as(CUTOFFS)
            .bind(rooms)
            .fetch_all(connection)
            .await?;
        index.cutoffs = cutoffs
            .into_iter()
            .filter_map(|(room, cutoff_ms)| Some((room, cutoff_ms?)))
            .collect();
        index.changes = changes
            .into_iter()
            .map(|(seq, target, sender, id)| (seq, (target, sender, id)))
            .collect();
        index.letters = letters.into_iter().collect();
        index.elsewhere = elsewhere.into_iter().collect();
        Ok(index)
    }

    /// The message's own row. The time of receipt tells it from one of the same sender in the same place of a lost log.
    fn stored(&self, found: &Found) -> Option<&Row> {
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
        (same && row.received_at == instant(found.message.received_ms)).then_some(row)
    }

    /// Its room keeps messages for less long than this.
    fn has_expired(&self, found: &Found) -> bool {
        let Some((room, received_ms)) = &found.age else {
            return false;
        };
        self.cutoffs
            .get(room)
            .is_some_and(|cutoff_ms| received_ms <= cutoff_ms)
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

struct Page {
    counts: AuditCounts,
    offenders: Vec<Offender>,
    /// For so many offenders.
    room: usize,
}

impl Page {
    fn count(&mut self, found: &Found, index: &Index, floor: Seq) {
        let seq = found.message.seq;
        let counts = &mut self.counts;
        if let Some(row) = index.stored(found) {
            *(if row.deleted {
                &mut counts.deleted
            } else {
                &mut counts.stored
            }) += 1;
            return;
        }
        if index.has_change(found) {
            counts.changes += 1;
            return;
        }
        if let Some(reason) = index.letters.get(&seq.as_i64()) {
            *counts.dead_letters.entry(reason.clone()).or_default() += 1;
            return;
        }
        let mut missing = false;
        if index.elsewhere.contains(&seq.as_i64()) {
            counts.duplicates += 1;
        } else if seq > floor {
            counts.waiting += 1;
        } else if index.has_expired(found) {
            counts.expired += 1;
        } else {
            counts.missing += 1;
            missing = true;
        }
        // Whatever became of the message itself, nobody may find another one in its place.
        let taken =
            index.rows.contains_key(&seq.as_i64()) || index.changes.contains_key(&seq.as_i64());
        let what = match (taken, missing) {
            (true, _) => "another message is stored here",
            (false, true) => "acknowledged, and neither stored nor a dead letter",
            (false, false) => return,
        };
        if self.offenders.len() < self.room {
            self.offenders.push(Offender {
                seq,
                subject: found.message.subject.clone(),
                what: what.to_owned(),
            });
        }
    }
}
