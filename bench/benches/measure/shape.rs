//! The shape of real systems: a thousand rooms, all functions up, a database that was empty a
//! minute ago (nobody has analyzed it). Beside it, in turn, the same with few rooms: what many
//! rooms cost is the ratio of the two.

use std::path::Path;
use std::time::Duration;

use crate::Plan;
use crate::ingest::{Ingest, ROOMS};
use crate::numbers::{median, rounded, table};
use testing::{Process, World};

pub const MANY_ROOMS: u64 = 1_000;
/// What storing a thousand rooms may take, of what storing eight takes.
const GOAL: f64 = 1.2;
/// Events of messages that are stored come a moment later.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Every function but those, each one replica.
pub async fn all_functions_but(world: &World, without: &[&str]) -> Vec<Process> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../functions");
    let found = std::fs::read_dir(folder)
        .expect("the functions")
        .map(|entry| entry.expect("a function").file_name());
    let names: Vec<String> = found
        .filter_map(|name| name.into_string().ok())
        .filter(|name| !without.contains(&name.as_str()))
        .collect();
    futures::future::join_all(names.iter().map(|name| world.spawn(name))).await
}

/// One way to store, and what came of it.
struct Shape {
    name: &'static str,
    rooms: u64,
    all_functions: bool,
    rates: Vec<f64>,
}

pub async fn ingest(plan: &Plan) {
    let shape = |name, rooms, all_functions| Shape {
        name,
        rooms,
        all_functions,
        rates: Vec::new(),
    };
    let mut shapes = [
        shape("8 rooms, nothing beside it", ROOMS, false),
        shape("8 rooms, all functions up", ROOMS, true),
        shape("1,000 rooms, nothing beside it", MANY_ROOMS, false),
        shape("**1,000 rooms, all functions up**", MANY_ROOMS, true),
    ];
    for round in 1..=plan.rounds {
        for shape in &mut shapes {
            eprintln!(
                "ingest: round {round} of {}, {}",
                plan.rounds,
                shape.name.replace('*', "")
            );
            shape
                .rates
                .push(store(shape.rooms, shape.all_functions, plan.messages).await);
        }
    }
    // Of the same round: whatever slows the machine down for a while slows both.
    let times = |shape: &Shape, of: &Shape| {
        let ratios: Vec<f64> = of
            .rates
            .iter()
            .zip(&shape.rates)
            .map(|(of, rate)| of / rate)
            .collect();
        median(&ratios)
    };
    let lines: Vec<Vec<String>> = shapes
        .iter()
        .map(|shape| {
            let few = &shapes[usize::from(shape.all_functions)];
            let rate = rounded(median(&shape.rates));
            vec![
                shape.name.to_owned(),
                rate,
                format!("{:.2} ×", times(shape, few)),
                format!("{:.2} ×", times(shape, &shapes[0])),
            ]
        })
        .collect();
    let head = [
        "into an empty database, 1 replica of persist-message",
        "messages/s",
        "time, of 8 rooms beside as much",
        "of 8 rooms, nothing beside",
    ];
    table("Ingest, in the shape of real systems", &head, &lines);
    let measured = times(&shapes[3], &shapes[1]);
    let verdict = if measured <= GOAL {
        "reached"
    } else {
        "MISSED"
    };
    println!(
        "{} messages a round into a database of its own each, never analyzed; relay-outbox \
         publishes an event of each meanwhile. Goal: 1,000 \
         rooms take at most {GOAL} × the time of 8, all functions up: {measured:.2} ×, \
         {verdict}.\n",
        plan.messages
    );
}

/// Messages stored a second, in a world of its own.
async fn store(rooms: u64, all_functions: bool, messages: usize) -> f64 {
    let world = World::start().await;
    let functions = if all_functions {
        all_functions_but(&world, &["persist-message"]).await
    } else {
        Vec::new()
    };
    let mut ingest = Ingest {
        rooms,
        ..Ingest::of(&world, 0).await
    };
    ingest.fill(messages).await;
    let rate = ingest.store(1).await;
    // The next way shall have the machine to itself.
    while all_functions && waiting_events(&ingest).await > 0 {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    futures::future::join_all(functions.into_iter().map(Process::terminate)).await;
    rate
}

/// Stored messages without an event.
pub async fn waiting_events(ingest: &Ingest<'_>) -> i64 {
    let waiting = sqlx::query_scalar("select waiting from lag where stage = 'events'");
    waiting
        .fetch_one(&ingest.database)
        .await
        .expect("PostgreSQL answers")
}
