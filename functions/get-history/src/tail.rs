//! The part of a room the log has and PostgreSQL may not have yet.

use std::collections::HashSet;

use runtime::{Log, LogError, LogMessage};
use wire::{Conversation, Incoming, Limits, Message, Seq};

/// A stretch of one room's messages as the log has them, read like `persist-message` reads them.
#[derive(Debug, Default)]
pub struct Tail {
    /// Oldest first; what will become dead letters or is repeated within is left out.
    pub messages: Vec<Message>,
    /// Sender and id of those whose sender gave an id.
    pub ids: Vec<(String, String)>,
    /// Everything of the range was read.
    pub complete: bool,
    /// The stretch begins here: below, nothing was read.
    pub from: Seq,
    /// The last sequence read, storable or not; `None` when the log had nothing.
    pub last: Option<Seq>,
}

/// The newest messages in `from..before`: at least `need` if there are as many.
///
/// # Errors
/// The log does not answer.
pub async fn newest(log: &Log, conversation: &Conversation, from: Seq, before: Seq, need: usize, limits: Limits) -> Result<Tail, LogError> {
    let subject = conversation.log_subjects().swap_remove(0);
    let mut windows: Vec<Vec<LogMessage>> = Vec::new();
    let (mut before, mut good, mut complete) = (before, 0, false);
    while good < need && !complete {
        let window = log.last(&subject, from, before, need).await?;
        complete = window.complete || window.messages.is_empty();
        before = window.messages.first().map_or(before, |first| first.seq);
        good += window.messages.iter().filter(|message| parse(message, limits).is_some()).count();
        windows.push(window.messages);
    }
    let messages = windows.into_iter().rev().flatten().collect();
    let from = if complete { from } else { before };
    Ok(read(messages, complete, from, limits))
}

/// The oldest messages from `from` on: at least `need` if there are as many, or about `max_bytes`.
///
/// # Errors
/// The log does not answer.
pub async fn oldest(
    log: &Log,
    conversation: &Conversation,
    from: Seq,
    need: usize,
    max_bytes: usize,
    limits: Limits,
) -> Result<Tail, LogError> {
    let subject = conversation.log_subjects().swap_remove(0);
    let mut messages = Vec::new();
    let (mut next, mut good, mut bytes, mut complete) = (from, 0, 0, false);
    while good < need && bytes < max_bytes && !complete {
        let window = log.first(&subject, next, need, max_bytes).await?;
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
    Ok(read(messages, complete, from, limits))
}

fn read(messages: Vec<LogMessage>, complete: bool, from: Seq, limits: Limits) -> Tail {
    let mut tail = Tail { complete, from, last: messages.last().map(|message| message.seq), ..Tail::default() };
    let mut seen = HashSet::new();
    for incoming in messages.iter().filter_map(|message| parse(message, limits)) {
        if let Some(id) = &incoming.id {
            let key = (incoming.user.clone(), id.clone());
            if !seen.insert(key.clone()) {
                continue;
            }
            tail.ids.push(key);
        }
        tail.messages.push(incoming.into_message());
    }
    tail
}

fn parse(message: &LogMessage, limits: Limits) -> Option<Incoming> {
    Incoming::parse(&message.subject, message.message_id(), &message.payload, message.seq, message.received_ms, limits).ok()
}
