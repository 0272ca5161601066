//! The reader of the property test. It takes its steps in the order that the merge demands, and the
//! world goes on between any two of them.

use super::world::{ROOM, Random, World};
use crate::cutoffs::Cutoffs;
use crate::frontier::Frontier;
use crate::merge::tests::seq as position;
use crate::merge::{Direction, Merge, Part, Rows, assemble};
use crate::tail::{SubjectRange, Tail, Tails};
use jetstream::stream::StreamMessage;
use protocol::change::{Change, ChangeEntry};
use protocol::message::Limits;

/// A reader, step by step; the world goes on between any two when it is `busy`.
pub(super) struct Reader<'a> {
    pub(super) world: &'a mut World,
    pub(super) random: &'a mut Random,
    pub(super) busy: bool,
}

impl Reader<'_> {
    fn meanwhile(&mut self) {
        while self.busy && !self.random.one_in(3) {
            self.world.step(self.random);
        }
    }

    fn subject_range(
        &mut self,
        way: usize,
        from: u64,
        before: u64,
        need: usize,
        newest: bool,
    ) -> SubjectRange {
        self.meanwhile();
        let mut messages = self.world.messages(way, from, before);
        let is_message = |message: &StreamMessage| message.payload.starts_with(b"{");
        let all = messages.len();
        let mut kept = 0;
        let mut enough = |message: &StreamMessage| {
            kept += usize::from(is_message(message));
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
        SubjectRange {
            messages,
            complete,
            from: position(from),
        }
    }

    fn tails(&mut self, frontier: Frontier, directions: &[Direction], need: usize) -> Tails {
        let limits = Limits::default();
        let from = frontier.first_unstored();
        let whole = self.world.whole;
        if frontier.is_all_stored() {
            return Tails::from(Tail::empty(from));
        }
        let read = (0..2)
            .map(|way| self.subject_range(way, from.get(), u64::MAX, whole, false))
            .collect();
        let tail = Tail::of_oldest(read, from, limits);
        if tail.complete || tail.through >= frontier.end {
            return Tails::from(tail);
        }
        let tails = directions.iter().map(|direction| match *direction {
            Direction::Older(before) => {
                let before = before.min(frontier.end.next());
                let read = (0..2)
                    .map(|way| self.subject_range(way, from.get(), before.get(), need, true))
                    .collect();
                Tail::of_newest(read, before, limits)
            }
            Direction::Newer(after) => {
                let from = frontier.stored_through.max(after).next();
                let read = (0..2)
                    .map(|way| self.subject_range(way, from.get(), u64::MAX, need, false))
                    .collect();
                Tail::of_oldest(read, from, limits)
            }
        });
        Tails::of_directions(tails.collect())
    }

    /// One page, and the changes of sync.
    pub(super) fn page(
        &mut self,
        directions: &[Direction],
        limit: usize,
    ) -> (Part, Vec<ChangeEntry>) {
        // What is known of the ack floor may be old.
        let old = if self.busy {
            self.random.below(3) as usize
        } else {
            0
        };
        let throughs = &self.world.stored_throughs;
        let stored_through = position(throughs[throughs.len().saturating_sub(1 + old)]);
        self.meanwhile();
        let frontier = Frontier {
            stored_through,
            end: position(self.world.last()).max(stored_through),
        };
        let tails = self.tails(frontier, directions, limit + 1);
        self.meanwhile();
        let changes = self.world.deletions_above(stored_through.get());
        self.meanwhile();
        let cutoff = self.world.cutoff();
        let wanted = limit + 1 + tails.duplicates();
        let rows: Vec<Rows> = directions
            .iter()
            .map(|direction| self.world.rows_of(*direction, frontier.end, cutoff, wanted))
            .collect();
        let stored_changes: Vec<ChangeEntry> = self
            .world
            .changes
            .iter()
            .filter_map(|seq| self.world.change(*seq))
            .map(|change| change.entry())
            .collect();
        self.meanwhile();
        let changes: Vec<&Change> = changes.iter().collect();
        let stored = Merge::lookup_keys(tails.all(), &changes)
            .into_iter()
            .filter_map(|(user, id)| {
                let way = usize::from(user == "bob");
                let row = self.world.rows.get(&(way, id.clone(), false))?;
                Some(((user, id), position(row.seq)))
            });
        let merge = Merge::new(
            stored.collect(),
            changes,
            Cutoffs::of_one(ROOM, cutoff),
            tails.all(),
        );
        let mut older = None;
        let mut newer = None;
        for (number, (direction, rows)) in directions.iter().zip(rows).enumerate() {
            let part = merge.part(*direction, frontier, tails.of(number), rows);
            match direction {
                Direction::Older(_) => older = Some(part),
                Direction::Newer(_) => newer = Some(part),
            }
        }
        let page = assemble(limit, older, newer);
        let changes = match directions {
            [Direction::Newer(after)] => {
                merge
                    .changes(stored_changes, &(after.next()..=page.through))
                    .0
            }
            _ => Vec::new(),
        };
        (page, changes)
    }
}
