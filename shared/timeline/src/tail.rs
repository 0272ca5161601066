//! The tail: the part of a conversation, or of several, that the stream has and PostgreSQL may not
//! have yet, parsed as `persist-message` parses it.

use std::collections::HashMap;

use futures::future::try_join_all;

use crate::cutoffs::Cutoffs;
use crate::dedup::Key;
use crate::frontier::Frontier;
use crate::merge::Direction;
use crate::message::parse;
use base::seq::Seq;
use jetstream::stream::{Limit, StreamError, StreamMessage, StreamReader};
use protocol::message::{Limits, Message};

/// A tail that is not longer than this is read as a whole. Then it lacks nothing, and we know of
/// each message that stands in it twice.
const WHOLE: usize = 1_000;
const WHOLE_BYTES: usize = 1 << 20;

/// The messages on some subjects, such as those of one conversation, as the stream has them:
/// everything from `from` to `through`. Outside of this range it may hold some messages and lack
/// others.
#[derive(Debug, Default)]
pub struct Tail {
    /// Oldest first. Messages that will become dead letters are left out, and so are duplicates
    /// within the tail.
    pub messages: Vec<Message>,
    /// When the stream received each of them, in Unix milliseconds.
    received_ms: HashMap<Seq, i64>,
    /// The keys of those whose sender supplied an id.
    pub ids: Vec<Key>,
    /// Where each of these keys stands first.
    pub(crate) firsts: HashMap<Key, Seq>,
    /// How many messages were left out as duplicates.
    pub duplicates: usize,
    /// All that was asked for was read.
    pub complete: bool,
    /// From here on everything was read.
    pub from: Seq,
    /// Up to here everything was read; [`Seq::MAX`] when the stream had nothing beyond.
    pub through: Seq,
}

/// The tail as a page needs it: one that serves all its directions, or one for each.
#[derive(Debug)]
pub struct Tails(Vec<Tail>);

/// What was read of one subject.
pub(crate) struct SubjectRange {
    pub messages: Vec<StreamMessage>,
    pub complete: bool,
    pub from: Seq,
}

impl Tails {
    /// Reads what the stream has above `frontier.stored_through` for a page: all of it, if that is
    /// not much. Otherwise it reads, for each direction, the messages nearest to the cursor:
    /// `need`, if there are as many.
    ///
    /// # Errors
    /// The stream does not answer.
    pub async fn read(
        stream: &StreamReader,
        subjects: &[String],
        frontier: Frontier,
        directions: &[Direction],
        need: Limit,
        limits: Limits,
    ) -> Result<Tails, StreamError> {
        let from = frontier.first_unstored();
        let is_stored = |direction: &Direction| match direction {
            Direction::Older(before) => *before <= from,
            Direction::Newer(_) => false,
        };
        if frontier.is_all_stored() || directions.iter().all(is_stored) {
            return Ok(Tails(vec![Tail::empty(from)]));
        }
        let all = Limit {
            messages: WHOLE,
            bytes: WHOLE_BYTES,
            ..need
        };
        let whole = Tail::oldest(stream, subjects, from, all, limits).await?;
        if whole.complete || whole.through >= frontier.end {
            return Ok(Tails(vec![whole]));
        }
        let mut tails = Vec::with_capacity(directions.len());
        for direction in directions {
            let tail = match *direction {
                Direction::Older(before) => {
                    let before = before.min(frontier.end.next());
                    Tail::newest(stream, subjects, from, before, need, limits).await?
                }
                Direction::Newer(after) => {
                    let from = frontier.stored_through.max(after).next();
                    Tail::oldest(stream, subjects, from, need, limits).await?
                }
            };
            tails.push(tail);
        }
        Ok(Tails(tails))
    }

    /// All of them, for a [`Merge`](crate::merge::Merge).
    pub fn all(&self) -> &[Tail] {
        &self.0
    }

    /// That of one direction, by its number among the directions.
    pub fn of(&self, direction: usize) -> &Tail {
        self.0.get(direction).unwrap_or(&self.0[0])
    }

    /// There is no message.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|tail| tail.messages.is_empty())
    }

    /// How many messages were left out as duplicates.
    pub fn duplicates(&self) -> usize {
        self.0.iter().map(|tail| tail.duplicates).sum()
    }
}

#[cfg(test)]
impl Tails {
    pub(crate) fn of_directions(tails: Vec<Tail>) -> Tails {
        Tails(tails)
    }
}

impl From<Tail> for Tails {
    fn from(tail: Tail) -> Tails {
        Tails(vec![tail])
    }
}

impl Tail {
    /// The stream had nothing from `from` on.
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
    /// The stream does not answer.
    pub async fn newest(
        stream: &StreamReader,
        subjects: &[String],
        from: Seq,
        before: Seq,
        need: Limit,
        limits: Limits,
    ) -> Result<Tail, StreamError> {
        let ranges = subjects
            .iter()
            .map(|subject| newest_on(stream, subject, from, before, need, limits));
        let ranges = try_join_all(ranges).await?;
        Ok(Tail::of_newest(ranges, before, limits))
    }

    /// Some subjects may have been cut at their beginning. Below the highest of these beginnings
    /// some messages are missing.
    pub(crate) fn of_newest(ranges: Vec<SubjectRange>, before: Seq, limits: Limits) -> Tail {
        let cut = ranges
            .iter()
            .filter(|range| !range.complete)
            .map(|range| range.from)
            .max();
        let from = cut
            .or_else(|| ranges.iter().map(|range| range.from).max())
            .unwrap_or_default();
        Tail::of(ranges, from, before.previous(), limits)
    }

    /// The oldest messages from `from` on: at least `need` if there are as many, or about so many
    /// bytes.
    ///
    /// # Errors
    /// The stream does not answer.
    pub async fn oldest(
        stream: &StreamReader,
        subjects: &[String],
        from: Seq,
        need: Limit,
        limits: Limits,
    ) -> Result<Tail, StreamError> {
        let ranges = subjects
            .iter()
            .map(|subject| oldest_on(stream, subject, from, need, limits));
        let ranges = try_join_all(ranges).await?;
        Ok(Tail::of_oldest(ranges, from, limits))
    }

    /// Some subjects may have been cut at their end. Beyond the lowest of these ends some messages
    /// are missing.
    pub(crate) fn of_oldest(ranges: Vec<SubjectRange>, from: Seq, limits: Limits) -> Tail {
        let end = |range: &SubjectRange| {
            range
                .messages
                .last()
                .map_or(from.previous(), |last| last.seq)
        };
        let cut = ranges.iter().filter(|range| !range.complete);
        let through = cut.map(end).min().unwrap_or(Seq::MAX);
        Tail::of(ranges, from, through, limits)
    }

    fn of(ranges: Vec<SubjectRange>, from: Seq, through: Seq, limits: Limits) -> Tail {
        let complete = ranges.iter().all(|range| range.complete);
        let mut messages: Vec<StreamMessage> = ranges
            .into_iter()
            .flat_map(|range| range.messages)
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
                    tail.duplicates += 1;
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
    pub fn unexpired(&self, cutoffs: &Cutoffs) -> impl Iterator<Item = &Message> {
        self.messages
            .iter()
            .filter(move |message| !self.is_expired(message, cutoffs))
    }

    /// Some message of it has expired. The stream is in the order of receipt, so everything older
    /// in the conversation has expired, too.
    pub fn has_expired(&self, cutoffs: &Cutoffs) -> bool {
        self.messages
            .iter()
            .any(|message| self.is_expired(message, cutoffs))
    }

    fn is_expired(&self, message: &Message, cutoffs: &Cutoffs) -> bool {
        self.received_ms
            .get(&message.seq)
            .is_some_and(|received_ms| cutoffs.is_expired(&message.room, *received_ms))
    }
}

async fn newest_on(
    stream: &StreamReader,
    subject: &str,
    from: Seq,
    before: Seq,
    need: Limit,
    limits: Limits,
) -> Result<SubjectRange, StreamError> {
    let mut windows: Vec<Vec<StreamMessage>> = Vec::new();
    let mut before = before;
    let mut kept = Kept::default();
    let mut complete = false;
    while !kept.fulfils(need) && !complete {
        let window = stream.last(subject, from, before, need).await?;
        complete = window.complete || window.messages.is_empty();
        before = window.messages.first().map_or(before, |first| first.seq);
        kept.count(&window.messages, limits);
        windows.push(window.messages);
    }
    Ok(SubjectRange {
        messages: windows.into_iter().rev().flatten().collect(),
        complete,
        from: if complete { from } else { before },
    })
}

async fn oldest_on(
    stream: &StreamReader,
    subject: &str,
    from: Seq,
    need: Limit,
    limits: Limits,
) -> Result<SubjectRange, StreamError> {
    let mut messages = Vec::new();
    let mut next = from;
    let mut kept = Kept::default();
    let mut complete = false;
    while !kept.fulfils(need) && !complete {
        let window = stream.first(subject, next, need).await?;
        complete = window.complete || window.messages.is_empty();
        next = window.messages.last().map_or(next, |last| last.seq.next());
        kept.count(&window.messages, limits);
        messages.extend(window.messages);
    }
    Ok(SubjectRange {
        messages,
        complete,
        from,
    })
}

/// How much was read of one subject.
#[derive(Default)]
struct Kept {
    /// Without messages that will become dead letters.
    messages: usize,
    /// With them, because they cost memory, too.
    bytes: usize,
}

impl Kept {
    fn count(&mut self, messages: &[StreamMessage], limits: Limits) {
        for message in messages {
            self.messages += usize::from(parse(message, limits).is_ok());
            self.bytes += message.payload.len();
        }
    }

    fn fulfils(&self, need: Limit) -> bool {
        self.messages >= need.messages || self.bytes >= need.bytes
    }
}
