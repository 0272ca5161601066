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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn seq(number: u64) -> Seq {
        Seq::new(number).unwrap()
    }

    fn message(number: u64, id: &str, text: &str) -> Message {
        let message = json!({"id": id, "seq": number, "room": "general", "user": "ann", "text": text, "timestamp": 0});
        serde_json::from_value(message).unwrap()
    }

    fn tombstone(number: u64, id: &str) -> Message {
        Message { deleted: true, ..message(number, id, "") }
    }

    fn deletion(target: u64, id: &str) -> Change {
        let body = json!({"type": "delete", "target": target, "id": id, "user": "ann", "derived": id.starts_with("seq:"),
                          "timestamp": 0, "received": 0, "mode": "soft", "by": "ann"});
        Change::parse("change.chat.general", body.to_string().as_bytes(), seq(100), 0).unwrap()
    }

    /// Position and text of what is shown of everything up to 50, and whether the log was needed.
    fn merge(known: &[(&str, u64)], changes: &[Change], rows: &[Message], tail: &[Message]) -> (Vec<(u64, String)>, bool) {
        let known = known.iter().map(|(id, at)| (("ann".to_owned(), (*id).to_owned()), seq(*at))).collect();
        let all = Seq::ZERO..=seq(50);
        let merged = Union { known, changes: changes.iter().collect(), cutoff_ms: None }.merge(rows.to_vec(), tail.to_vec(), &all, &all);
        let shown = |message: &Message| {
            assert_eq!(message.deleted, message.text.is_empty());
            (message.seq.get(), message.text.clone())
        };
        (merged.messages.values().map(shown).collect(), merged.from_log)
    }

    fn shown(messages: &[(u64, &str)]) -> Vec<(u64, String)> {
        messages.iter().map(|(seq, text)| (*seq, (*text).to_owned())).collect()
    }

    #[test]
    fn the_first_of_two_with_one_id_is_shown() {
        // The index has the first; the index has the later one, and the first is in the tail; both are in the index's place.
        assert_eq!(merge(&[("a", 5)], &[], &[message(5, "a", "x")], &[message(9, "a", "x")]), (shown(&[(5, "x")]), false));
        assert_eq!(merge(&[("a", 9)], &[], &[message(9, "a", "x")], &[message(5, "a", "x")]), (shown(&[(5, "x")]), true));
        assert_eq!(merge(&[("a", 5)], &[], &[message(5, "a", "x")], &[message(5, "a", "x")]), (shown(&[(5, "x")]), false));
    }

    #[test]
    fn no_text_is_shown_of_what_either_side_knows_as_deleted() {
        let change = deletion(5, "a");
        assert_eq!(merge(&[("a", 5)], std::slice::from_ref(&change), &[message(5, "a", "x")], &[]), (shown(&[(5, "")]), true));
        assert_eq!(merge(&[], std::slice::from_ref(&change), &[], &[message(5, "a", "x")]), (shown(&[(5, "")]), true));
        assert_eq!(merge(&[("a", 5)], &[], &[tombstone(5, "a")], &[message(5, "a", "x")]), (shown(&[(5, "")]), false), "deleted meanwhile");
        // Another copy than the one the deletion names.
        assert_eq!(merge(&[("a", 5)], &[deletion(9, "a")], &[message(5, "a", "x")], &[]), (shown(&[(5, "")]), true));
    }

    #[test]
    fn what_was_erased_before_it_was_stored_has_a_tombstone_once() {
        assert_eq!(merge(&[], &[deletion(5, "a")], &[], &[message(7, "b", "y")]), (shown(&[(5, ""), (7, "y")]), true));
        assert_eq!(merge(&[], &[deletion(5, "seq:5")], &[], &[]), (shown(&[(5, "")]), true));
        assert_eq!(merge(&[], &[deletion(60, "a")], &[], &[]), (shown(&[]), false), "outside of the range");
        // It stands elsewhere, outside of what was read.
        assert_eq!(merge(&[("a", 3)], &[deletion(5, "a")], &[], &[]), (shown(&[]), false));
        // The index has it, beyond what may be shown of it.
        assert_eq!(merge(&[("a", 5)], &[deletion(5, "a")], &[], &[]), (shown(&[(5, "")]), true));
    }
}
