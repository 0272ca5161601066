//! Reads the files on a thread of its own and hands on batches of messages.

use tokio::sync::mpsc;

use crate::check::Ids;
use crate::input::{self, Input, Line};
use crate::line::{Lines, Outgoing};
use base::error::Fatal;

/// JetStream accepts at most 1,000 messages in a batch.
const BATCH_MESSAGES: usize = 500;
/// A batch of long texts ends here, so that a slow line can acknowledge it within the timeout.
const BATCH_BYTES: usize = 1 << 20;
/// Why a line with an id that another line has is refused.
pub const ANOTHER_ID: &str = "an id counts for its user in all rooms; give the line another one";

/// What the reader found, in the order of the files.
pub enum Found {
    /// Messages to append together.
    Batch(Vec<Outgoing>),
    /// A line that was refused, and why.
    Refused(String),
    /// A file cannot be read any further, and neither are those after it.
    Broken(Fatal),
    /// The end: every client-supplied id, and the names of the inputs.
    Ids(Ids, Vec<String>),
}

/// Starts reading on a thread of its own, so that the next batch is ready when this one is
/// acknowledged.
pub fn start(inputs: Vec<Input>, lines: Lines) -> mpsc::Receiver<Found> {
    let (found, receiver) = mpsc::channel(2);
    // Sending fails only after the import has failed; then the process is about to exit.
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
            // Each file counts its own repeated lines, so that it makes no difference which files
            // are imported together.
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
            match message.and_then(|message| self.check_id(message, input.line())) {
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

    /// Refuses the message if an earlier line has its id for another text or room.
    fn check_id(&mut self, message: Outgoing, line: u64) -> Result<Outgoing, String> {
        let Some(id) = message.own_id else {
            return Ok(message);
        };
        match self.ids.insert(&message.room, id, self.input, line) {
            Ok(()) => Ok(message),
            Err((input, line)) => {
                let other = self.names.get(input as usize).map_or("", String::as_str);
                Err(format!(
                    "its user has this id in {other}, line {line}, for another text or in another \
                     room: {ANOTHER_ID}"
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
