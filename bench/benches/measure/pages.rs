//! The page's query beside a plain one, by pgbench: on the same rows, with the functions' session
//! settings, prepared.

use std::time::Duration;

use tokio::process::Command;

use crate::Plan;
use crate::numbers::{median, rounded, table};
use crate::shape::MANY_ROOMS;
use postgres::database::SESSION;
use testing::World;

/// The very text get-history runs.
const PAGE: &str = include_str!("../../../shared/timeline/src/older.sql");
/// The newest rows of a room, by somebody who has heard of neither expiry nor what is not stored
/// yet.
const PLAIN: &str = "
    select seq, sender, recipient, id, text, sent_at, deleted from messages
     where room_id = (select id from rooms where name = $1) and seq < $2
     order by seq desc limit $3";
/// Rows of a page's query: get-history's 50, and one more that shows whether there are more.
const ROWS: u32 = 51;
/// What the page's query may take, of what a plain one takes.
const GOAL: f64 = 1.3;
const SIDE_BY_SIDE: u32 = 4;

pub async fn measure(world: &World, plan: &Plan) {
    let mut plain = Vec::new();
    let mut page = Vec::new();
    let rounds = plan.rounds * 3;
    for round in 1..=rounds {
        eprintln!("history: pgbench, round {round} of {rounds}");
        plain.push(pgbench(world, PLAIN, plan.duration).await);
        page.push(pgbench(world, PAGE, plan.duration).await);
    }
    let times: Vec<f64> = plain
        .iter()
        .zip(&page)
        .map(|(plain, page)| plain / page)
        .collect();
    let measured = median(&times);
    let line = |name: &str, rates: &[f64], times: f64| {
        vec![
            name.to_owned(),
            rounded(median(rates)),
            format!("{times:.2} ×"),
        ]
    };
    table(
        "A page's query, by pgbench",
        &[
            "50 newest of any of 1,000 rooms",
            "queries/s",
            "time, of the plain one",
        ],
        &[
            line("plain: a room's newest rows", &plain, 1.0),
            line(
                "**get-history's**: not expired, not beyond the stream's end",
                &page,
                measured,
            ),
        ],
    );
    let verdict = if measured <= GOAL {
        "reached"
    } else {
        "MISSED"
    };
    println!(
        "pgbench -M prepared, {SIDE_BY_SIDE} connections, the functions' session settings, tables \
         nobody analyzed. Goal: at most {GOAL} ×: \
         {measured:.2} ×, {verdict}.\n"
    );
}

/// Runs the query for a while, each time for another room; how many a second.
async fn pgbench(world: &World, query: &str, duration: Duration) -> f64 {
    let script = script(query);
    let file = std::env::temp_dir().join(format!("scrollback-pgbench-{}.sql", std::process::id()));
    std::fs::write(&file, &script).expect("a file for pgbench");
    let options: Vec<String> = SESSION
        .iter()
        .map(|(name, value)| format!("-c {name}={value}"))
        .collect();
    let output = Command::new(world.postgres().program("pgbench"))
        .args([
            "--no-vacuum",
            "--protocol=prepared",
            "--client",
            &SIDE_BY_SIDE.to_string(),
        ])
        .args([
            "--time",
            &duration.as_secs_f64().ceil().to_string(),
            "--file",
        ])
        .arg(&file)
        .arg(world.database_url())
        .env("PGOPTIONS", options.join(" "))
        .output()
        .await
        .expect("pgbench can be started: it comes with PostgreSQL");
    std::fs::remove_file(&file).expect("our own file");
    let out = String::from_utf8_lossy(&output.stdout);
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && out.contains("number of failed transactions: 0 "),
        "pgbench: {log}{out}\n{script}"
    );
    let tps = out
        .lines()
        .find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    tps.unwrap_or_else(|| panic!("pgbench prints no tps: {out}"))
}

/// pgbench makes parameters of its own variables.
fn script(query: &str) -> String {
    let mut sql = query.trim().to_owned();
    for (parameter, variable) in [
        ("$1", "('room-' || :room)"),
        ("$2", ":before"),
        ("$3", ":rows"),
        ("$4", ":before"),
    ] {
        sql = sql.replace(parameter, variable);
    }
    assert!(
        !sql.contains('$'),
        "a parameter of the page's query that this does not know: {sql}"
    );
    let rooms = MANY_ROOMS - 1;
    format!(
        "\\set room random(0, {rooms})\n\\set before 9223372036854775807\n\\set rows \
         {ROWS}\n{sql};\n"
    )
}
