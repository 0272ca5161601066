//! `audit`: looks up every message of the stream in PostgreSQL; with `--replay` has the stream
//! stored again first.

mod replay;
mod report;
mod request;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use base::error::Fatal;
use base::seq::Seq;
use nats::connection::{Connection, connect};
use nats::settings::NatsSettings;
use protocol::audit::{AuditCounts, Offender};
use protocol::endpoints::{BOOTSTRAP_AUDIT, BOOTSTRAP_REPLAY};
use service::config::{NatsVariables, Vars};

/// A connection that takes longer than this is mentioned on the terminal.
const MENTION_WAITING_AFTER: Duration = Duration::from_secs(1);
/// Offenders that are named; the rest is counted.
const OFFENDERS_SHOWN: usize = 20;

const ENVIRONMENT: &str = "\
Storing again doubles nothing and brings back nothing that was deleted. The exit code is 1 when a
message is missing or another one is stored in its place, and 2 when the arguments are wrong.

Configuration comes from the environment:
  NATS_URL                nats://127.0.0.1:4222; several, separated by commas
  NATS_USER, NATS_PASS    the operator; or NATS_CREDS, a credentials file
  REPLAY_STUCK_AFTER_MS   a replay that does not advance for this long is given up (60000)
NATS_USER and NATS_PASS may stand in files named by NATS_USER_FILE and NATS_PASS_FILE.";

/// Looks up every message of the stream in PostgreSQL and prints what became of it.
#[derive(Debug, Parser)]
#[command(name = "audit", version, after_help = ENVIRONMENT)]
struct Arguments {
    /// Store the stream again from this sequence on, wait for it, and audit then; 0: from its first
    #[arg(long, value_name = "FROM", value_parser = parse_sequence, allow_hyphen_values = true)]
    replay: Option<Seq>,
}

fn parse_sequence(text: &str) -> Result<Seq, String> {
    let number = text.parse().ok().and_then(Seq::new);
    number.ok_or_else(|| "a sequence of the stream is a whole number; 0: from its first".to_owned())
}

service::settings! {
    /// What this program reads beyond where NATS is.
    struct Settings {
        /// A replay that stores nothing for this long has failed.
        replay_stuck_after_ms: u64 = 60_000;
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(fatal) => {
            eprintln!("audit: {fatal}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every message is where it should be.
fn run(arguments: &Arguments) -> Result<bool, Fatal> {
    let vars = Vars::from_env();
    let nats = NatsSettings::from(vars.read::<NatsVariables>()?);
    let settings: Settings = vars.read()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fatal::new(format!("no tokio runtime: {error}")))?;
    runtime.block_on(async {
        let operator = connect_as_operator(&nats).await?;
        if let Some(from) = arguments.replay {
            let stuck_after = Duration::from_millis(settings.replay_stuck_after_ms);
            store_again(&operator, from, stuck_after).await?;
        }
        audit(&operator).await
    })
}

async fn connect_as_operator(nats: &NatsSettings) -> Result<Connection, Fatal> {
    let stop = CancellationToken::new();
    let mut connecting = std::pin::pin!(connect(nats, "audit", &stop));
    tokio::select! {
        connection = &mut connecting => return connection,
        () = tokio::time::sleep(MENTION_WAITING_AFTER) => {
            eprintln!("audit: waiting for NATS at {}", nats.url);
        }
    }
    connecting.await
}

async fn store_again(operator: &Connection, from: Seq, stuck_after: Duration) -> Result<(), Fatal> {
    let body = json!({ "from": from });
    let replayed = request::send(operator, BOOTSTRAP_REPLAY, &body).await?;
    println!(
        "delivering {} to {} again; PostgreSQL held sequences up to {}",
        replayed.from, replayed.through, replayed.stored
    );
    if let Some((first, last)) = replayed.lost {
        println!(
            "WARNING: {first} to {last} is in neither PostgreSQL nor the stream; those messages \
             are \
             lost, unless a backup has them"
        );
    }
    replay::wait_until_stored(operator, &replayed, stuck_after).await
}

/// Audits part by part and prints the sums; whether nothing is wrong.
async fn audit(operator: &Connection) -> Result<bool, Fatal> {
    let mut counts = AuditCounts::default();
    let mut offenders: Vec<Offender> = Vec::new();
    let mut next = Seq::ZERO;
    let mut first = None;
    let bar = report::spinner();
    loop {
        let body = json!({ "from": next, "offenders": OFFENDERS_SHOWN - offenders.len() });
        let part = request::send(operator, BOOTSTRAP_AUDIT, &body).await?;
        counts.add(&part.counts);
        offenders.extend(part.offenders);
        let total = counts.total();
        bar.set_message(format!(
            "{total} messages looked up, to sequence {}",
            part.through
        ));
        let first = *first.get_or_insert(part.from);
        next = part.through.next();
        if part.more {
            continue;
        }
        bar.finish_and_clear();
        report::print_counts(first, part.through, &counts);
        report::print_offenders(&offenders);
        return Ok(counts.missing == 0 && offenders.is_empty());
    }
}
