//! The merge of stream and projection: what a reader of a conversation is shown.
//!
//! Everything here is a pure function of what was read. It is right only when the reads happened in
//! this order:
//!
//! 1. Where the stream stands: up to where it is stored (`stored_through`) and its last sequence
//!    (`end`), in either order. Everything up to `stored_through` is committed to PostgreSQL, and a
//!    page never claims anything beyond `end`.
//! 2. The tail: the messages above `stored_through` that the stream still holds.
//! 3. The deletions above `stored_through`. A hard deletion is appended before its text is erased,
//!    so when the tail lacks an erased message, its deletion is read here.
//! 4. The projection, up to `end`. A message that was trimmed from the stream before steps 2 and 3
//!    was committed before it was trimmed, so it is read here, whether it lies above
//!    `stored_through` or not.
//!
//! So each position up to `end` is in the tail, or was erased, or is in the projection. Above `end`
//! the projection may have holes, because workers store batches in any order.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::RangeInclusive;

use crate::cutoffs::Cutoffs;
use crate::dedup::{Key, key};
use crate::frontier::Frontier;
use crate::tail::Tail;
use base::seq::Seq;
use protocol::change::{Change, ChangeEntry};
use protocol::message::{Message, derived_id};

/// In which direction a page goes from its cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The newest messages before this sequence.
    Older(Seq),
    /// The oldest messages after this sequence.
    Newer(Seq),
}

/// Consecutive rows of the projection, none of them expired.
#[derive(Debug, Default)]
pub struct Rows {
    /// In the order of the direction they were read in.
    pub messages: Vec<Message>,
    /// Up to here the rows are complete; there may be others beyond. `None` when these are all.
    pub complete_through: Option<Seq>,
}

/// A page, or the part of it in one direction: no holes, oldest first.
#[derive(Debug)]
pub struct Part {
    /// Perhaps more than were asked for.
    pub messages: Vec<Message>,
    /// There may be more beyond.
    pub more: bool,
    /// Everything up to here was read.
    pub through: Seq,
    /// The projection did not have all of it.
    pub from_stream: bool,
}

/// What a reader is shown.
#[derive(Debug, Default)]
pub struct Merged {
    /// By position.
    pub messages: BTreeMap<Seq, Message>,
    /// The projection did not have all of it.
    pub from_stream: bool,
}

/// Merges rows of the projection with the tail. It holds what was read beside the messages
/// themselves. The projection has applied the deletions up to `stored_through`; those above are
/// applied here.
#[derive(Debug)]
pub struct Merge<'a> {
    /// Where the projection has the ids of the tail and of the messages deleted above
    /// `stored_through`.
    stored: HashMap<Key, Seq>,
    /// Deletions above `stored_through`.
    changes: Vec<&'a Change>,
    cutoffs: Cutoffs,
    /// Several messages may have one id; only the first is shown. Here is where the first stands,
    /// as far as stream and projection know.
    firsts: HashMap<Key, Seq>,
}

impl<'a> Merge<'a> {
    /// `stored` is the result of the deduplication lookup of [`lookup_keys`](Merge::lookup_keys).
    pub fn new(
        stored: HashMap<Key, Seq>,
        changes: Vec<&'a Change>,
        cutoffs: Cutoffs,
        tails: &[Tail],
    ) -> Merge<'a> {
        let deleted = client_supplied(&changes).map(|change| {
            let tombstone = change.tombstone();
            (key(&tombstone), tombstone.seq)
        });
        let in_tail = tails
            .iter()
            .flat_map(|tail| tail.firsts.iter().map(|(key, seq)| (key.clone(), *seq)));
        let mut firsts = stored.clone();
        for (key, seq) in deleted.chain(in_tail) {
            firsts
                .entry(key)
                .and_modify(|first| *first = seq.min(*first))
                .or_insert(seq);
        }
        Merge {
            stored,
            changes,
            cutoffs,
            firsts,
        }
    }

    /// The keys to look up in the projection: those of the tails, and of what `changes` delete.
    pub fn lookup_keys(tails: &[Tail], changes: &[&Change]) -> Vec<Key> {
        let deleted = client_supplied(changes).map(|change| key(&change.tombstone()));
        tails
            .iter()
            .flat_map(|tail| tail.ids.iter().cloned())
            .chain(deleted)
            .collect()
    }

    /// The part of a page in one direction. `tail` holds the conversation's messages above
    /// `frontier.stored_through`.
    pub fn part(&self, direction: Direction, frontier: Frontier, tail: &Tail, rows: Rows) -> Part {
        let Frontier {
            stored_through,
            end,
        } = frontier;
        // A tail that begins later than it should was cut, unless what is missing has expired.
        let tail_cut = (tail.from > stored_through.next() && !tail.has_expired(&self.cutoffs))
            .then_some(tail.from);
        let (within, more) = match direction {
            Direction::Older(before) => {
                let complete_from = rows.complete_through.max(tail_cut);
                (
                    complete_from.unwrap_or(Seq::ZERO)..=before.previous().min(end),
                    complete_from.is_some(),
                )
            }
            Direction::Newer(after) => {
                let complete_through = end
                    .min(tail.through)
                    .min(rows.complete_through.unwrap_or(Seq::MAX));
                (after.next()..=complete_through, complete_through < end)
            }
        };
        let merged = self.range(rows.messages, tail, &within, &within);
        Part {
            messages: merged.messages.into_values().collect(),
            more,
            through: *within.end(),
            from_stream: merged.from_stream,
        }
    }

    /// The rows of the projection and the messages of the tail `within` a range. A message that was
    /// erased from the stream before anybody stored it gets a tombstone, if its place lies in the
    /// range `tombstones`. The rows must be all the projection has in that range.
    pub fn range(
        &self,
        rows: Vec<Message>,
        tail: &Tail,
        within: &RangeInclusive<Seq>,
        tombstones: &RangeInclusive<Seq>,
    ) -> Merged {
        let mut merged = Merged::default();
        let mut stored = HashMap::new();
        for message in rows {
            stored.insert(message.seq, message.deleted);
            // Of two messages with one id, a worker may store the later one first. The earlier one
            // takes its place soon.
            if within.contains(&message.seq) && self.is_first(&message) {
                merged.messages.insert(message.seq, message);
            }
        }
        for message in tail
            .unexpired(&self.cutoffs)
            .filter(|message| within.contains(&message.seq) && self.is_first(message))
        {
            let is_stored = stored.contains_key(&message.seq)
                || self.stored.get(&key(message)) == Some(&message.seq);
            merged.from_stream |= !is_stored;
            // A message that is deleted in the projection was deleted while we were reading.
            if stored.get(&message.seq) != Some(&true) {
                merged.messages.insert(message.seq, message.clone());
            }
        }
        merged.from_stream |= self.apply_deletions(&mut merged.messages);
        merged.from_stream |= self.insert_tombstones(&mut merged.messages, tombstones);
        merged
    }

    /// The changes within `range`: those of the projection and those of the stream, each once; and
    /// whether the projection lacked any.
    pub fn changes(
        &self,
        stored: Vec<ChangeEntry>,
        range: &RangeInclusive<Seq>,
    ) -> (Vec<ChangeEntry>, bool) {
        let mut entries: BTreeMap<Seq, ChangeEntry> =
            stored.into_iter().map(|entry| (entry.seq, entry)).collect();
        entries.retain(|seq, _| range.contains(seq));
        let stored = entries.len();
        for change in self
            .unexpired_changes()
            .filter(|change| range.contains(&change.seq))
        {
            entries.entry(change.seq).or_insert_with(|| change.entry());
        }
        let from_stream = entries.len() > stored;
        (entries.into_values().collect(), from_stream)
    }

    /// Whether no earlier message has this one's id.
    fn is_first(&self, message: &Message) -> bool {
        message.id == derived_id(message.seq)
            || self
                .firsts
                .get(&key(message))
                .is_none_or(|&first| first >= message.seq)
    }

    /// The deletions of messages that have not expired: only those are shown to a reader.
    fn unexpired_changes(&self) -> impl Iterator<Item = &'_ Change> {
        self.changes.iter().copied().filter(|change| {
            !self
                .cutoffs
                .is_expired(&change.room, change.deletion.received)
        })
    }

    /// Takes the text out of every message that a deletion covers; whether there was any that the
    /// projection had not deleted.
    fn apply_deletions(&self, messages: &mut BTreeMap<Seq, Message>) -> bool {
        // By id first, because thousands of deletions may wait.
        let deleted: HashSet<(&str, &str)> = self
            .changes
            .iter()
            .map(|change| (change.deletion.user.as_str(), change.deletion.id.as_str()))
            .collect();
        let mut any = false;
        for message in messages.values_mut().filter(|message| !message.deleted) {
            if deleted.contains(&(message.user.as_str(), message.id.as_str()))
                && self.changes.iter().any(|change| change.covers(message))
            {
                message.text = String::new();
                message.deleted = true;
                any = true;
            }
        }
        any
    }

    /// Adds a tombstone for each message in `range` that was erased from the stream before anybody
    /// stored it: its place remains. Whether there was any.
    fn insert_tombstones(
        &self,
        messages: &mut BTreeMap<Seq, Message>,
        range: &RangeInclusive<Seq>,
    ) -> bool {
        let mut any = false;
        for change in self
            .unexpired_changes()
            .filter(|change| range.contains(&change.deletion.target))
        {
            let tombstone = change.tombstone();
            let stands_elsewhere = !change.deletion.derived && !self.is_first(&tombstone);
            if !stands_elsewhere && !messages.contains_key(&tombstone.seq) {
                messages.insert(tombstone.seq, tombstone);
                any = true;
            }
        }
        any
    }
}

/// The deletions of messages whose sender supplied the id.
fn client_supplied<'a>(changes: &[&'a Change]) -> impl Iterator<Item = &'a Change> {
    changes
        .iter()
        .copied()
        .filter(|change| !change.deletion.derived)
}

/// A page of one or both directions, cut to `limit`. A page around a sequence has half of its
/// messages in each direction; what one direction lacks is given to the other.
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
        from_stream: false,
    };
    if let Some(mut part) = older {
        let surplus = part.messages.len() - take_before;
        page.more |= part.more || surplus > 0;
        page.from_stream |= part.from_stream;
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
        page.from_stream |= part.from_stream;
        page.messages.extend(part.messages);
    }
    page
}

#[cfg(test)]
mod tests;
