//! What Scrollback costs and what it brings, side by side with its limits, in one run on real
//! servers.
//!
//! `just bench` runs the release binaries, about a quarter of an hour; `just bench --quick` shows
//! that it works, `just bench send` measures one part. Progress goes to standard error, the tables
//! to standard output, as Markdown. Each way is taken once a round, so that whatever slows the
//! machine down for a while slows all of them; what is printed is the median of the rounds.

#![expect(
    clippy::expect_used,
    reason = "a measurement that fails measures nothing"
)]

mod direct;
mod expiry;
mod feed;
mod footprint;
mod history;
mod ingest;
mod naive;
mod numbers;
mod pages;
mod send;
mod shape;
mod users;

use std::time::Duration;

use testing::World;

/// How much is measured.
pub struct Plan {
    /// Each way is taken this often.
    pub rounds: usize,
    /// Messages a round, for what takes them in batches.
    pub messages: usize,
    /// Messages a round, for what takes them one by one.
    pub naive_messages: usize,
    /// How long one kind of request is sent.
    pub duration: Duration,
    /// Direct messages in the long stream.
    pub directs: u64,
    /// Each request about them is sent this often.
    pub requests: u64,
    /// Messages that are stored before others expire; half of them expire.
    pub stored: u64,
    /// How long messages are published at a fixed rate without an expiry, before and after it.
    pub steady: Duration,
}

/// The parts, by name.
const PARTS: [&str; 6] = ["footprint", "ingest", "history", "send", "direct", "expiry"];

const FULL: Plan = Plan {
    rounds: 3,
    messages: 100_000,
    naive_messages: 10_000,
    duration: Duration::from_millis(1_500),
    directs: 1_000_000,
    requests: 1_000,
    stored: 1_000_000,
    steady: Duration::from_secs(20),
};
const QUICK: Plan = Plan {
    rounds: 1,
    messages: 20_000,
    naive_messages: 1_000,
    duration: Duration::from_millis(300),
    directs: 200_000,
    requests: 200,
    stored: 200_000,
    steady: Duration::from_secs(4),
};

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    // `cargo test --all-targets` runs this too, without the argument that `cargo bench` gives.
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("nothing measured: run just bench");
        return;
    }
    let plan = if arguments.iter().any(|argument| argument == "--quick") {
        QUICK
    } else {
        FULL
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a tokio runtime");
    let parts: Vec<&str> = PARTS
        .into_iter()
        .filter(|part| arguments.iter().any(|argument| argument == part))
        .collect();
    runtime.block_on(measure(
        &plan,
        if parts.is_empty() { &PARTS } else { &parts },
    ));
}

async fn measure(plan: &Plan, parts: &[&str]) {
    let world = World::builder().administrator().start().await;
    println!("{}\n", machine(&world).await);
    for &part in parts {
        match part {
            "footprint" => footprint::measure(&world, plan).await,
            "ingest" => ingest::measure(&world, plan).await,
            "history" => history::measure(&world, plan).await,
            "send" => send::measure(&world, plan).await,
            "direct" => direct::measure(plan).await,
            _ => expiry::measure(plan).await,
        }
    }
}

/// Where the figures come from; without it they mean nothing.
async fn machine(world: &World) -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let model = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("", |model| model.trim_start_matches([' ', '\t', ':']));
    let postgres: String = sqlx::query_scalar("show server_version")
        .fetch_one(&world.database().await)
        .await
        .expect("PostgreSQL answers");
    let nats = world.client("operator").await.server_info().version.clone();
    format!(
        "{cpus} × {model}, everything on it; nats-server {nats} (sync_interval: always), \
         PostgreSQL {postgres} (default durability)"
    )
}
