//! The world of the property test: a stream, a projection that workers fill in any order, an
//! eraser, a trimmer and a clock; and the model, a list of everything that was ever appended.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use crate::merge::tests::seq as position;
use crate::merge::{Direction, Rows};
use base::seq::Seq;
use jetstream::stream::StreamMessage;
use protocol::change::Change;
use protocol::message::Message;

pub(super) const ROOM: &str = "dm.ann.bob";
/// Sender and recipient.
pub(super) const WAYS: [(&str, &str); 2] = [("ann", "bob"), ("bob", "ann")];
/// SplitMix64: the same worlds every time.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(super) fn one_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.below(from.len() as u64) as usize])
    }
}

#[derive(Debug, Clone)]
pub(super) enum Kind {
    Sent {
        way: usize,
        id: Option<String>,
    },
    Deleted {
        target: u64,
        way: usize,
        id: String,
        derived: bool,
        hard: bool,
        received: i64,
    },
    /// On one of our subjects, but no message: it is never stored.
    Junk {
        way: usize,
    },
    Elsewhere,
}

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    pub(super) received: i64,
}

#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) seq: u64,
    pub(super) deleted: bool,
    pub(super) text: String,
    pub(super) received: i64,
}

/// Sender, id, and whether the id is derived from the sequence.
pub(super) type RowKey = (usize, String, bool);

#[derive(Debug, Default, Clone)]
pub(super) struct World {
    /// All that was ever appended, by sequence from 1 on.
    pub(super) sent: Vec<Entry>,
    /// What the stream still holds.
    pub(super) stream: BTreeSet<u64>,
    pub(super) rows: BTreeMap<RowKey, Row>,
    pub(super) changes: BTreeSet<u64>,
    pub(super) stored: BTreeSet<u64>,
    pub(super) stored_throughs: Vec<u64>,
    pub(super) first: u64,
    pub(super) now: i64,
    pub(super) keep: Option<i64>,
    pub(super) duplicates: bool,
    /// As much as is read of a tail as a whole.
    pub(super) whole: usize,
}

/// What everybody should see at one moment.
pub(super) struct Truth {
    /// By position: deleted, received.
    pub(super) shown: BTreeMap<u64, (bool, i64)>,
    pub(super) last: u64,
    pub(super) cutoff: Option<i64>,
    /// By position of the deletion: its target, and when that was received.
    pub(super) deletions: BTreeMap<u64, (u64, i64)>,
}

impl Truth {
    pub(super) fn expired(&self, received: i64) -> bool {
        self.cutoff.is_some_and(|cutoff| received <= cutoff)
    }
}

pub(super) fn derived(seq: u64) -> String {
    format!("seq:{seq}")
}

impl World {
    pub(super) fn new(random: &mut Random, duplicates: bool, whole: usize) -> World {
        // An id is free again once its message has expired: then a message that repeats it is no
        // duplicate.
        let keep = (!duplicates && random.one_in(2)).then(|| 10 + random.below(30) as i64);
        World {
            first: 1,
            stored_throughs: vec![0],
            keep,
            duplicates,
            whole,
            ..World::default()
        }
    }

    pub(super) fn last(&self) -> u64 {
        self.sent.len() as u64
    }

    pub(super) fn entry(&self, seq: u64) -> &Entry {
        &self.sent[seq as usize - 1]
    }

    pub(super) fn stored_through(&self) -> u64 {
        *self.stored_throughs.last().unwrap()
    }

    pub(super) fn cutoff(&self) -> Option<i64> {
        self.keep.map(|keep| self.now - keep)
    }

    pub(super) fn key(&self, seq: u64) -> Option<RowKey> {
        match &self.entry(seq).kind {
            Kind::Sent { way, id } => Some((
                *way,
                id.clone().unwrap_or_else(|| derived(seq)),
                id.is_none(),
            )),
            Kind::Deleted {
                way, id, derived, ..
            } => Some((*way, id.clone(), *derived)),
            Kind::Junk { .. } | Kind::Elsewhere => None,
        }
    }

    pub(super) fn truth(&self) -> Truth {
        let mut shown: BTreeMap<u64, (bool, i64)> = BTreeMap::new();
        let mut firsts = BTreeMap::new();
        let mut deletions = BTreeMap::new();
        for seq in 1..=self.last() {
            let Some(key) = self.key(seq) else { continue };
            let entry = self.entry(seq);
            match &entry.kind {
                Kind::Deleted {
                    target, received, ..
                } => {
                    let place = firsts.get(&key).copied().unwrap_or(*target);
                    deletions.insert(seq, (*target, *received));
                    let received = shown
                        .get(&place)
                        .map_or(*received, |(_, received)| *received);
                    shown.insert(place, (true, received));
                }
                _ if firsts.contains_key(&key) => {}
                _ => {
                    firsts.insert(key, seq);
                    shown.insert(seq, (false, entry.received));
                }
            }
        }
        Truth {
            shown,
            last: self.last(),
            cutoff: self.cutoff(),
            deletions,
        }
    }

    /// Something happens.
    pub(super) fn step(&mut self, random: &mut Random) {
        match random.below(12) {
            0..=4 => self.append(random),
            5..=7 => self.store(random),
            8 => {
                let mut through = self.stored_through();
                while self.stored.contains(&(through + 1)) && !random.one_in(4) {
                    through += 1;
                }
                self.stored_throughs.push(through);
            }
            9 => {
                let through = random.below(self.stored_through() + 1);
                self.stream = self.stream.split_off(&(through + 1));
                self.first = self.first.max(through + 1);
            }
            10 => self.erase(random),
            _ => {
                self.now += random.below(6) as i64;
                if random.one_in(2) {
                    let cutoff = self.cutoff();
                    self.rows
                        .retain(|_, row| cutoff.is_none_or(|cutoff| row.received > cutoff));
                }
            }
        }
    }

    pub(super) fn append(&mut self, random: &mut Random) {
        self.now += random.below(2) as i64;
        let way = random.below(2) as usize;
        let truth = self.truth();
        let kind = match random.below(10) {
            0 => Kind::Elsewhere,
            1 => Kind::Junk { way },
            2 | 3 => {
                let targets: Vec<u64> = truth
                    .shown
                    .iter()
                    .filter(|(_, (_, at))| !truth.expired(*at))
                    .map(|(seq, _)| *seq)
                    .collect();
                match random
                    .pick(&targets)
                    .and_then(|seq| Some((seq, self.key(seq)?)))
                {
                    Some((target, (way, id, derived))) => {
                        let received = self.entry(target).received;
                        Kind::Deleted {
                            target,
                            way,
                            id,
                            derived,
                            hard: random.one_in(2),
                            received,
                        }
                    }
                    None => Kind::Elsewhere,
                }
            }
            4 | 5 if self.duplicates => {
                let is_client_supplied =
                    |seq: &u64| matches!(self.entry(*seq).kind, Kind::Sent { id: Some(_), .. });
                let originals: Vec<u64> = (1..=self.last()).filter(is_client_supplied).collect();
                random
                    .pick(&originals)
                    .map_or(Kind::Elsewhere, |seq| self.entry(seq).kind.clone())
            }
            _ => Kind::Sent {
                way,
                id: random.one_in(2).then(|| format!("id-{}", self.last())),
            },
        };
        self.sent.push(Entry {
            kind,
            received: self.now,
        });
        self.stream.insert(self.last());
    }

    /// A worker stores any message above what is stored without holes. It may still have the text
    /// of an erased one.
    pub(super) fn store(&mut self, random: &mut Random) {
        let waiting: Vec<u64> = (self.stored_through() + 1..=self.last())
            .filter(|seq| !self.stored.contains(seq))
            .take(8)
            .collect();
        let Some(seq) = random.pick(&waiting) else {
            return;
        };
        self.stored.insert(seq);
        if !self.stream.contains(&seq) && random.one_in(2) {
            return;
        }
        let entry = self.entry(seq).clone();
        let Some(key) = self.key(seq) else { return };
        match entry.kind {
            Kind::Deleted {
                target, received, ..
            } => {
                let tombstone = Row {
                    seq: target,
                    deleted: true,
                    text: String::new(),
                    received,
                };
                let row = self.rows.entry(key).or_insert(tombstone);
                row.deleted = true;
                row.text = String::new();
                if target < row.seq {
                    row.seq = target;
                    row.received = received;
                }
                self.changes.insert(seq);
            }
            _ => {
                let new = Row {
                    seq,
                    deleted: false,
                    text: format!("text of {}", key.1),
                    received: entry.received,
                };
                let row = self.rows.entry(key).or_insert_with(|| new.clone());
                if row.seq > seq {
                    let text = if row.deleted { String::new() } else { new.text };
                    *row = Row {
                        text,
                        deleted: row.deleted,
                        ..new
                    };
                }
            }
        }
    }

    /// The text that a hard deletion names leaves the stream at any time after the deletion was
    /// appended.
    pub(super) fn erase(&mut self, random: &mut Random) {
        let targets: Vec<u64> = (1..=self.last())
            .filter_map(|seq| match self.entry(seq).kind {
                Kind::Deleted {
                    target, hard: true, ..
                } => Some(target),
                _ => None,
            })
            .collect();
        if let Some(target) = random.pick(&targets) {
            self.stream.remove(&target);
        }
    }

    /// The messages that the stream holds of one sender.
    pub(super) fn messages(&self, way: usize, from: u64, before: u64) -> Vec<StreamMessage> {
        let (user, to) = WAYS[way];
        let of = |seq: &u64| {
            let entry = self.entry(*seq);
            let payload = match &entry.kind {
                Kind::Sent { way: sent, id } if *sent == way => {
                    let text = format!("text of {}", self.key(*seq)?.1);
                    json!({"user": user, "text": text, "id": id}).to_string()
                }
                Kind::Junk { way: sent } if *sent == way => "not json".to_owned(),
                _ => return None,
            };
            Some(StreamMessage {
                seq: position(*seq),
                subject: format!("dm.{user}.{to}"),
                headers: None,
                payload: payload.into(),
                received_ms: entry.received,
            })
        };
        self.stream
            .range(from..before.max(from))
            .filter_map(of)
            .collect()
    }

    pub(super) fn deletions_above(&self, stored_through: u64) -> Vec<Change> {
        self.stream
            .range(stored_through + 1..)
            .filter_map(|seq| self.change(*seq))
            .collect()
    }

    pub(super) fn change(&self, seq: u64) -> Option<Change> {
        let Kind::Deleted {
            target,
            way,
            id,
            derived,
            hard,
            received,
        } = &self.entry(seq).kind
        else {
            return None;
        };
        let (user, to) = WAYS[*way];
        let body = json!({
            "type": "delete", "target": target, "id": id, "user": user, "to": to,
            "derived": derived, "timestamp": 0, "received": received,
            "mode": if *hard { "hard" } else { "soft" }, "by": user,
        });
        let subject = format!("change.{ROOM}");
        Some(
            Change::parse(
                &subject,
                body.to_string().as_bytes(),
                position(seq),
                self.entry(seq).received,
            )
            .unwrap(),
        )
    }

    pub(super) fn row(key: &RowKey, row: &Row) -> Message {
        let (user, to) = WAYS[key.0];
        let message = json!({
            "id": key.1, "seq": row.seq, "room": ROOM, "user": user, "to": to,
            "text": row.text, "timestamp": 0, "deleted": row.deleted,
        });
        serde_json::from_value(message).unwrap()
    }

    pub(super) fn rows_of(
        &self,
        direction: Direction,
        end: Seq,
        cutoff: Option<i64>,
        wanted: usize,
    ) -> Rows {
        let is_unexpired = |row: &&Row| cutoff.is_none_or(|cutoff| row.received > cutoff);
        let stored: BTreeMap<u64, Message> = self
            .rows
            .iter()
            .filter(|(_, row)| is_unexpired(row))
            .map(|(key, row)| (row.seq, World::row(key, row)))
            .collect();
        let mut messages: Vec<Message> = match direction {
            Direction::Older(before) => stored
                .range(..before.min(end.next()).get())
                .rev()
                .map(|(_, row)| row.clone())
                .collect(),
            Direction::Newer(after) if after < end => stored
                .range(after.next().get()..=end.get())
                .map(|(_, row)| row.clone())
                .collect(),
            Direction::Newer(_) => Vec::new(),
        };
        messages.truncate(wanted);
        Rows {
            complete_through: messages
                .last()
                .filter(|_| messages.len() == wanted)
                .map(|last| last.seq),
            messages,
        }
    }
}
