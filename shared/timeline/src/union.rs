//! The union of stream and projection: what a reader of a conversation is shown.
//!
//! Everything here is a pure function of what was read, and right only when it was read in this order:
//!
//! 1. the floor and the stream's last sequence, `end`, in either order. Up to the floor everything was
//!    committed to PostgreSQL; a page never claims anything beyond `end`.
//! 2. the tail: the messages above the floor that the stream still holds.
//! 3. the deletions above the floor. What a hard deletion erased before the tail was read has its
//!    deletion here, because that is appended first.
//! 4. the projection, bounded by `end`. What was trimmed before steps 2 and 3 was committed before it was
//!    trimmed, so it is here, above the floor or not.
//!
//! So a position up to `end` is in the tail, or was erased, or is in the projection. Above `end` the
//! projection may have holes, because workers store batches in any order.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::RangeInclusive;

use crate::tail::Tail;
use base::seq::Seq;
use protocol::change::{Change, ChangeEntry};
use protocol::message::{Message, derived_id};

/// Sender and id: what makes it one message, wherever copies of it stand.
pub type Key = (String, String);

/// The key of a message as shown.
pub fn key(message: &Message) -> Key {
    (message.user.clone(), message.id.clone())
}

/// Which way a page goes from its cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The newest before this sequence.
    Older(Seq),
    /// The oldest after this sequence.
    Newer(Seq),
}

/// Since when messages count, by conversation, in Unix milliseconds.
#[derive(Debug, Clone, Default)]
pub struct Cutoffs(HashMap<String, i64>);

impl Cutoffs {
    /// Of one conversation; `None` where nothing expires.
    pub fn of_one(room: &str, cutoff_ms: Option<i64>) -> Cutoffs {
        Cutoffs::from_iter([(room.to_owned(), cutoff_ms)])
    }

    /// Whether what the log received then has expired.
    pub fn expired(&self, room: &str, received_ms: i64) -> bool {
        self.0
            .get(room)
            .is_some_and(|cutoff_ms| received_ms <= *cutoff_ms)
    }
}

impl FromIterator<(String, Option<i64>)> for Cutoffs {
    fn from_iter<I: IntoIterator<Item = (String, Option<i64>)>>(cutoffs: I) -> Cutoffs {
        Cutoffs(
            cutoffs
                .into_iter()
                .filter_map(|(room, cutoff_ms)| Some((room, cutoff_ms?)))
                .collect(),
        )
    }
}

/// Rows of the projection in a row, none of them expired.
#[derive(Debug, Default)]
pub struct Rows {
    /// In the order of the side they were read on.
    pub messages: Vec<Message>,
    /// Beyond this place there may be others; `None` when these are all.
    pub reach: Option<Seq>,
}

/// One side of a page: no holes, oldest first.
#[derive(Debug)]
pub struct Part {
    /// Perhaps more than were asked for.
    pub messages: Vec<Message>,
    /// There may be more beyond.
    pub more: bool,
    /// Everything up to here was read.
    pub through: Seq,
    /// The projection did not have all of it.
    pub from_log: bool,
}

/// What is known beside the messages themselves. Deletions up to the floor have been applied in the
/// projection; those above are applied here.
#[derive(Debug)]
pub struct Union<'a> {
    /// Where the projection has the ids of the tail and of what was deleted above the floor.
    known: HashMap<Key, Seq>,
    /// Deletions above the floor.
    changes: Vec<&'a Change>,
    cutoffs: Cutoffs,
    /// Of several messages with one id the first is the message: where it stands, as far as anybody knows.
    firsts: HashMap<Key, Seq>,
}

/// What a reader is shown.
#[derive(Debug, Default)]
pub struct Merged {
    /// By position.
    pub messages: BTreeMap<Seq, Message>,
    /// The projection did not have all of it.
    pub from_log: bool,
}

impl<'a> Union<'a> {
    /// What was read beside the rows.
    pub fn new(
        known: HashMap<Key, Seq>,
        changes: Vec<&'a Change>,
        cutoffs: Cutoffs,
        tails: &[Tail],
    ) -> Union<'a> {
        let deleted = changes
            .iter()
            .filter(|change| !change.deletion.derived)
            .map(|change| {
                let tombstone = change.tombstone();
                (key(&tombstone), tombstone.seq)
            });
        let in_tail = tails
            .iter()
            .flat_map(|tail| tail.firsts.iter().map(|(key, seq)| (key.clone(), *seq)));
        let mut firsts = known.clone();
        for (key, seq) in deleted.chain(in_tail).collect::<Vec<_>>() {
            firsts
                .entry(key)
                .and_modify(|first| *first = seq.min(*first))
                .or_insert(seq);
        }
        Union {
            known,
            changes,
            cutoffs,
            firsts,
        }
    }

    /// The keys to look up for what is known: those of the tails, and of what `changes` delete.
    pub fn keys(tails: &[Tail], changes: &[&Change]) -> Vec<Key> {
        let deleted = changes
            .iter()
            .filter(|change| !change.deletion.derived)
            .map(|change| key(&change.tombstone()));
        tails
            .iter()
            .flat_map(|tail| tail.ids.iter().cloned())
            .chain(deleted)
            .collect()
    }

    /// One side of a page. `tail` holds what the stream has of the conversation above `floor`, and `end`
    /// is the stream's last sequence, asked before the tail was read.
    pub fn part(&self, side: Side, floor: Seq, end: Seq, tail: &Tail, rows: Rows) -> Part {
        let tail_cut =
            (tail.from > floor.next() && !tail.expired(&self.cutoffs)).then_some(tail.from);
        let (within, more) = match side {
            Side::Older(before) => {
                let reach = rows.reach.max(tail_cut);
                (
                    reach.unwrap_or(Seq::ZERO)..=before.previous().min(end),
                    reach.is_some(),
                )
            }
            Side::Newer(after) => {
                let reach = [Some(end), Some(tail.through), rows.reach]
                    .into_iter()
                    .flatten()
                    .min()
                    .unwrap_or(end);
                (after.next()..=reach, reach < end)
            }
        };
        let merged = self.merge(rows.messages, tail, &within, &within);
        let messages = merged.messages.into_values().collect();
        Part {
            messages,
            more,
            through: *within.end(),
            from_log: merged.from_log,
        }
    }

    /// The rows of the projection and the messages of the tail as far as they lie `within`, and
    /// tombstones in the range `graves` for what was erased from the stream before anybody stored it. The
    /// rows must be all the projection has in that range.
    pub fn merge(
        &self,
        rows: Vec<Message>,
        tail: &Tail,
        within: &RangeInclusive<Seq>,
        graves: &RangeInclusive<Seq>,
    ) -> Merged {
        let mut merged = Merged::default();
        let mut stored = HashMap::new();
        for message in rows {
            stored.insert(message.seq, message.deleted);
            // A worker stored the later of two messages with one id first; the earlier one takes its place soon.
            if within.contains(&message.seq) && self.is_first(&message) {
                merged.messages.insert(message.seq, message);
            }
        }
        for message in tail
            .alive(&self.cutoffs)
            .filter(|message| within.contains(&message.seq) && self.is_first(message))
        {
            let known = self.known.get(&key(message)) == Some(&message.seq);
            merged.from_log |= !stored.contains_key(&message.seq) && !known;
            // What the projection has as deleted was deleted while we were reading.
            if stored.get(&message.seq) != Some(&true) {
                merged.messages.insert(message.seq, message.clone());
            }
        }
        merged.from_log |= self.bury(&mut merged.messages, graves);
        merged
    }

    /// The changes a reader is told of within `range`: those of the projection and those of the stream,
    /// each once; and whether the projection lacked any.
    pub fn entries(
        &self,
        indexed: Vec<ChangeEntry>,
        range: &RangeInclusive<Seq>,
    ) -> (Vec<ChangeEntry>, bool) {
        let mut entries: BTreeMap<Seq, ChangeEntry> = indexed
            .into_iter()
            .map(|entry| (entry.seq, entry))
            .collect();
        entries.retain(|seq, _| range.contains(seq));
        let stored = entries.len();
        for change in self.told().filter(|change| range.contains(&change.seq)) {
            entries.entry(change.seq).or_insert_with(|| change.entry());
        }
        let lacked = entries.len() > stored;
        (entries.into_values().collect(), lacked)
    }

    /// Whether no earlier message has its id.
    fn is_first(&self, message: &Message) -> bool {
        message.id == derived_id(message.seq)
            || self
                .firsts
                .get(&key(message))
                .is_none_or(|&first| first >= message.seq)
    }

    /// The deletions a reader is told of: those of messages that have not expired.
    fn told(&self) -> impl Iterator<Item = &'_ Change> {
        self.changes
            .iter()
            .copied()
            .filter(|change| !self.cutoffs.expired(&change.room, change.deletion.received))
    }

    /// Puts tombstones in the place of what was deleted; whether there was anything the projection did not know.
    fn bury(&self, messages: &mut BTreeMap<Seq, Message>, graves: &RangeInclusive<Seq>) -> bool {
        let mut buried = false;
        // By id first: thousands of deletions may wait.
        let deletions = self
            .changes
            .iter()
            .map(|change| (change.deletion.user.as_str(), change.deletion.id.as_str()));
        let deleted: HashSet<(&str, &str)> = deletions.collect();
        for message in messages.values_mut().filter(|message| !message.deleted) {
            if deleted.contains(&(message.user.as_str(), message.id.as_str()))
                && self.changes.iter().any(|change| change.covers(message))
            {
                (message.text, message.deleted, buried) = (String::new(), true, true);
            }
        }
        for change in self
            .told()
            .filter(|change| graves.contains(&change.deletion.target))
        {
            // Nobody stored it, and the stream no longer has it: its place remains all the same.
            let tombstone = change.tombstone();
            let elsewhere = !change.deletion.derived && !self.is_first(&tombstone);
            if !elsewhere && !messages.contains_key(&tombstone.seq) {
                messages.insert(tombstone.seq, tombstone);
                buried = true;
            }
        }
        buried
    }
}

/// A page of one side or of both, cut to `limit`: around a sequence half a page each side, and what one
/// side lacks goes to the other.
pub fn assemble(limit: usize, older: Option<Part>, newer: Option<Part>) -> Part {
    let after = newer.as_ref().map_or(0, |part| part.messages.len());
    let before = older.as_ref().map_or(0, |part| part.messages.len());
    let take_after = if older.is_some() {
        after.min((limit.div_ceil(2)).max(limit.saturating_sub(before)))
    } else {
        after.min(limit)
    };
    let take_before = before.min(limit - take_after);
    let mut page = Part {
        messages: Vec::with_capacity(limit),
        more: false,
        through: Seq::ZERO,
        from_log: false,
    };
    if let Some(mut part) = older {
        let surplus = part.messages.len() - take_before;
        page.more |= part.more || surplus > 0;
        page.from_log |= part.from_log;
        page.through = part.through;
        page.messages.extend(part.messages.drain(surplus..));
    }
    if let Some(mut part) = newer {
        let more = part.more || part.messages.len() > take_after;
        part.messages.truncate(take_after);
        page.through = match part.messages.last() {
            Some(last) if more => last.seq,
            _ => part.through,
        };
        page.more |= more;
        page.from_log |= part.from_log;
        page.messages.extend(part.messages);
    }
    page
}

#[cfg(test)]
mod tests;
