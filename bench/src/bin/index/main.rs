//! `index audit`, `index replay FROM`: whether PostgreSQL has what the log holds, and storing the log again.

mod asking;
mod following;
mod show;

use std::process::ExitCode;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use base::error::Fatal;
use base::seq::Seq;
use nats::connection::{Connection, connect};
use nats::settings::NatsSettings;
use protocol::audit::{AuditCounts, Offender};
use protocol::endpoints::{BOOTSTRAP_AUDIT, BOOTSTRAP_REPLAY};
use service::config::Vars;

const TELL_WAITING_AFTER: Duration = Duration::from_secs(1);
/// Offenders that are named; the rest is counted.
const OFFENDERS_SHOWN: usize = 20;

const HELP: &str = "\
Says whether PostgreSQL has what the log holds, and has the log stored again.

usage: index audit          looks up every message of the log and prints what became of it
       index replay FROM    stores the log again from sequence FROM on, waits for it, and audits; 0: from the log's first

Storing again doubles nothing and brings nothing back that was deleted. The exit code is 1 when a message is missing, or another
one stands in its place.

Configuration comes from the environment:
  NATS_URL                nats://127.0.0.1:4222; several, separated by commas
  NATS_USER, NATS_PASS    the operator; or NATS_CREDS, a credentials file
  REPLAY_STUCK_AFTER_MS   so long nothing may move while it is waited for (60000)
NATS_USER and NATS_PASS may stand in files named by NATS_USER_FILE and NATS_PASS_FILE.";

#[derive(Deserialize)]
struct Settings {
    /// `REPLAY_STUCK_AFTER_MS`.
    #[serde(default = "default_stuck_after_ms")]
    replay_stuck_after_ms: u64,
}

const fn default_stuck_after_ms() -> u64 {
    60_000
}

enum Task {
    Audit,
    Replay(Seq),
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let task = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--help" | "-h"] => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        ["audit"] => Task::Audit,
        ["replay", from] => match from.parse().ok().and_then(Seq::new) {
            Some(from) => Task::Replay(from),
            None => {
                return usage("FROM is a sequence of the log, a whole number; 0: from its first");
            }
        },
        ["replay"] => return usage("from which sequence on? 0: from the log's first"),
        _ => return usage("audit, or replay FROM?"),
    };
    match run(&task) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(fatal) => {
            eprintln!("index: {fatal}");
            ExitCode::FAILURE
        }
    }
}

fn usage(what: &str) -> ExitCode {
    eprintln!("index: {what}\nusage: index audit, index replay FROM   (index --help says more)");
    ExitCode::from(2)
}

/// Whether everything is where it should be.
fn run(task: &Task) -> Result<bool, Fatal> {
    let vars = Vars::from_env()?;
    let (nats, settings): (NatsSettings, Settings) = (vars.read()?, vars.read()?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fatal::new(format!("no tokio runtime: {error}")))?;
    runtime.block_on(async {
        let operator = connected(&nats).await?;
        if let Task::Replay(from) = task {
            replay(
                &operator,
                *from,
                Duration::from_millis(settings.replay_stuck_after_ms),
            )
            .await?;
        }
        audit(&operator).await
    })
}

async fn connected(nats: &NatsSettings) -> Result<Connection, Fatal> {
    let stop = CancellationToken::new();
    let mut connecting = std::pin::pin!(connect(nats, "index", &stop));
    tokio::select! {
        connection = &mut connecting => return connection,
        () = tokio::time::sleep(TELL_WAITING_AFTER) => eprintln!("index: waiting for NATS at {}", nats.printable_url()),
    }
    connecting.await
}

async fn replay(operator: &Connection, from: Seq, stuck_after: Duration) -> Result<(), Fatal> {
    let replayed = asking::ask(operator, BOOTSTRAP_REPLAY, &json!({ "from": from })).await?;
    println!(
        "delivering {} to {} again; the index knew sequences up to {}",
        replayed.from, replayed.through, replayed.stored
    );
    if let Some((first, last)) = replayed.lost {
        println!(
            "WARNING: {first} to {last} is in neither the index nor the log; what was said there is lost, unless a backup has it"
        );
    }
    following::until_stored(operator, &replayed, stuck_after).await
}

/// Part by part, with the sums at the end; whether nothing is wrong.
async fn audit(operator: &Connection) -> Result<bool, Fatal> {
    let (mut counts, mut offenders): (AuditCounts, Vec<Offender>) = Default::default();
    let (mut next, mut begun) = (Seq::ZERO, None);
    let bar = show::spinner();
    loop {
        let request = json!({ "from": next, "offenders": OFFENDERS_SHOWN - offenders.len() });
        let part = asking::ask(operator, BOOTSTRAP_AUDIT, &request).await?;
        counts.add(&part.counts);
        offenders.extend(part.offenders);
        bar.set_message(format!(
            "{} messages looked up, to sequence {}",
            counts.total(),
            part.through
        ));
        let begun = *begun.get_or_insert(part.from);
        next = part.through.next();
        if part.more {
            continue;
        }
        bar.finish_and_clear();
        show::counts(begun, part.through, &counts);
        show::offenders(&offenders);
        return Ok(counts.missing == 0 && offenders.is_empty());
    }
}
