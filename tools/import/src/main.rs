//! `import FILE…`: publishes JSON lines into the stream, in their order, and again without doubling
//! anything.

mod append;
mod check;
mod input;
mod line;
mod reader;
mod report;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::Client;
use clap::Parser;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use append::{Appended, Appender};
use base::error::Fatal;
use check::Ids;
use input::Input;
use line::Lines;
use nats::connection::{Connection, connect};
use nats::settings::NatsSettings;
use protocol::message::Limits;
use reader::{ANOTHER_ID, Found};
use report::{Progress, REFUSED_SHOWN, Summary};
use service::config::{NatsVariables, Vars};

/// A connection that takes longer than this is mentioned on the terminal.
const MENTION_WAITING_AFTER: Duration = Duration::from_secs(1);

const LINES: &str = r#"A line is a message:

  {"user":"alice","text":"hello","timestamp":1763719200000,"room":"general","id":"a-1"}

room       general or chat.general; __admin__ for the admin room
timestamp  Unix milliseconds; without one, when the stream received the message
id         stored once per user and id, over all rooms, for ever; without one, an id is generated
           from the line itself

The order of a file is kept. A line that cannot be stored is refused with its number, the others are
imported, and the exit code is 1; it is 2 when the arguments are wrong. Importing a file again
doubles nothing: within two minutes JetStream recognises its messages, later the stream accepts them
again and PostgreSQL keeps the first ones. While NATS is away, import waits.

A line is refused if its user has used its id for another text or in another room. Two lines of one
run are compared before either is published. An id that was used before this run is found
afterwards, in the rooms' history; that message is then a dead letter (id_conflict). Prefix ids that
are unique in one channel only, such as Slack's ts, with the channel's name.

Configuration comes from the environment:
  NATS_URL              nats://127.0.0.1:4222; several, separated by commas
  NATS_USER, NATS_PASS  a trusted publisher; or NATS_CREDS, a credentials file
  MAX_TEXT_BYTES        the longest text; the same as persist-message's (65536)
NATS_USER and NATS_PASS may stand in files named by NATS_USER_FILE and NATS_PASS_FILE."#;

/// Publishes JSON lines into Scrollback's stream.
#[derive(Debug, Parser)]
#[command(name = "import", version, after_help = LINES)]
struct Arguments {
    /// Files of JSON lines, plain or gzip; - is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<String>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse().files) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(fatal) => {
            eprintln!("import: {fatal}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every line was imported.
fn run(files: &[String]) -> Result<bool, Fatal> {
    let vars = Vars::from_env();
    let nats = NatsSettings::from(vars.read::<NatsVariables>()?);
    let settings: Settings = vars.read()?;
    let consumed = Arc::new(AtomicU64::new(0));
    // All of them are opened before the first line is published, so a mistyped name is noticed at
    // once.
    let inputs: Vec<Input> = files
        .iter()
        .map(|path| {
            Input::open(path, consumed.clone())
                .map_err(|error| Fatal::new(format!("{path} cannot be read: {error}")))
        })
        .collect::<Result<_, _>>()?;
    let progress = Progress::new(&inputs, consumed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Fatal::new(format!("no tokio runtime: {error}")))?;
    let mut summary = Summary::default();
    let outcome = runtime.block_on(async {
        let connection = connect_as_publisher(&nats, &progress).await?;
        let max_payload = connection.client().server_info().max_payload;
        let limits = Limits {
            text_bytes: settings.max_text_bytes,
        };
        let lines = Lines::new(limits, max_payload, now_ms());
        let found = reader::start(inputs, lines);
        import(connection, found, &progress, &mut summary).await
    });
    progress.end();
    summary.print();
    outcome.map(|()| summary.refused == 0)
}

service::settings! {
    /// What this program reads beyond where NATS is.
    struct Settings {
        /// The longest text; the same as for every function.
        max_text_bytes: usize = Limits::default().text_bytes;
    }
}

fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| i64::try_from(now.as_millis()).unwrap_or(i64::MAX))
}

async fn connect_as_publisher(
    nats: &NatsSettings,
    progress: &Progress,
) -> Result<Connection, Fatal> {
    let stop = CancellationToken::new();
    let mut connecting = std::pin::pin!(connect(nats, "import", &stop));
    tokio::select! {
        connection = &mut connecting => return connection,
        () = tokio::time::sleep(MENTION_WAITING_AFTER) => {
            progress.print(&format!("waiting for NATS at {}", nats.url));
        }
    }
    connecting.await
}

async fn import(
    connection: Connection,
    mut found: mpsc::Receiver<Found>,
    progress: &Progress,
    summary: &mut Summary,
) -> Result<(), Fatal> {
    let bar = progress.clone();
    let client = connection.client().clone();
    let mut appender = Appender::new(connection, move |line| bar.print(line)).await?;
    while let Some(found) = found.recv().await {
        match found {
            Found::Batch(batch) => {
                summary.read += batch.len() as u64;
                let Appended { published, known } = appender.append(batch).await?;
                summary.published += published;
                summary.known += known;
            }
            Found::Refused(line) => {
                summary.read += 1;
                summary.refused += 1;
                if summary.refused <= REFUSED_SHOWN {
                    progress.print(&line);
                }
            }
            Found::Broken(fatal) => return Err(fatal),
            Found::Ids(ids, names) => check(ids, &names, &client, progress, summary).await,
        }
        progress.show(summary);
    }
    Ok(())
}

/// Refuses the lines whose id was used before this run for another text or in another room.
async fn check(
    ids: Ids,
    names: &[String],
    client: &Client,
    progress: &Progress,
    summary: &mut Summary,
) {
    let count = ids.len();
    match ids.conflicts(client).await {
        Ok(conflicts) => {
            for (input, line) in conflicts {
                summary.refuse_published();
                if summary.refused <= REFUSED_SHOWN {
                    let name = names.get(input as usize).map_or("", String::as_str);
                    progress.print(&format!(
                        "{name}, line {line}: its user has used this id before, for another text \
                         or \
                         in another room, and the message is a dead letter (id_conflict): \
                         {ANOTHER_ID}"
                    ));
                }
            }
        }
        Err(why) => {
            summary.unchecked = Some(format!(
                "{count} lines have client-supplied ids; whether one was used before for another \
                 text could \
                 not be looked up in history ({why}): look for dead letters with the reason \
                 id_conflict"
            ));
        }
    }
}
