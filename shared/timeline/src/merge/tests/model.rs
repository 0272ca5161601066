//! The property: whatever happened, and whatever happens between the reads, a page is the page of a
//! simple model.

mod reader;
mod world;

use std::collections::BTreeSet;

use super::*;
use reader::Reader;
use world::{Random, Truth, World};

/// Of each kind of world so many are tried.
const WORLDS: u64 = 150;

/// Whether `page` is one the model can give for some moment between `before` and `after`.
fn check(
    page: &Part,
    directions: &[Direction],
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
    match *directions {
        [Direction::Older(cursor)] => {
            if page.through.get() < before.last.min(cursor.previous().get()) {
                return Err("complete through less than there was".to_owned());
            }
            if page.more {
                low = *seqs.first().ok_or("more, and nothing to go on from")?;
            }
        }
        [Direction::Newer(cursor)] => {
            low = cursor.get() + 1;
            if page.more && page.through <= cursor {
                return Err("more, and no way on".to_owned());
            }
            if !page.more && page.through.get() < before.last {
                return Err("no more, and not at the end".to_owned());
            }
        }
        _ => {
            low = seqs.first().copied().unwrap_or(1);
            high = seqs.last().copied().unwrap_or(0);
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

/// Whether `changes` has every deletion up to where the page is complete, apart from those whose
/// message has expired.
fn check_changes(
    page: &Part,
    cursor: Seq,
    changes: &[ChangeEntry],
    after: &Truth,
) -> Result<(), String> {
    let changes: BTreeSet<u64> = changes.iter().map(|entry| entry.seq.get()).collect();
    for (seq, (_, received)) in after.deletions.range(cursor.get() + 1..) {
        if *seq <= page.through.get() && !changes.contains(seq) && !after.expired(*received) {
            return Err(format!("deletion {seq} is missing"));
        }
        if changes.contains(seq) && *seq > page.through.get() {
            return Err(format!("deletion {seq} lies beyond"));
        }
    }
    Ok(())
}

fn worlds(mut each: impl FnMut(&mut World, &mut Random) -> Result<(), String>) {
    for number in 0..WORLDS {
        for (kind, (duplicates, whole)) in [(true, 1_000), (false, 1_000), (false, 3)]
            .into_iter()
            .enumerate()
        {
            let mut random = Random(number * 3 + kind as u64);
            let mut world = World::new(&mut random, duplicates, whole);
            for _ in 0..random.below(60) {
                world.step(&mut random);
            }
            let begin = world.clone();
            if let Err(why) = each(&mut world, &mut random) {
                panic!(
                    "world {number}, duplicates {duplicates}, whole {whole}: {why}\n\
                     began as {begin:?}\nended with {:?}",
                    world.sent
                );
            }
        }
    }
}

fn directions(world: &World, random: &mut Random) -> Vec<Direction> {
    let cursor = seq(random.below(world.last() + 3));
    match random.below(4) {
        0 => vec![Direction::Older(Seq::MAX)],
        1 => vec![Direction::Older(cursor)],
        2 => vec![Direction::Newer(cursor)],
        _ => vec![
            Direction::Older(cursor),
            Direction::Newer(cursor.previous()),
        ],
    }
}

#[test]
fn a_page_read_while_the_world_goes_on_is_one_of_the_model() {
    worlds(|world, random| {
        let directions = directions(world, random);
        let limit = 1 + random.below(5) as usize;
        let before = world.truth();
        let (page, changes) = Reader {
            world,
            random,
            busy: true,
        }
        .page(&directions, limit);
        let after = world.truth();
        check(&page, &directions, limit, &before, &after)
            .map_err(|why| format!("{directions:?} {limit}: {why}\n{page:#?}"))?;
        match directions[..] {
            [Direction::Newer(cursor)] => check_changes(&page, cursor, &changes, &after)
                .map_err(|why| format!("{directions:?}: {why}")),
            _ => Ok(()),
        }
    });
}

#[test]
fn paging_meets_every_message_once() {
    worlds(|world, random| {
        let limit = 1 + random.below(5) as usize;
        let busy = random.one_in(2);
        let before = world.truth();
        for forwards in [true, false] {
            let mut met = BTreeSet::new();
            let mut direction = if forwards {
                Direction::Newer(Seq::ZERO)
            } else {
                Direction::Older(Seq::MAX)
            };
            for number in 0..1_000 {
                // In the end nothing happens any more: otherwise the paging would never end.
                let (page, _) = Reader {
                    world,
                    random,
                    busy: busy && number < 8,
                }
                .page(&[direction], limit);
                if let Some(twice) = page
                    .messages
                    .iter()
                    .find(|message| !met.insert(message.seq.get()))
                {
                    return Err(format!("{direction:?}: {} comes twice", twice.seq));
                }
                if !page.more {
                    break;
                }
                direction = match direction {
                    Direction::Newer(_) => Direction::Newer(page.through),
                    Direction::Older(_) => {
                        Direction::Older(page.messages.first().ok_or("nothing to go on from")?.seq)
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
        for direction in [
            Direction::Older(Seq::MAX),
            Direction::Older(seq(random.below(world.last() + 3))),
            Direction::Newer(seq(random.below(world.last()))),
        ] {
            let within = |place: &&u64| match direction {
                Direction::Older(before) => **place < before.get(),
                Direction::Newer(after) => **place > after.get(),
            };
            let mut wanted: Vec<u64> = all.iter().filter(within).copied().collect();
            let more = wanted.len() > limit;
            match direction {
                Direction::Older(_) => drop(wanted.drain(..wanted.len().saturating_sub(limit))),
                Direction::Newer(_) => wanted.truncate(limit),
            }
            let (page, _) = Reader {
                world,
                random,
                busy: false,
            }
            .page(&[direction], limit);
            let got: Vec<u64> = page
                .messages
                .iter()
                .map(|message| message.seq.get())
                .collect();
            // Of a long tail only a part is read, and expired messages are left out of it: then the
            // page is shorter, and the rest comes next.
            let nearest = if matches!(direction, Direction::Older(_)) {
                wanted.ends_with(&got)
            } else {
                wanted.starts_with(&got)
            };
            let cut = world.whole == 3 && nearest && page.more;
            if !cut && (got != wanted || page.more != more) {
                return Err(format!(
                    "{direction:?} {limit}: {got:?} more {}, and not {wanted:?} more {more}",
                    page.more
                ));
            }
        }
        Ok(())
    });
}
