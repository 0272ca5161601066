//! Many senders, one flush: what waits while a batch is under way goes out as the next one.
//!
//! A message alone is not held back for company: when nothing is under way, and nothing was just before, it goes at once, by itself,
//! without being handed from task to task.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use runtime::{Ctx, Error, Result};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tracing::{Instrument, Span};
use wire::{Code, Seq};

use crate::append::{Appended, Appender, Trouble};
use crate::known::{self, Known, Stored};
use crate::outgoing::Outgoing;

/// JetStream takes no more in one batch.
const MAX_BATCH: usize = 1_000;
/// What one batch may weigh, so that a few long texts do not delay many short ones.
const MAX_BATCH_BYTES: usize = 4 << 20;
/// After a batch the next message waits this long for each further one, as long as fewer than three quarters of that batch are
/// there: its senders, just answered, are about to send again.
const LINGER: Duration = Duration::from_millis(1);
/// Lookups under way at once; further ids are looked up together.
const LOOKUPS: usize = 2;
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// What became of a message.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    /// Where it stands.
    pub seq: Seq,
    /// The log had it before.
    pub duplicate: bool,
}

/// A message and who waits for it.
struct Waiting {
    message: Outgoing,
    until: Instant,
    span: Span,
    answer: oneshot::Sender<Result<Sent>>,
}

impl Waiting {
    fn answer(self, answer: Result<Sent>) {
        // Whoever gave up does not want it any more.
        let _ = self.answer.send(answer);
    }
}

/// Takes messages and sees to it that each is answered.
#[derive(Debug)]
pub struct Committer {
    line: Arc<Line>,
    given: mpsc::UnboundedSender<Waiting>,
    new: mpsc::UnboundedSender<Waiting>,
}

impl Committer {
    /// Runs until the last sender is gone.
    ///
    /// Fewer than `min_batch` go one by one, side by side.
    pub fn start(ctx: Ctx, min_batch: usize) -> Committer {
        let ((given, to_look_up), (new, to_append)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
        let (appender, known) = (Appender::new(ctx.nats().client().clone()), Known::new(ctx.clone()));
        let line = Arc::new(Line { appender, known, ctx, min_batch, under_way: AtomicUsize::new(0), company: AtomicUsize::new(0) });
        tokio::spawn(line.clone().look_up(to_look_up, new.clone()));
        tokio::spawn(line.clone().append_all(to_append));
        Committer { line, given, new }
    }

    /// Appends `message`; when `until` is over, with an error.
    ///
    /// # Errors
    /// 409, or 503.
    pub async fn commit(&self, message: Outgoing, until: Instant) -> Result<Sent> {
        if let Some(_alone) = self.line.alone() {
            // In a box: ten times as large as the rest, it would be moved along with every message, alone or not.
            return Box::pin(self.line.append_alone(&message, until)).await;
        }
        let (answer, answered) = oneshot::channel();
        // Never more than MAX_CONCURRENT_REQUESTS of them wait, in either queue.
        let queue = if message.given { &self.given } else { &self.new };
        let waiting = Waiting { message, until, span: Span::current(), answer };
        queue.send(waiting).map_err(|_| Error::internal("the task that appends is gone"))?;
        answered.await.map_err(|_| Error::internal("the task that appends ended badly"))?
    }
}

/// What waits, in order; one may be left over that did not fit.
struct Queue {
    waiting: mpsc::UnboundedReceiver<Waiting>,
    left: Option<Waiting>,
}

impl Queue {
    /// Everything that waits, as far as it fits into one batch; with company to be expected, what follows closely too. `None` when nobody
    /// can send any more.
    async fn gather(&mut self, company: usize) -> Option<Vec<Waiting>> {
        let first = match self.left.take() {
            Some(first) => first,
            None => self.waiting.recv().await?,
        };
        let mut bytes = first.message.weight();
        let mut batch = vec![first];
        while batch.len() < MAX_BATCH {
            let next = match self.waiting.try_recv() {
                Ok(next) => next,
                Err(_) if batch.len() >= company => break,
                Err(_) => match timeout(LINGER, self.waiting.recv()).await {
                    Ok(Some(next)) => next,
                    Ok(None) | Err(_) => break,
                },
            };
            bytes += next.message.weight();
            if bytes > MAX_BATCH_BYTES {
                self.left = Some(next);
                break;
            }
            batch.push(next);
        }
        Some(batch)
    }
}

/// What looks up and appends.
#[derive(Debug)]
struct Line {
    ctx: Ctx,
    appender: Appender,
    known: Known,
    min_batch: usize,
    /// Messages on their way into the log, or being looked up.
    under_way: AtomicUsize,
    /// How many more are to be expected: the senders of the last batch, just answered.
    company: AtomicUsize,
}

/// Messages that are under way, as long as this lives.
struct UnderWay<'a>(&'a Line, usize);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(self.1, Ordering::Relaxed);
    }
}

impl Line {
    fn under_way(&self, messages: usize) -> UnderWay<'_> {
        self.under_way.fetch_add(messages, Ordering::Relaxed);
        UnderWay(self, messages)
    }

    /// A place for one message when there is no other, and none to be expected.
    fn alone(&self) -> Option<UnderWay<'_>> {
        let free = self.company.load(Ordering::Relaxed) == 0
            && self.under_way.compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        free.then_some(UnderWay(self, 1))
    }

    async fn append_alone(&self, message: &Outgoing, until: Instant) -> Result<Sent> {
        if message.given {
            let key = message.key();
            match self.known.find(std::slice::from_ref(&key)).await {
                Ok(found) => {
                    if let Some(stored) = found.get(&key) {
                        return self.settle(message, stored.clone()).await;
                    }
                }
                Err(error) => {
                    return match self.appender.known(message, until).await {
                        Ok(Some(seq)) => self.settle(message, Stored { seq, content: None }).await,
                        Ok(None) => Err(error),
                        Err(trouble) => Err(trouble.into_error()),
                    };
                }
            }
        }
        self.one(message, until, || true).await
    }

    /// Hands on what is new of the ids that senders gave.
    async fn look_up(self: Arc<Self>, waiting: mpsc::UnboundedReceiver<Waiting>, new: mpsc::UnboundedSender<Waiting>) {
        let lookups = Arc::new(Semaphore::new(LOOKUPS));
        let mut queue = Queue { waiting, left: None };
        while let Ok(place) = lookups.clone().acquire_owned().await
            && let Some(batch) = queue.gather(0).await
        {
            let (line, new) = (self.clone(), new.clone());
            tokio::spawn(async move {
                let _under_way = line.under_way(batch.len());
                // It shows in the trace of the first.
                let span = batch.first().map_or_else(Span::none, |first| first.span.clone());
                for waiting in line.settle_known(in_time(batch)).instrument(span).await {
                    // Fails only when appending has ended; the sender hears of it.
                    let _ = new.send(waiting);
                }
                drop(place);
            });
        }
    }

    /// One batch after the other. Two at once would be smaller ones, and the server takes them one by one all the same.
    async fn append_all(self: Arc<Self>, waiting: mpsc::UnboundedReceiver<Waiting>) {
        let mut queue = Queue { waiting, left: None };
        let mut company = 0;
        while let Some(batch) = queue.gather(company).await {
            let _under_way = self.under_way(batch.len());
            company = if batch.len() < self.min_batch { 0 } else { batch.len() * 3 / 4 };
            self.company.store(company, Ordering::Relaxed);
            let line = self.clone();
            // A task of its own, so that a panic costs this batch only: its senders hear of it.
            let _ = tokio::spawn(async move { line.append_distinct(in_time(batch)).await }).await;
        }
    }

    /// Of those with the same sender and id the first goes ahead, and the others find it there.
    async fn append_distinct(&self, batch: Vec<Waiting>) {
        let mut seen = HashSet::new();
        let (first, again): (Vec<_>, Vec<_>) = batch.into_iter().partition(|waiting| seen.insert(waiting.message.key()));
        self.append(first).await;
        futures::future::join_all(again.into_iter().map(|waiting| self.one_waiting(waiting))).await;
    }

    /// Answers those whose id was used before; returns the others.
    async fn settle_known(&self, batch: Vec<Waiting>) -> Vec<Waiting> {
        let keys: Vec<known::Key> = batch.iter().map(|waiting| waiting.message.key()).collect();
        let found = match self.known.find(&keys).await {
            Ok(found) => found,
            Err(error) => {
                self.without_index(batch, &error).await;
                return Vec::new();
            }
        };
        let (mut known, mut new) = (Vec::new(), Vec::new());
        for waiting in batch {
            match found.get(&waiting.message.key()) {
                Some(stored) => known.push(self.settle_waiting(waiting, stored.clone())),
                None => new.push(waiting),
            }
        }
        futures::future::join_all(known).await;
        new
    }

    /// While nobody can tell whether an id is new, JetStream is asked: what it remembers is a resend for sure. What it
    /// does not may be an older one, and is refused rather than appended twice.
    async fn without_index(&self, batch: Vec<Waiting>, error: &Error) {
        for waiting in self.settle_remembered(batch).await {
            waiting.answer(Err(error.clone()));
        }
    }

    /// Answers those whose id JetStream remembers; returns the others.
    async fn settle_remembered(&self, batch: Vec<Waiting>) -> Vec<Waiting> {
        let ask = async |waiting: Waiting| match self.appender.known(&waiting.message, waiting.until).await {
            Ok(Some(seq)) => {
                self.settle_waiting(waiting, Stored { seq, content: None }).await;
                None
            }
            Ok(None) => Some(waiting),
            Err(trouble) => {
                waiting.answer(Err(trouble.into_error()));
                None
            }
        };
        futures::future::join_all(batch.into_iter().map(ask)).await.into_iter().flatten().collect()
    }

    /// Appends what is new, with one flush if it is worth it.
    async fn append(&self, batch: Vec<Waiting>) {
        let batch = match self.try_batch(batch).await {
            // One of them is known: not worth telling apart by anything but asking, which costs no flush.
            Err((batch, Trouble::Known)) => match self.try_batch(self.settle_remembered(batch).await).await {
                Err((batch, _)) => batch,
                Ok(()) => return,
            },
            Err((batch, _)) => batch,
            Ok(()) => return,
        };
        // One by one each learns what is wrong with it alone. What the batch stored after all is answered as known.
        futures::future::join_all(batch.into_iter().map(|waiting| self.one_waiting(waiting))).await;
    }

    /// Appends all or nothing; gives them back when that was not possible.
    async fn try_batch(&self, batch: Vec<Waiting>) -> Result<(), (Vec<Waiting>, Trouble)> {
        if batch.len() < self.min_batch {
            return Err((batch, Trouble::Passing(String::new())));
        }
        let until = batch.iter().map(|waiting| waiting.until).min().unwrap_or_else(Instant::now);
        let messages: Vec<&Outgoing> = batch.iter().map(|waiting| &waiting.message).collect();
        match self.appender.batch(&messages, until).await {
            Ok(first) => {
                let mut seq = first;
                for waiting in batch {
                    waiting.answer(Ok(Sent { seq, duplicate: false }));
                    seq = seq.next();
                }
                Ok(())
            }
            Err(trouble) => {
                tracing::debug!(?trouble, messages = batch.len(), "a batch was not taken");
                Err((batch, trouble))
            }
        }
    }

    /// Appends one that waits.
    async fn one_waiting(&self, waiting: Waiting) {
        let sent = self.one(&waiting.message, waiting.until, || !waiting.answer.is_closed()).await;
        waiting.answer(sent);
    }

    /// Appends one message, as often as its time allows and somebody is `wanted` to hear of it.
    async fn one(&self, message: &Outgoing, until: Instant, wanted: impl Fn() -> bool) -> Result<Sent> {
        loop {
            match self.appender.one(message, until).await {
                Ok(Appended { seq, known: false }) => return Ok(Sent { seq, duplicate: false }),
                Ok(Appended { seq, known: true }) => return self.settle(message, Stored { seq, content: None }).await,
                Err(Trouble::Passing(_)) if Instant::now() + RETRY_PAUSE < until && wanted() => {
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                Err(trouble) => return Err(trouble.into_error()),
            }
        }
    }

    /// Answers one that waits and is there already.
    async fn settle_waiting(&self, waiting: Waiting, stored: Stored) {
        let sent = self.settle(&waiting.message, stored).await;
        waiting.answer(sent);
    }

    /// What the sender of a message that is there already is told.
    async fn settle(&self, message: &Outgoing, stored: Stored) -> Result<Sent> {
        if !message.given {
            // Nobody else has an id that was made here: an earlier attempt of ours was taken.
            return Ok(Sent { seq: stored.seq, duplicate: false });
        }
        if self.is_same(message, &stored).await? {
            return Ok(Sent { seq: stored.seq, duplicate: true });
        }
        let reason = "this id belongs to another message of yours, with another text or in another place; take a new one";
        Err(Error::new(Code::Conflict, reason))
    }

    /// Whether the stored message is this one. One that stands nowhere any more was erased, and is taken for the same:
    /// nobody can compare, and it must not come back.
    async fn is_same(&self, message: &Outgoing, stored: &Stored) -> Result<bool> {
        if let Some((room, text)) = &stored.content {
            return Ok(message.says(room, text));
        }
        if let Some(raw) = self.ctx.log().walk(stored.seq, stored.seq).await?.first() {
            let incoming = known::parse(&raw.message, self.ctx.settings().limits());
            return Ok(incoming.is_some_and(|incoming| message.is(&incoming)));
        }
        let key = message.key();
        let indexed = self.known.index(std::slice::from_ref(&key)).await?;
        let content = indexed.get(&key).and_then(|stored| stored.content.as_ref());
        Ok(content.is_none_or(|(room, text)| message.says(room, text)))
    }
}

/// Those whose sender still waits; the time of the others is answered as over.
fn in_time(batch: Vec<Waiting>) -> Vec<Waiting> {
    let now = Instant::now();
    let (live, late): (Vec<_>, Vec<_>) =
        batch.into_iter().filter(|waiting| !waiting.answer.is_closed()).partition(|waiting| waiting.until > now);
    for waiting in late {
        waiting.answer(Err(Error::new(Code::Unavailable, "there was no time left to append this; it was not stored, try again")));
    }
    live
}
