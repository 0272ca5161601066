//! The union of log and index: what a reader of a conversation is shown.

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;

use wire::{Change, Message, Seq};

/// Sender and id: what makes it one message, wherever copies of it stand.
pub type Key = (String, String);

/// The key of a message as shown.
pub fn key(message: &Message) -> Key {
    (message.user.clone(), message.id.clone())
}

/// What is known beside the messages themselves. Deletions up to the floor have been applied in the index; those above are
/// applied here.
#[derive(Debug)]
pub struct Union<'a> {
    /// Where the index has the ids of the tail and of what was deleted above the floor.
    pub known: HashMap<Key, Seq>,
    /// Deletions of this conversation above the floor.
    pub changes: Vec<&'a Change>,
    /// What the log took at this time, in Unix milliseconds, or before has expired: no tombstone stands for it.
    pub cutoff_ms: Option<i64>,
}

/// What a reader is shown.
#[derive(Debug, Default)]
pub struct Merged {
    /// By position.
    pub messages: BTreeMap<Seq, Message>,
    /// The index did not have all of it.
    pub from_log: bool,
}

impl Union<'_> {
    /// The keys to look up for [`Union::known`]: those of `tail_ids`, and of what `changes` delete.
    pub fn keys(tail_ids: impl IntoIterator<Item = Key>, changes: &[&Change]) -> Vec<Key> {
        let deleted = changes.iter().filter(|change| !change.deletion.derived).map(|change| key(&change.tombstone()));
        tail_ids.into_iter().chain(deleted).collect()
    }

    /// The rows of the index and the messages of the tail as far as they lie `within`, and tombstones in the range `graves`
    /// for what was erased from the log before anybody stored it. The rows must be all the index has in that range.
    pub fn merge(&self, rows: Vec<Message>, tail: Vec<Message>, within: &RangeInclusive<Seq>, graves: &RangeInclusive<Seq>) -> Merged {
        let in_tail: HashMap<Key, Seq> = tail.iter().map(|message| (key(message), message.seq)).collect();
        let mut merged = Merged::default();
        let mut stored = HashMap::new();
        for message in rows {
            stored.insert(message.seq, message.deleted);
            // A copy stored the later of two messages with one id first; the earlier one takes its place soon.
            let displaced = in_tail.get(&key(&message)).is_some_and(|&earlier| earlier < message.seq);
            if within.contains(&message.seq) && !displaced {
                merged.messages.insert(message.seq, message);
            }
        }
        for message in tail {
            let known = self.known.get(&key(&message));
            if within.contains(&message.seq) && known.is_none_or(|&earlier| earlier >= message.seq) {
                merged.from_log |= !stored.contains_key(&message.seq) && known != Some(&message.seq);
                // What the index knows as deleted was deleted while we were reading.
                if stored.get(&message.seq) != Some(&true) {
                    merged.messages.insert(message.seq, message);
                }
            }
        }
        merged.from_log |= self.bury(&mut merged.messages, graves);
        merged
    }

    /// The deletions a reader is told of: those of messages that have not expired.
    pub fn told(&self) -> impl Iterator<Item = &'_ Change> {
        let alive = |change: &&Change| self.cutoff_ms.is_none_or(|cutoff_ms| change.deletion.received > cutoff_ms);
        self.changes.iter().copied().filter(alive)
    }

    /// Puts tombstones in the place of what was deleted; whether there was anything the index did not know.
    fn bury(&self, messages: &mut BTreeMap<Seq, Message>, graves: &RangeInclusive<Seq>) -> bool {
        let mut buried = false;
        for change in &self.changes {
            for message in messages.values_mut().filter(|message| !message.deleted && change.covers(message)) {
                (message.text, message.deleted, buried) = (String::new(), true, true);
            }
        }
        for change in self.told() {
            // Nobody stored it, and the log no longer has it: its place remains all the same.
            let tombstone = change.tombstone();
            let elsewhere = !change.deletion.derived && self.known.get(&key(&tombstone)).is_some_and(|&seq| seq != tombstone.seq);
            if !elsewhere && graves.contains(&tombstone.seq) && !messages.contains_key(&tombstone.seq) {
                messages.insert(tombstone.seq, tombstone);
                buried = true;
            }
        }
        buried
    }
}
