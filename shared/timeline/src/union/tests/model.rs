//! The property: whatever happened, and whatever happens between the reads, a page is the page of a
//! simple model.
//!
//! A world has a stream, a projection that workers fill in any order above the floor, an eraser, a
//! trimmer and a clock. A reader takes its steps in the order that `union.rs` demands, and the world
//! goes on between any two of them. The model is a list of all that was ever said.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::*;
use crate::tail::Tails;
use jetstream::stream::StreamMessage;
use protocol::change::ChangeEntry;
use protocol::message::Limits;

const ROOM: &str = "dm.ann.bob";
const WAYS: [(&str, &str); 2] = [("ann", "bob"), ("bob", "ann")];
/// Of each kind of world so many are tried.
const WORLDS: u64 = 150;

/// SplitMix64: the same worlds every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn one_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.below(from.len() as u64) as usize])
    }
}

#[derive(Debug, Clone)]
enum Kind {
    Said {
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
    /// On one of our subjects, and never stored.
    Junk {
        way: usize,
    },
    Elsewhere,
}

#[derive(Debug, Clone)]
struct Entry {
    kind: Kind,
    received: i64,
}

#[derive(Debug, Clone)]
struct Row {
    seq: u64,
    deleted: bool,
    text: String,
    received: i64,
}

/// Sender, id, and whether the id was made from the sequence.
type RowKey = (usize, String, bool);

#[derive(Debug, Default, Clone)]
struct World {
    /// All that was ever appended, by sequence from 1 on.
    said: Vec<Entry>,
    /// What the stream still holds.
    stream: BTreeSet<u64>,
    rows: BTreeMap<RowKey, Row>,
    changes: BTreeSet<u64>,
    stored: BTreeSet<u64>,
    floors: Vec<u64>,
    first: u64,
    now: i64,
    keep: Option<i64>,
    copies: bool,
    /// As much as is read of a tail as a whole.
    whole: usize,
}

/// What everybody should see at one moment.
struct Truth {
    /// By position: deleted, received.
    shown: BTreeMap<u64, (bool, i64)>,
    last: u64,
    cutoff: Option<i64>,
    /// By position of the deletion: its target, and when that was received.
    deletions: BTreeMap<u64, (u64, i64)>,
}

impl Truth {
    fn expired(&self, received: i64) -> bool {
        self.cutoff.is_some_and(|cutoff| received <= cutoff)
    }
}

fn derived(seq: u64) -> String {
    format!("seq:{seq}")
}

impl World {
    fn new(random: &mut Random, copies: bool, whole: usize) -> World {
        // An id is free again once its message has expired: a copy of that one is no copy.
        let keep = (!copies && random.one_in(2)).then(|| 10 + random.below(30) as i64);
        World {
            first: 1,
            floors: vec![0],
            keep,
            copies,
            whole,
            ..World::default()
        }
    }

    fn last(&self) -> u64 {
        self.said.len() as u64
    }

    fn entry(&self, seq: u64) -> &Entry {
        &self.said[seq as usize - 1]
    }

    fn stored_through(&self) -> u64 {
        *self.floors.last().unwrap()
    }

    fn cutoff(&self) -> Option<i64> {
        self.keep.map(|keep| self.now - keep)
    }

    fn key(&self, seq: u64) -> Option<RowKey> {
        match &self.entry(seq).kind {
            Kind::Said { way, id } => Some((
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

    fn truth(&self) -> Truth {
        let (mut shown, mut firsts, mut deletions) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for seq in 1..=self.last() {
            let Some(key) = self.key(seq) else { continue };
            let entry = self.entry(seq);
            match &entry.kind {
                Kind::Deleted {
                    target, received, ..
                } => {
                    let place = firsts.get(&key).copied().unwrap_or(*target);
                    deletions.insert(seq, (*target, *received));
                    shown.insert(
                        place,
                        (
                            true,
                            shown
                                .get(&place)
                                .map_or(*received, |(_, received)| *received),
                        ),
                    );
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
    fn step(&mut self, random: &mut Random) {
        match random.below(12) {
            0..=4 => self.append(random),
            5..=7 => self.store(random),
            8 => {
                let mut floor = self.stored_through();
                while self.stored.contains(&(floor + 1)) && !random.one_in(4) {
                    floor += 1;
                }
                self.floors.push(floor);
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

    fn append(&mut self, random: &mut Random) {
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
            4 | 5 if self.copies => {
                let given =
                    |seq: &u64| matches!(self.entry(*seq).kind, Kind::Said { id: Some(_), .. });
                let originals: Vec<u64> = (1..=self.last()).filter(given).collect();
                random
                    .pick(&originals)
                    .map_or(Kind::Elsewhere, |seq| self.entry(seq).kind.clone())
            }
            _ => Kind::Said {
                way,
                id: random.one_in(2).then(|| format!("id-{}", self.last())),
            },
        };
        self.said.push(Entry {
            kind,
            received: self.now,
        });
        self.stream.insert(self.last());
    }

    /// A worker stores one message above the floor, any. Of what was erased it may still have the text.
    fn store(&mut self, random: &mut Random) {
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
        let (entry, key) = (self.entry(seq).clone(), self.key(seq));
        let Some(key) = key else { return };
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
                (row.deleted, row.text) = (true, String::new());
                if target < row.seq {
                    (row.seq, row.received) = (target, received);
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

    /// The texts of a hard deletion leave the stream at any time after it was appended.
    fn erase(&mut self, random: &mut Random) {
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

    /// What the stream holds of one way, as it would be read.
    fn messages(&self, way: usize, from: u64, before: u64) -> Vec<StreamMessage> {
        let (user, to) = WAYS[way];
        let of = |seq: &u64| {
            let entry = self.entry(*seq);
            let payload = match &entry.kind {
                Kind::Said { way: said, id } if *said == way => {
                    let text = format!("text of {}", self.key(*seq)?.1);
                    json!({"user": user, "text": text, "id": id}).to_string()
                }
                Kind::Junk { way: said } if *said == way => "not json".to_owned(),
                _ => return None,
            };
            let (seq, received_ms) = (Seq::new(*seq)?, entry.received);
            Some(StreamMessage {
                seq,
                subject: format!("dm.{user}.{to}"),
                headers: None,
                payload: payload.into(),
                received_ms,
            })
        };
        self.stream
            .range(from..before.max(from))
            .filter_map(of)
            .collect()
    }

    fn deletions_above(&self, floor: u64) -> Vec<Change> {
        self.stream
            .range(floor + 1..)
            .filter_map(|seq| self.change(*seq))
            .collect()
    }

    fn change(&self, seq: u64) -> Option<Change> {
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
        let body = json!({"type": "delete", "target": target, "id": id, "user": user, "to": to, "derived": derived, "timestamp": 0,
                          "received": received, "mode": if *hard { "hard" } else { "soft" }, "by": user});
        let subject = format!("change.{ROOM}");
        Some(
            Change::parse(
                &subject,
                body.to_string().as_bytes(),
                super::seq(seq),
                self.entry(seq).received,
            )
            .unwrap(),
        )
    }

    fn row(key: &RowKey, row: &Row) -> Message {
        let (user, to) = WAYS[key.0];
        let message = json!({"id": key.1, "seq": row.seq, "room": ROOM, "user": user, "to": to, "text": row.text,
                             "timestamp": 0, "deleted": row.deleted});
        serde_json::from_value(message).unwrap()
    }

    fn rows_of(&self, side: Side, end: Seq, cutoff: Option<i64>, wanted: usize) -> Rows {
        let alive = |row: &&Row| cutoff.is_none_or(|cutoff| row.received > cutoff);
        let stored: BTreeMap<u64, Message> = self
            .rows
            .iter()
            .filter(|(_, row)| alive(row))
            .map(|(key, row)| (row.seq, World::row(key, row)))
            .collect();
        let mut messages: Vec<Message> = match side {
            Side::Older(before) => stored
                .range(..before.min(end.next()).get())
                .rev()
                .map(|(_, row)| row.clone())
                .collect(),
            Side::Newer(after) if after < end => stored
                .range(after.next().get()..=end.get())
                .map(|(_, row)| row.clone())
                .collect(),
            Side::Newer(_) => Vec::new(),
        };
        messages.truncate(wanted);
        Rows {
            reach: messages
                .last()
                .filter(|_| messages.len() == wanted)
                .map(|last| last.seq),
            messages,
        }
    }
}

/// A reader, step by step; the world goes on between any two when it is `busy`.
struct Reader<'a> {
    world: &'a mut World,
    random: &'a mut Random,
    busy: bool,
}

impl Reader<'_> {
    fn meanwhile(&mut self) {
        while self.busy && !self.random.one_in(3) {
            self.world.step(self.random);
        }
    }

    fn stretch(
        &mut self,
        way: usize,
        from: u64,
        before: u64,
        need: usize,
        newest: bool,
    ) -> Stretch {
        self.meanwhile();
        let mut messages = self.world.messages(way, from, before);
        let good = |message: &StreamMessage| message.payload.starts_with(b"{");
        let all = messages.len();
        let mut kept = 0;
        let mut enough = |message: &StreamMessage| {
            kept += usize::from(good(message));
            kept >= need
        };
        if newest {
            let begin = messages.iter().rposition(&mut enough).unwrap_or(0);
            messages.drain(..begin);
        } else {
            let end = messages
                .iter()
                .position(&mut enough)
                .map_or(all, |last| last + 1);
            messages.truncate(end);
        }
        let complete = messages.len() == all;
        let from = if complete || !newest {
            from
        } else {
            messages[0].seq.get()
        };
        Stretch {
            messages,
            complete,
            from: super::seq(from),
        }
    }

    fn tails(&mut self, floor: Seq, end: Seq, sides: &[Side], need: usize) -> Tails {
        let limits = Limits::default();
        let (from, whole) = (floor.next(), self.world.whole);
        if end <= floor {
            return Tails::from(Tail::empty(from));
        }
        let read = (0..2)
            .map(|way| self.stretch(way, from.get(), u64::MAX, whole, false))
            .collect();
        let tail = Tail::of_oldest(read, from, limits);
        if tail.complete || tail.through >= end {
            return Tails::from(tail);
        }
        let tails = sides.iter().map(|side| match *side {
            Side::Older(before) => {
                let before = before.min(end.next());
                let read = (0..2)
                    .map(|way| self.stretch(way, from.get(), before.get(), need, true))
                    .collect();
                Tail::of_newest(read, before, limits)
            }
            Side::Newer(after) => {
                let from = floor.max(after).next();
                let read = (0..2)
                    .map(|way| self.stretch(way, from.get(), u64::MAX, need, false))
                    .collect();
                Tail::of_oldest(read, from, limits)
            }
        });
        Tails::of_sides(tails.collect())
    }

    /// One page, and the changes of sync.
    fn page(&mut self, sides: &[Side], limit: usize) -> (Part, Vec<ChangeEntry>) {
        // The floor may be an old one.
        let old = if self.busy {
            self.random.below(3) as usize
        } else {
            0
        };
        let floors = &self.world.floors;
        let floor = super::seq(floors[floors.len().saturating_sub(1 + old)]);
        self.meanwhile();
        let end = super::seq(self.world.last()).max(floor);
        let tails = self.tails(floor, end, sides, limit + 1);
        self.meanwhile();
        let changes = self.world.deletions_above(floor.get());
        self.meanwhile();
        let cutoff = self.world.cutoff();
        let wanted = limit + 1 + tails.repeated();
        let rows: Vec<Rows> = sides
            .iter()
            .map(|side| self.world.rows_of(*side, end, cutoff, wanted))
            .collect();
        let indexed: Vec<ChangeEntry> = self
            .world
            .changes
            .iter()
            .filter_map(|seq| self.world.change(*seq))
            .map(|change| change.entry())
            .collect();
        self.meanwhile();
        let changes: Vec<&Change> = changes.iter().collect();
        let known = Union::keys(tails.all(), &changes)
            .into_iter()
            .filter_map(|(user, id)| {
                let way = usize::from(user == "bob");
                let row = self.world.rows.get(&(way, id.clone(), false))?;
                Some(((user, id), super::seq(row.seq)))
            });
        let union = Union::new(
            known.collect(),
            changes,
            Cutoffs::of_one(ROOM, cutoff),
            tails.all(),
        );
        let (mut older, mut newer) = (None, None);
        for (number, (side, rows)) in sides.iter().zip(rows).enumerate() {
            let part = union.part(*side, floor, end, tails.of(number), rows);
            match side {
                Side::Older(_) => older = Some(part),
                Side::Newer(_) => newer = Some(part),
            }
        }
        let page = assemble(limit, older, newer);
        let told = match sides {
            [Side::Newer(after)] => union.entries(indexed, &(after.next()..=page.through)).0,
            _ => Vec::new(),
        };
        (page, told)
    }
}

/// Whether `page` is one the model can give for some moment between `before` and `after`.
fn check(
    page: &Part,
    sides: &[Side],
    limit: usize,
    before: &Truth,
    after: &Truth,
) -> Result<(), String> {
    let seqs: Vec<u64> = page
        .messages
        .iter()
        .map(|message| message.seq.get())
        .collect();
    if !seqs.is_sorted_by(|one, next| one < next) || seqs.len() > limit {
        return Err("not in order, or too many".to_owned());
    }
    let mut low = 1;
    let mut high = page.through.get();
    match *sides {
        [Side::Older(cursor)] => {
            if page.through.get() < before.last.min(cursor.previous().get()) {
                return Err("complete through less than there was".to_owned());
            }
            if page.more {
                low = *seqs.first().ok_or("more, and nothing to go on from")?;
            }
        }
        [Side::Newer(cursor)] => {
            low = cursor.get() + 1;
            if page.more && page.through <= cursor {
                return Err("more, and no way on".to_owned());
            }
            if !page.more && page.through.get() < before.last {
                return Err("no more, and not at the end".to_owned());
            }
        }
        _ => {
            (low, high) = (
                seqs.first().copied().unwrap_or(1),
                seqs.last().copied().unwrap_or(0),
            )
        }
    }
    for message in &page.messages {
        let seq = message.seq.get();
        let Some((deleted, received)) = after.shown.get(&seq) else {
            return Err(format!("{seq} is no message's place"));
        };
        if before.expired(*received) {
            return Err(format!("{seq} had expired"));
        }
        if message.deleted && !deleted || message.deleted != message.text.is_empty() {
            return Err(format!("{seq} is shown as deleted, or has a text beside"));
        }
        if !message.deleted && before.shown.get(&seq).is_some_and(|(deleted, _)| *deleted) {
            return Err(format!("{seq} was deleted, and its text is shown"));
        }
    }
    for (seq, (_, received)) in after
        .shown
        .range(low..=high.max(low))
        .filter(|(seq, _)| **seq <= high)
    {
        if !seqs.contains(seq) && !after.expired(*received) {
            return Err(format!("{seq} is missing"));
        }
    }
    Ok(())
}

/// Every deletion up to where the page is complete is told of, unless its message has expired.
fn check_told(
    page: &Part,
    cursor: Seq,
    told: &[ChangeEntry],
    before: &Truth,
    after: &Truth,
) -> Result<(), String> {
    let told: BTreeSet<u64> = told.iter().map(|entry| entry.seq.get()).collect();
    for (seq, (_, received)) in after.deletions.range(cursor.get() + 1..) {
        if *seq <= page.through.get() && !told.contains(seq) && !after.expired(*received) {
            return Err(format!("deletion {seq} is missing"));
        }
        if told.contains(seq) && *seq > page.through.get() {
            return Err(format!("deletion {seq} lies beyond"));
        }
    }
    let _ = before;
    Ok(())
}

fn worlds(mut each: impl FnMut(&mut World, &mut Random) -> Result<(), String>) {
    for number in 0..WORLDS {
        for (kind, (copies, whole)) in [(true, 1_000), (false, 1_000), (false, 3)]
            .into_iter()
            .enumerate()
        {
            let mut random = Random(number * 3 + kind as u64);
            let mut world = World::new(&mut random, copies, whole);
            for _ in 0..random.below(60) {
                world.step(&mut random);
            }
            let begin = world.clone();
            if let Err(why) = each(&mut world, &mut random) {
                panic!(
                    "world {number}, copies {copies}, whole {whole}: {why}\nbegan as {begin:?}\nended with {:?}",
                    world.said
                );
            }
        }
    }
}

fn sides(world: &World, random: &mut Random) -> Vec<Side> {
    let cursor = seq(random.below(world.last() + 3));
    match random.below(4) {
        0 => vec![Side::Older(Seq::MAX)],
        1 => vec![Side::Older(cursor)],
        2 => vec![Side::Newer(cursor)],
        _ => vec![Side::Older(cursor), Side::Newer(cursor.previous())],
    }
}

#[test]
fn a_page_read_while_the_world_goes_on_is_one_of_the_model() {
    worlds(|world, random| {
        let (sides, limit) = (sides(world, random), 1 + random.below(5) as usize);
        let before = world.truth();
        let (page, told) = Reader {
            world,
            random,
            busy: true,
        }
        .page(&sides, limit);
        let after = world.truth();
        check(&page, &sides, limit, &before, &after)
            .map_err(|why| format!("{sides:?} {limit}: {why}\n{page:#?}"))?;
        match sides[..] {
            [Side::Newer(cursor)] => check_told(&page, cursor, &told, &before, &after)
                .map_err(|why| format!("{sides:?}: {why}")),
            _ => Ok(()),
        }
    });
}

#[test]
fn paging_meets_every_message_once() {
    worlds(|world, random| {
        let (limit, busy) = (1 + random.below(5) as usize, random.one_in(2));
        let before = world.truth();
        for forwards in [true, false] {
            let (mut met, mut side) = (
                BTreeSet::new(),
                if forwards {
                    Side::Newer(Seq::ZERO)
                } else {
                    Side::Older(Seq::MAX)
                },
            );
            for number in 0..1_000 {
                // The world falls silent at last, or nobody would ever come to its end.
                let (page, _) = Reader {
                    world,
                    random,
                    busy: busy && number < 8,
                }
                .page(&[side], limit);
                if let Some(twice) = page
                    .messages
                    .iter()
                    .find(|message| !met.insert(message.seq.get()))
                {
                    return Err(format!("{side:?}: {} comes twice", twice.seq));
                }
                if !page.more {
                    break;
                }
                side = match side {
                    Side::Newer(_) => Side::Newer(page.through),
                    Side::Older(_) => {
                        Side::Older(page.messages.first().ok_or("nothing to go on from")?.seq)
                    }
                };
            }
            let after = world.truth();
            let missed = before
                .shown
                .iter()
                .find(|(seq, (_, at))| !met.contains(seq) && !after.expired(*at));
            if let Some((missed, _)) = missed {
                return Err(format!("forwards {forwards}: {missed} was never met"));
            }
        }
        Ok(())
    });
}

#[test]
fn in_a_world_that_stands_still_a_page_is_full_and_more_is_true() {
    worlds(|world, random| {
        let limit = 1 + random.below(5) as usize;
        let truth = world.truth();
        let all: Vec<u64> = truth
            .shown
            .iter()
            .filter(|(_, (_, at))| !truth.expired(*at))
            .map(|(seq, _)| *seq)
            .collect();
        for side in [
            Side::Older(Seq::MAX),
            Side::Older(seq(random.below(world.last() + 3))),
            Side::Newer(seq(random.below(world.last()))),
        ] {
            let within = |place: &&u64| match side {
                Side::Older(before) => **place < before.get(),
                Side::Newer(after) => **place > after.get(),
            };
            let mut wanted: Vec<u64> = all.iter().filter(within).copied().collect();
            let more = wanted.len() > limit;
            match side {
                Side::Older(_) => drop(wanted.drain(..wanted.len().saturating_sub(limit))),
                Side::Newer(_) => wanted.truncate(limit),
            }
            let (page, _) = Reader {
                world,
                random,
                busy: false,
            }
            .page(&[side], limit);
            let got: Vec<u64> = page
                .messages
                .iter()
                .map(|message| message.seq.get())
                .collect();
            // Of a long tail a part is read, and what has expired in it is left out: then the rest comes next.
            let nearest = if matches!(side, Side::Older(_)) {
                wanted.ends_with(&got)
            } else {
                wanted.starts_with(&got)
            };
            let cut = world.whole == 3 && nearest && page.more;
            if !cut && (got != wanted || page.more != more) {
                return Err(format!(
                    "{side:?} {limit}: {got:?} more {}, and not {wanted:?} more {more}",
                    page.more
                ));
            }
        }
        Ok(())
    });
}
