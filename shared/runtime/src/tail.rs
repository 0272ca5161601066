//! The part of a conversation, or of several, the log has and PostgreSQL may not have yet, read like `persist-message` reads it.

use std::collections::{HashMap, HashSet};

use futures::future::try_join_all;
use wire::{Change, Incoming, Limits, Message, Seq};

use crate::{Limit, Log, LogError, LogMessage};

/// A stretch of the messages on some subjects, such as one conversation's, as the log has them. There is no hole in it between `from` and `last`; beyond these there may
/// be some messages, and some missing.
#[derive(Debug, Clone, Default)]
pub struct Tail {
    /// Oldest first; what will become dead letters or is repeated within is left out.
    pub messages: Vec<Message>,
    /// When the log took each of them, in Unix milliseconds.
    received_ms: HashMap<Seq, i64>,
    /// Sender and id of those whose sender gave an id.
    pub ids: Vec<(String, String)>,
    /// Everything of the range was read.
    pub complete: bool,
    /// The stretch begins here: below, nothing was read.
    pub from: Seq,
    /// The last sequence read, storable or not; `None` when the log had nothing.
    pub last: Option<Seq>,
    /// Some of it has expired and was left out. The log is in the order of receipt: what is older in the conversation has, too.
    pub expired: bool,
}

/// What was read of one subject.
struct Stretch {
    messages: Vec<LogMessage>,
    complete: bool,
    from: Seq,
}

impl Tail {
    /// The newest messages in `from..before`: at least `need` if there are as many.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn newest(log: &Log, subjects: &[String], from: Seq, before: Seq, need: Limit, limits: Limits) -> Result<Tail, LogError> {
        let read = try_join_all(subjects.iter().map(|subject| newest_of(log, subject, from, before, need, limits))).await?;
        // Below the highest beginning of those that were cut, some are missing.
        let begin = read.iter().filter(|stretch| !stretch.complete).map(|stretch| stretch.from).max();
        let mut tail = merge(read, limits);
        tail.from = begin.unwrap_or(tail.from);
        Ok(tail)
    }

    /// The oldest messages from `from` on: at least `need` if there are as many, or about `max_bytes`.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn oldest(log: &Log, subjects: &[String], from: Seq, need: Limit, limits: Limits) -> Result<Tail, LogError> {
        let read = try_join_all(subjects.iter().map(|subject| oldest_of(log, subject, from, need, limits))).await?;
        // Beyond the lowest end of those that were cut, some are missing.
        let ends = read.iter().filter(|stretch| !stretch.complete);
        let end = ends.map(|stretch| stretch.messages.last().map_or(from.previous(), |last| last.seq)).min();
        let mut tail = merge(read, limits);
        tail.last = end.or(tail.last);
        Ok(tail)
    }

    /// Leaves out what has expired: what the log took at `cutoff_ms`, in Unix milliseconds, or before. The stretch that was read
    /// stays as it is.
    pub fn expire(&mut self, cutoff_ms: Option<i64>) {
        self.expire_each(|_| cutoff_ms);
    }

    /// The same for messages of several conversations, each with a cutoff of its own.
    pub fn expire_each(&mut self, cutoff_ms: impl Fn(&str) -> Option<i64>) {
        let (received_ms, before) = (&self.received_ms, self.messages.len());
        let alive = |message: &Message| {
            let Some(cutoff_ms) = cutoff_ms(&message.room) else { return true };
            received_ms.get(&message.seq).is_none_or(|received_ms| *received_ms > cutoff_ms)
        };
        self.messages.retain(alive);
        self.expired |= self.messages.len() < before;
    }
}

/// Every change on `subject` from `from` on, oldest first.
///
/// # Errors
/// The log does not answer; there are more than `limit` allows, and without all of them a reader
/// might be shown what was deleted.
pub async fn changes(log: &Log, subject: &str, from: Seq, limit: Limit) -> Result<Vec<Change>, LogError> {
    let window = log.first(subject, from, limit).await?;
    if !window.complete {
        return Err(LogError::TooMuch("deletions"));
    }
    let read = |message: &LogMessage| Change::parse(&message.subject, &message.payload, message.seq, message.received_ms).ok();
    Ok(window.messages.iter().filter_map(read).collect())
}

async fn newest_of(log: &Log, subject: &str, from: Seq, before: Seq, need: Limit, limits: Limits) -> Result<Stretch, LogError> {
    let mut windows: Vec<Vec<LogMessage>> = Vec::new();
    let (mut before, mut good, mut bytes, mut complete) = (before, 0, 0, false);
    while good < need.messages && bytes < need.bytes && !complete {
        let window = log.last(subject, from, before, need).await?;
        complete = window.complete || window.messages.is_empty();
        before = window.messages.first().map_or(before, |first| first.seq);
        good += window.messages.iter().filter(|message| parse(message, limits).is_some()).count();
        bytes += window.messages.iter().map(|message| message.payload.len()).sum::<usize>();
        windows.push(window.messages);
    }
    let messages = windows.into_iter().rev().flatten().collect();
    let from = if complete { from } else { before };
    Ok(Stretch { messages, complete, from })
}

async fn oldest_of(log: &Log, subject: &str, from: Seq, need: Limit, limits: Limits) -> Result<Stretch, LogError> {
    let mut messages = Vec::new();
    let (mut next, mut good, mut bytes, mut complete) = (from, 0, 0, false);
    while good < need.messages && bytes < need.bytes && !complete {
        let window = log.first(subject, next, need).await?;
        complete = window.complete || window.messages.is_empty();
        next = window.messages.last().map_or(next, |last| last.seq.next());
        for message in window.messages {
            if parse(&message, limits).is_some() {
                good += 1;
                bytes += message.payload.len();
            }
            messages.push(message);
        }
    }
    Ok(Stretch { messages, complete, from })
}

fn merge(read: Vec<Stretch>, limits: Limits) -> Tail {
    let complete = read.iter().all(|stretch| stretch.complete);
    let from = read.iter().map(|stretch| stretch.from).max().unwrap_or_default();
    let mut messages: Vec<LogMessage> = read.into_iter().flat_map(|stretch| stretch.messages).collect();
    messages.sort_by_key(|message| message.seq);
    let mut tail = Tail { complete, from, last: messages.last().map(|message| message.seq), ..Tail::default() };
    let mut seen = HashSet::new();
    for (incoming, received_ms) in messages.iter().filter_map(|message| Some((parse(message, limits)?, message.received_ms))) {
        if let Some(id) = &incoming.id {
            let key = (incoming.user.clone(), id.clone());
            if !seen.insert(key.clone()) {
                continue;
            }
            tail.ids.push(key);
        }
        tail.received_ms.insert(incoming.seq, received_ms);
        tail.messages.push(incoming.into_message());
    }
    tail
}

fn parse(message: &LogMessage, limits: Limits) -> Option<Incoming> {
    Incoming::parse(&message.subject, message.message_id(), &message.payload, message.seq, message.received_ms, limits).ok()
}
