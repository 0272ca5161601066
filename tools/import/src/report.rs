//! The progress bar and the summary at the end.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::input::Input;

/// Refused lines that are shown; the rest is counted.
pub const REFUSED_SHOWN: u64 = 10;
const BAR_INTERVAL: Duration = Duration::from_millis(200);

/// What the import did so far.
pub struct Summary {
    begun: Instant,
    /// Lines read.
    pub read: u64,
    /// Messages that are new in the stream.
    pub published: u64,
    /// Messages that the stream had already.
    pub known: u64,
    /// Lines refused.
    pub refused: u64,
    /// Why ids could not be looked up in history.
    pub unchecked: Option<String>,
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
    /// Counts a message as refused that was counted as published or present before: it became
    /// a dead letter.
    pub fn refuse_published(&mut self) {
        self.refused += 1;
        if self.published > 0 {
            self.published -= 1;
        } else {
            self.known -= 1;
        }
    }

    /// Messages a second.
    fn rate(&self) -> f64 {
        (self.published + self.known) as f64 / self.begun.elapsed().as_secs_f64().max(0.001)
    }

    /// Prints the last lines of the import.
    pub fn print(&self) {
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
            "{read} read, {published} published, {known} already there, {refused} refused; {:.1} \
             s, {:.0} messages/s",
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
pub struct Progress {
    bar: ProgressBar,
    consumed: Arc<AtomicU64>,
}

impl Progress {
    /// A bar for `inputs`, of which `consumed` bytes are read.
    pub fn new(inputs: &[Input], consumed: Arc<AtomicU64>) -> Progress {
        let target = if std::io::stderr().is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        // Standard input has no known length: a spinner instead of a bar.
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

    /// Draws the bar.
    pub fn show(&self, summary: &Summary) {
        self.bar.set_position(self.consumed.load(Ordering::Relaxed));
        self.bar.set_message(format!(
            "{} messages, {:.0}/s",
            summary.published + summary.known,
            summary.rate()
        ));
    }

    /// Prints a line above the bar.
    pub fn print(&self, line: &str) {
        self.bar.suspend(|| eprintln!("import: {line}"));
    }

    /// Removes the bar.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
