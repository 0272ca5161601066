//! `import FILE…`: publishes JSON lines into the log, in their order, and again without doubling anything.

mod append;
mod check;
mod input;
mod line;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_nats::Client;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use append::{Appended, Appender};
use base::error::Fatal;
use check::Ids;
use input::{Input, Line};
use line::{Lines, Outgoing};
use nats::connection::{Connection, connect};
use nats::settings::NatsSettings;
use protocol::message::Limits;
use service::config::Vars;

/// JetStream takes at most 1000 messages in a batch.
const BATCH_MESSAGES: usize = 500;
/// A batch of long texts ends here: its acknowledgement should not take a slow line minutes.
const BATCH_BYTES: usize = 1 << 20;
/// Refused lines that are shown; the rest is counted.
const REFUSED_SHOWN: u64 = 10;
const ANOTHER_ID: &str = "an id counts for its user in all rooms; give the line another one";
const TELL_WAITING_AFTER: Duration = Duration::from_secs(1);
const BAR_INTERVAL: Duration = Duration::from_millis(200);

const HELP: &str = r#"Publishes JSON lines into Scrollback's log.

usage: import FILE…

FILE is a file of JSON lines, plain or gzip, or - for standard input. A line is a message:

  {"user":"alice","text":"hello","timestamp":1763719200000,"room":"general","id":"a-1"}

room       general or chat.general; __admin__ for the admin room
timestamp  Unix milliseconds; without one, when the log received the message
id         stored once per user and id, over all rooms, for ever; without one, an id is made from the line itself

The order of a file is kept. Lines that cannot be stored are refused with their number and the others imported; the exit code is
then 1. Importing a file again doubles nothing: within two minutes the log knows its messages, later the log takes them
again and PostgreSQL keeps the first ones. While NATS is away import waits.

A line whose id its user has for another text or in another room is refused: within a run before anything of it is published;
else it is found afterwards, when the history of the rooms is read, and the message is a dead letter (id_conflict). An id that is
unique in its channel only, such as Slack's ts, needs the channel's name in it.

Configuration comes from the environment:
  NATS_URL              nats://127.0.0.1:4222; several, separated by commas
  NATS_USER, NATS_PASS  a trusted publisher; or NATS_CREDS, a credentials file
  MAX_TEXT_BYTES        the longest text; the same as persist-message's (65536)
NATS_USER and NATS_PASS may stand in files named by NATS_USER_FILE and NATS_PASS_FILE."#;

fn main() -> ExitCode {
    let mut files = Vec::new();
    let mut only_files = false;
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            _ if only_files => files.push(argument),
            "--help" | "-h" => {
                println!("{HELP}");
                return ExitCode::SUCCESS;
            }
            "--version" | "-V" => {
                println!("import {}", env!("CARGO_PKG_VERSION"));
                return ExitCode::SUCCESS;
            }
            "--" => only_files = true,
            "-" => files.push(argument),
            unknown if unknown.starts_with('-') => {
                return usage(&format!("unknown option {unknown}"));
            }
            _ => files.push(argument),
        }
    }
    if files.is_empty() {
        return usage("which file? - is standard input");
    }
    match run(&files) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(fatal) => {
            eprintln!("import: {fatal}");
            ExitCode::FAILURE
        }
    }
}

fn usage(what: &str) -> ExitCode {
    eprintln!("import: {what}\nusage: import FILE…   (import --help says more)");
    ExitCode::from(2)
}

/// Whether every line was imported.
fn run(files: &[String]) -> Result<bool, Fatal> {
    let vars = Vars::from_env()?;
    let (nats, settings): (NatsSettings, Settings) = (vars.read()?, vars.read()?);
    let consumed = Arc::new(AtomicU64::new(0));
    // All of them before the first line is published: a name mistyped is noticed at once.
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
        let connection = connected(&nats, &progress).await?;
        let max_payload = connection.client().server_info().max_payload;
        let limits = Limits {
            text_bytes: settings.max_text_bytes,
        };
        import(
            connection,
            read(inputs, Lines::new(limits, max_payload, now_ms())),
            &progress,
            &mut summary,
        )
        .await
    });
    progress.end();
    summary.print();
    outcome.map(|()| summary.refused == 0)
}

#[derive(Deserialize)]
struct Settings {
    /// `MAX_TEXT_BYTES`.
    #[serde(default = "default_max_text_bytes")]
    max_text_bytes: usize,
}

fn default_max_text_bytes() -> usize {
    Limits::default().text_bytes
}

fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| i64::try_from(now.as_millis()).unwrap_or(i64::MAX))
}

async fn connected(nats: &NatsSettings, progress: &Progress) -> Result<Connection, Fatal> {
    let stop = CancellationToken::new();
    let mut connecting = std::pin::pin!(connect(nats, "import", &stop));
    tokio::select! {
        connection = &mut connecting => return connection,
        () = tokio::time::sleep(TELL_WAITING_AFTER) => progress.tell(&format!("waiting for NATS at {}", nats.printable_url())),
    }
    connecting.await
}

/// What the reader found, in the order of the files.
enum Found {
    Batch(Vec<Outgoing>),
    Refused(String),
    /// Nothing after this can be read.
    Broken(Fatal),
    /// The end: every id that lines brought along, and the names of the inputs.
    Ids(Ids, Vec<String>),
}

/// Reads on a thread of its own, so that the next batch is ready when this one is acknowledged.
fn read(inputs: Vec<Input>, lines: Lines) -> mpsc::Receiver<Found> {
    let (found, receiver) = mpsc::channel(2);
    // Nobody listening means that the import failed: the process is on its way out.
    std::thread::spawn(move || {
        let names = inputs.iter().map(|input| input.name.clone()).collect();
        let mut reader = Reader {
            found,
            batch: Vec::new(),
            bytes: 0,
            ids: Ids::default(),
            names,
            input: 0,
        };
        for (number, input) in (0..).zip(inputs) {
            reader.input = number;
            // Each file counts its own repeated lines, so that it makes no difference which files are imported together.
            if reader.file(input, lines.fresh()).is_none() {
                return;
            }
        }
        if reader.flush().is_some() {
            _ = reader
                .found
                .blocking_send(Found::Ids(reader.ids, reader.names));
        }
    });
    receiver
}

struct Reader {
    found: mpsc::Sender<Found>,
    batch: Vec<Outgoing>,
    bytes: usize,
    ids: Ids,
    names: Vec<String>,
    input: u32,
}

impl Reader {
    fn file(&mut self, mut input: Input, mut lines: Lines) -> Option<()> {
        loop {
            let message = match input.next() {
                Ok(None) => return Some(()),
                Ok(Some(Line::Text(text))) if text.trim_ascii().is_empty() => continue,
                Ok(Some(Line::Text(text))) => lines.read(&text),
                Ok(Some(Line::TooLong)) => {
                    Err(format!("longer than {} bytes", input::MAX_LINE_BYTES))
                }
                Err(error) => {
                    self.flush()?;
                    let broken = Fatal::new(format!(
                        "{} cannot be read after line {}: {error}",
                        input.name,
                        input.line()
                    ));
                    self.found.blocking_send(Found::Broken(broken)).ok()?;
                    return None;
                }
            };
            match message.and_then(|message| self.named(message, input.line())) {
                Ok(message) => {
                    if self.batch.len() == BATCH_MESSAGES
                        || self.bytes + message.payload.len() > BATCH_BYTES
                    {
                        self.flush()?;
                    }
                    self.bytes += message.payload.len();
                    self.batch.push(message);
                }
                Err(why) => self
                    .found
                    .blocking_send(Found::Refused(format!(
                        "{}, line {}: {why}",
                        input.name,
                        input.line()
                    )))
                    .ok()?,
            }
        }
    }

    /// The message, unless an earlier line has its id for something else.
    fn named(&mut self, message: Outgoing, line: u64) -> Result<Outgoing, String> {
        let Some(id) = message.own_id else {
            return Ok(message);
        };
        match self.ids.give(&message.room, id, self.input, line) {
            Ok(()) => Ok(message),
            Err((input, line)) => {
                let other = self.names.get(input as usize).map_or("", String::as_str);
                Err(format!(
                    "its user has this id in {other}, line {line}, for another text or in another room: {ANOTHER_ID}"
                ))
            }
        }
    }

    fn flush(&mut self) -> Option<()> {
        self.bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() {
            Some(())
        } else {
            self.found.blocking_send(Found::Batch(batch)).ok()
        }
    }
}

async fn import(
    connection: Connection,
    mut found: mpsc::Receiver<Found>,
    progress: &Progress,
    summary: &mut Summary,
) -> Result<(), Fatal> {
    let (bar, client) = (progress.clone(), connection.client().clone());
    let mut appender = Appender::new(connection, move |line| bar.tell(line)).await?;
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
                    progress.tell(&line);
                }
            }
            Found::Broken(fatal) => return Err(fatal),
            Found::Ids(ids, names) => check(ids, &names, &client, progress, summary).await,
        }
        progress.show(summary);
    }
    Ok(())
}

/// Looks whether an id was used before this run for something else.
async fn check(
    ids: Ids,
    names: &[String],
    client: &Client,
    progress: &Progress,
    summary: &mut Summary,
) {
    let given = ids.len();
    match ids.conflicts(client).await {
        Ok(conflicts) => {
            for (input, line) in conflicts {
                summary.refuse_published();
                if summary.refused <= REFUSED_SHOWN {
                    let name = names.get(input as usize).map_or("", String::as_str);
                    let why = "its user has used this id before, for another text or in another room, and the message is a dead letter";
                    progress.tell(&format!(
                        "{name}, line {line}: {why} (id_conflict): {ANOTHER_ID}"
                    ));
                }
            }
        }
        Err(why) => {
            summary.unchecked = Some(format!(
                "{given} lines have ids of their own; whether one was used before for another text could not be looked up in history \
                 ({why}): dead letters with the reason id_conflict would tell"
            ));
        }
    }
}

struct Summary {
    begun: Instant,
    read: u64,
    published: u64,
    known: u64,
    refused: u64,
    /// What could not be looked up.
    unchecked: Option<String>,
}

impl Default for Summary {
    fn default() -> Self {
        Summary {
            begun: Instant::now(),
            read: 0,
            published: 0,
            known: 0,
            refused: 0,
            unchecked: None,
        }
    }
}

impl Summary {
    /// A message that was published, or there already, is none that readers see.
    fn refuse_published(&mut self) {
        self.refused += 1;
        *(if self.published > 0 {
            &mut self.published
        } else {
            &mut self.known
        }) -= 1;
    }

    fn rate(&self) -> f64 {
        (self.published + self.known) as f64 / self.begun.elapsed().as_secs_f64().max(0.001)
    }

    fn print(&self) {
        let Summary {
            begun,
            read,
            published,
            known,
            refused,
            unchecked,
        } = self;
        if *refused > REFUSED_SHOWN {
            eprintln!("… and {} more lines refused", refused - REFUSED_SHOWN);
        }
        eprintln!(
            "{read} read, {published} published, {known} already there, {refused} refused; {:.1} s, {:.0} messages/s",
            begun.elapsed().as_secs_f64(),
            self.rate()
        );
        if let Some(unchecked) = unchecked {
            eprintln!("import: {unchecked}");
        }
    }
}

/// A bar on a terminal, and nothing elsewhere; lines for the user above it.
#[derive(Clone)]
struct Progress {
    bar: ProgressBar,
    consumed: Arc<AtomicU64>,
}

impl Progress {
    fn new(inputs: &[Input], consumed: Arc<AtomicU64>) -> Progress {
        let target = if std::io::stderr().is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        // Standard input has no known length; then there is only something that turns.
        let sized = inputs.iter().all(|input| input.bytes > 0);
        let total = sized.then(|| inputs.iter().map(|input| input.bytes).sum());
        let bar = ProgressBar::with_draw_target(total, target);
        let template = if sized {
            "{bar:40} {percent:>3} %  {msg}"
        } else {
            "{spinner}  {msg}"
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(BAR_INTERVAL);
        Progress { bar, consumed }
    }

    fn show(&self, summary: &Summary) {
        self.bar.set_position(self.consumed.load(Ordering::Relaxed));
        self.bar.set_message(format!(
            "{} messages, {:.0}/s",
            summary.published + summary.known,
            summary.rate()
        ));
    }

    fn tell(&self, line: &str) {
        self.bar.suspend(|| eprintln!("import: {line}"));
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}
