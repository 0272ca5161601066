//! What an idle function costs.

use std::time::{Duration, Instant};

use crate::Plan;
use crate::numbers::{median, table};
use testing::{Process, World};

const FUNCTIONS: [&str; 3] = ["stream-bootstrap", "persist-message", "get-history"];
/// Connections are made and the first pull waits.
const SETTLED_AFTER: Duration = Duration::from_millis(500);

pub async fn measure(world: &World, plan: &Plan) {
    let mut rows = Vec::new();
    for name in FUNCTIONS {
        eprintln!("footprint: {name}");
        let mut started = Vec::new();
        let mut memory = Vec::new();
        for _ in 0..plan.rounds {
            let begun = Instant::now();
            let function = world.spawn(name).await;
            started.push(begun.elapsed().as_secs_f64() * 1e3);
            tokio::time::sleep(SETTLED_AFTER).await;
            memory.push(resident_mib(&function));
            assert!(
                function.terminate().await.success(),
                "{name} stops on a signal"
            );
        }
        rows.push(vec![
            name.to_owned(),
            format!("{:.0} ms", median(&started)),
            format!("{:.1} MiB", median(&memory)),
            format!("{:.1} MiB", binary_mib(name)),
        ]);
    }
    table(
        "Footprint",
        &[
            "function",
            "start to registered",
            "idle memory (VmRSS)",
            "binary",
        ],
        &rows,
    );
    println!("Registered: answering `$SRV.PING`, polled every 20 ms.\n");
}

/// What a process holds in memory.
pub fn resident_mib(process: &Process) -> f64 {
    let status =
        std::fs::read_to_string(format!("/proc/{}/status", process.id())).expect("it runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .expect("Linux reports it");
    line.trim()
        .trim_end_matches(" kB")
        .parse::<f64>()
        .expect("a number")
        / 1024.0
}

fn binary_mib(name: &str) -> f64 {
    // …/target/release/deps/measure: the binaries lie one folder up.
    let this = std::env::current_exe().expect("a running program has a path");
    let binary = this
        .ancestors()
        .nth(2)
        .expect("a bench lies in <profile>/deps")
        .join(name);
    std::fs::metadata(binary).expect("it was started").len() as f64 / f64::from(1 << 20)
}
