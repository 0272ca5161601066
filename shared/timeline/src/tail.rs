//! The part of a conversation, or of several, that the stream has and PostgreSQL may not have yet, read
//! like `persist-message` reads it.

use std::collections::HashMap;

use futures::future::try_join_all;

use crate::message::parse;
use crate::union::{Cutoffs, Key, Side};
use base::seq::Seq;
use jetstream::stream::{Limit, StreamError, StreamMessage, StreamReader};
use protocol::change::Change;
use protocol::message::{Limits, Message};
use protocol::subject::CHANGES;

/// A tail that is not longer is read as a whole: then nothing in it is missed, and a message that stands
/// in it twice is known to.
const WHOLE: usize = 1_000;
const WHOLE_BYTES: usize = 1 << 20;
/// Deletions of all conversations together that are read for a page, before those of its own alone are.
const DELETIONS: usize = 200;
const DELETIONS_BYTES: usize = 256 << 10;
/// Deletions of one conversation that may wait to be stored; with more of them its pages are a 503.
const OWN_DELETIONS: usize = 10_000;
const OWN_DELETIONS_BYTES: usize = 8 << 20;

/// The messages on some subjects, such as one conversation's, as the stream has them: all of those from
/// `from` to `through`. Beyond these there may be some messages, and some missing.
#[derive(Debug, Default)]
pub struct Tail {
    /// Oldest first; what will become dead letters or is repeated within is left out.
    pub messages: Vec<Message>,
    /// When the stream received each of them, in Unix milliseconds.
    received_ms: HashMap<Seq, i64>,
    /// Sender and id of those whose sender gave an id.
    pub ids: Vec<Key>,
    /// Where each of these stands first.
    pub(crate) firsts: HashMap<Key, Seq>,
    /// Messages that were left out because they stand in it twice.
    pub repeated: usize,
    /// Everything of what was asked for was read.
    pub complete: bool,
    /// From here on everything was read.
    pub from: Seq,
    /// Up to here everything was read; [`Seq::MAX`] when the stream had nothing beyond.
    pub through: Seq,
}

/// The tail as the sides of a page need it.
#[derive(Debug)]
pub struct Tails(Vec<Tail>);

/// What was read of one subject.
pub(crate) struct Stretch {
    pub messages: Vec<StreamMessage>,
    pub complete: bool,
    pub from: Seq,
}

impl Tails {
    /// Reads what the stream has above `floor` for a page: all of it, if that is not much, and otherwise
    /// for each side what is nearest to its cursor, `need` if there is as much. `end` is the stream's last
    /// sequence.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn read(
        log: &StreamReader,
        subjects: &[String],
        (floor, end): (Seq, Seq),
        sides: &[Side],
        need: Limit,
        limits: Limits,
    ) -> Result<Tails, StreamError> {
        let settled = |side: &Side| matches!(side, Side::Older(before) if *before <= floor.next());
        if end <= floor || sides.iter().all(settled) {
            return Ok(Tails(vec![Tail::empty(floor.next())]));
        }
        let all = Limit {
            messages: WHOLE,
            bytes: WHOLE_BYTES,
            ..need
        };
        let whole = Tail::oldest(log, subjects, floor.next(), all, limits).await?;
        if whole.complete || whole.through >= end {
            return Ok(Tails(vec![whole]));
        }
        let mut tails = Vec::with_capacity(sides.len());
        for side in sides {
            tails.push(match *side {
                Side::Older(before) => {
                    Tail::newest(
                        log,
                        subjects,
                        floor.next(),
                        before.min(end.next()),
                        need,
                        limits,
                    )
                    .await?
                }
                Side::Newer(after) => {
                    Tail::oldest(log, subjects, floor.max(after).next(), need, limits).await?
                }
            });
        }
        Ok(Tails(tails))
    }

    /// All of them, for what a [`Union`](crate::union::Union) has to know.
    pub fn all(&self) -> &[Tail] {
        &self.0
    }

    /// That of one side, by its place among the sides.
    pub fn of(&self, side: usize) -> &Tail {
        self.0.get(side).unwrap_or(&self.0[0])
    }

    /// There is no message.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|tail| tail.messages.is_empty())
    }

    /// Messages that were left out because they stand in it twice.
    pub fn repeated(&self) -> usize {
        self.0.iter().map(|tail| tail.repeated).sum()
    }
}

#[cfg(test)]
impl Tails {
    pub(crate) fn of_sides(tails: Vec<Tail>) -> Tails {
        Tails(tails)
    }
}

impl From<Tail> for Tails {
    fn from(tail: Tail) -> Tails {
        Tails(vec![tail])
    }
}

impl Tail {
    /// Nothing was there from `from` on.
    pub fn empty(from: Seq) -> Tail {
        Tail {
            complete: true,
            from,
            through: Seq::MAX,
            ..Tail::default()
        }
    }

    /// The newest messages in `from..before`: at least `need` if there are as many.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn newest(
        log: &StreamReader,
        subjects: &[String],
        from: Seq,
        before: Seq,
        need: Limit,
        limits: Limits,
    ) -> Result<Tail, StreamError> {
        let read = try_join_all(
            subjects
                .iter()
                .map(|subject| newest_of(log, subject, from, before, need, limits)),
        )
        .await?;
        Ok(Tail::of_newest(read, before, limits))
    }

    /// Below the highest beginning of the subjects that were cut, some messages are missing.
    pub(crate) fn of_newest(read: Vec<Stretch>, before: Seq, limits: Limits) -> Tail {
        let begin = read
            .iter()
            .filter(|stretch| !stretch.complete)
            .map(|stretch| stretch.from)
            .max();
        let from = begin
            .or_else(|| read.iter().map(|stretch| stretch.from).max())
            .unwrap_or_default();
        Tail::of(read, from, before.previous(), limits)
    }

    /// The oldest messages from `from` on: at least `need` if there are as many, or about so many bytes.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn oldest(
        log: &StreamReader,
        subjects: &[String],
        from: Seq,
        need: Limit,
        limits: Limits,
    ) -> Result<Tail, StreamError> {
        let read = try_join_all(
            subjects
                .iter()
                .map(|subject| oldest_of(log, subject, from, need, limits)),
        )
        .await?;
        Ok(Tail::of_oldest(read, from, limits))
    }

    /// Beyond the lowest end of the subjects that were cut, some messages are missing.
    pub(crate) fn of_oldest(read: Vec<Stretch>, from: Seq, limits: Limits) -> Tail {
        let ends = read.iter().filter(|stretch| !stretch.complete);
        let through = ends
            .map(|stretch| {
                stretch
                    .messages
                    .last()
                    .map_or(from.previous(), |last| last.seq)
            })
            .min();
        Tail::of(read, from, through.unwrap_or(Seq::MAX), limits)
    }

    fn of(read: Vec<Stretch>, from: Seq, through: Seq, limits: Limits) -> Tail {
        let complete = read.iter().all(|stretch| stretch.complete);
        let mut messages: Vec<StreamMessage> = read
            .into_iter()
            .flat_map(|stretch| stretch.messages)
            .collect();
        messages.sort_by_key(|message| message.seq);
        let mut tail = Tail {
            complete,
            from,
            through,
            ..Tail::default()
        };
        for message in messages {
            let Ok(incoming) = parse(&message, limits) else {
                continue;
            };
            if let Some(id) = &incoming.id {
                let key = (incoming.user.clone(), id.clone());
                if tail.firsts.contains_key(&key) {
                    tail.repeated += 1;
                    continue;
                }
                tail.firsts.insert(key.clone(), incoming.seq);
                tail.ids.push(key);
            }
            tail.received_ms.insert(incoming.seq, message.received_ms);
            tail.messages.push(incoming.into_message());
        }
        tail
    }

    /// The messages that have not expired.
    pub fn alive(&self, cutoffs: &Cutoffs) -> impl Iterator<Item = &Message> {
        self.messages
            .iter()
            .filter(move |message| !self.is_expired(message, cutoffs))
    }

    /// Some of it has expired. The stream is in the order of receipt: what is older in the conversation has, too.
    pub fn expired(&self, cutoffs: &Cutoffs) -> bool {
        self.messages
            .iter()
            .any(|message| self.is_expired(message, cutoffs))
    }

    fn is_expired(&self, message: &Message, cutoffs: &Cutoffs) -> bool {
        self.received_ms
            .get(&message.seq)
            .is_some_and(|received_ms| cutoffs.expired(&message.room, *received_ms))
    }
}

/// Every change on `subject` from `from` on, oldest first.
///
/// # Errors
/// The log does not answer; there are more than `limit` allows, and without all of them a reader
/// might be shown what was deleted.
pub async fn changes(
    log: &StreamReader,
    subject: &str,
    from: Seq,
    limit: Limit,
) -> Result<Vec<Change>, StreamError> {
    let window = log.first(subject, from, limit).await?;
    if !window.complete {
        return Err(StreamError::TooMuch("deletions"));
    }
    Ok(window.messages.iter().filter_map(parse_change).collect())
}

/// The changes of all conversations from `from` on; `None` when they are not few.
///
/// # Errors
/// The log does not answer.
pub async fn few_changes(
    log: &StreamReader,
    from: Seq,
    until: tokio::time::Instant,
) -> Result<Option<Vec<Change>>, StreamError> {
    let window = log
        .first(
            CHANGES,
            from,
            Limit {
                messages: DELETIONS,
                bytes: DELETIONS_BYTES,
                until,
            },
        )
        .await?;
    Ok(window
        .complete
        .then(|| window.messages.iter().filter_map(parse_change).collect()))
}

/// The changes on some subjects, such as those of one conversation, from `from` on.
///
/// # Errors
/// As [`changes`]: there may be 10,000 of each.
pub async fn own_changes(
    log: &StreamReader,
    subjects: &[String],
    from: Seq,
    until: tokio::time::Instant,
) -> Result<Vec<Change>, StreamError> {
    let limit = Limit {
        messages: OWN_DELETIONS,
        bytes: OWN_DELETIONS_BYTES,
        until,
    };
    let read = try_join_all(
        subjects
            .iter()
            .map(|subject| changes(log, subject, from, limit)),
    )
    .await?;
    Ok(read.into_iter().flatten().collect())
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

async fn newest_of(
    log: &StreamReader,
    subject: &str,
    from: Seq,
    before: Seq,
    need: Limit,
    limits: Limits,
) -> Result<Stretch, StreamError> {
    let mut windows: Vec<Vec<StreamMessage>> = Vec::new();
    let (mut before, mut good, mut bytes, mut complete) = (before, 0, 0, false);
    while good < need.messages && bytes < need.bytes && !complete {
        let window = log.last(subject, from, before, need).await?;
        complete = window.complete || window.messages.is_empty();
        before = window.messages.first().map_or(before, |first| first.seq);
        good += window
            .messages
            .iter()
            .filter(|message| parse(message, limits).is_ok())
            .count();
        bytes += window
            .messages
            .iter()
            .map(|message| message.payload.len())
            .sum::<usize>();
        windows.push(window.messages);
    }
    let messages = windows.into_iter().rev().flatten().collect();
    let from = if complete { from } else { before };
    Ok(Stretch {
        messages,
        complete,
        from,
    })
}

async fn oldest_of(
    log: &StreamReader,
    subject: &str,
    from: Seq,
    need: Limit,
    limits: Limits,
) -> Result<Stretch, StreamError> {
    let mut messages = Vec::new();
    let (mut next, mut good, mut bytes, mut complete) = (from, 0, 0, false);
    while good < need.messages && bytes < need.bytes && !complete {
        let window = log.first(subject, next, need).await?;
        complete = window.complete || window.messages.is_empty();
        next = window.messages.last().map_or(next, |last| last.seq.next());
        for message in window.messages {
            if parse(&message, limits).is_ok() {
                good += 1;
            }
            // What will be a dead letter costs memory, too.
            bytes += message.payload.len();
            messages.push(message);
        }
    }
    Ok(Stretch {
        messages,
        complete,
        from,
    })
}
