//! Many senders, one flush: what waits while a batch is under way goes out as the next one.
//!
//! A message for which nobody else has to be waited goes at once, by itself, without being handed from task to task.
//! Messages of one sender to one room stay in order on every path (`sequencer.rs`).

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tracing::{Instrument, Span};

use crate::append::{Appended, Appender, Trouble};
use crate::known::{self, Known, Stored};
use crate::outgoing::Outgoing;
use crate::sequencer::{Key, Sequencer, Slot};
use base::error::{Code, Error, Result};
use base::seq::Seq;
use service::ctx::Ctx;
use timeline::chat::Chat;
use timeline::message::parse;

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
/// A batch that takes longer goes on by itself, and the next one begins: what is stuck delays only the later messages of
/// the same sender to the same room.
const PATIENCE: Duration = Duration::from_millis(250);
/// A message that has to wait for the one before it takes about as long as so many that go side by side.
const SEQUENTIAL_COST: usize = 3;

/// What became of a message.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    /// Where it stands.
    pub seq: Seq,
    /// The log had it before.
    pub duplicate: bool,
}

/// A message and who waits for it.
#[derive(Debug)]
pub struct Waiting {
    message: Outgoing,
    until: Instant,
    span: Span,
    answer: oneshot::Sender<Result<Sent>>,
    /// The last field: later messages pass when the answer is given.
    pub slot: Slot,
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
    /// Held so that the task that appends ends with us.
    _ready: mpsc::UnboundedSender<Key>,
}

impl Committer {
    /// Runs until the last sender is gone.
    ///
    /// Fewer than `min_batch` go one by one, side by side.
    pub fn start(ctx: Ctx<Chat>, min_batch: usize) -> Committer {
        let ((given, to_look_up), (ready, to_append)) =
            (mpsc::unbounded_channel(), mpsc::unbounded_channel());
        let (appender, known) = (
            Appender::new(ctx.nats().client().clone()),
            Known::new(ctx.clone()),
        );
        let line = Arc::new(Line {
            appender,
            known,
            ctx,
            min_batch,
            sequencer: Sequencer::new(&ready),
        });
        line.ctx
            .spawn_essential("looks ids up", line.clone().look_up(to_look_up));
        line.ctx
            .spawn_essential("appends messages", line.clone().append_all(to_append));
        Committer {
            line,
            given,
            _ready: ready,
        }
    }

    /// Appends `message`; when `until` is over, with an error.
    ///
    /// Its place among the messages of the same sender and room is the order in which this is polled first.
    ///
    /// # Errors
    /// 409, or 503.
    pub async fn commit(&self, message: Outgoing, until: Instant) -> Result<Sent> {
        let key = message.queue();
        let sequencer = &self.line.sequencer;
        if let Some(_slot) = sequencer.enter_alone(&key) {
            // In a box: ten times as large as the rest, it would be moved along with every message, alone or not.
            return Box::pin(self.line.append_alone(message, until)).await;
        }
        let slot = sequencer.enter(key);
        let (answer, answered) = oneshot::channel();
        let given = message.given;
        let waiting = Waiting {
            message,
            until,
            span: Span::current(),
            answer,
            slot,
        };
        // Never more than MAX_CONCURRENT_REQUESTS of them wait, here or there.
        if given {
            self.given
                .send(waiting)
                .map_err(|_| Error::internal("the task that looks ids up is gone"))?;
        } else {
            sequencer.ready(waiting);
        }
        answered
            .await
            .map_err(|_| Error::internal("the task that appends ended badly"))?
    }

    /// Whether a message that came now would go at once.
    #[cfg(test)]
    pub fn is_idle(&self) -> bool {
        self.line
            .sequencer
            .enter_alone(&"nobody nowhere".into())
            .is_some()
    }
}

/// Queues of which the first message is ready, in order; one may be left over that did not fit.
struct Ready {
    queues: mpsc::UnboundedReceiver<Key>,
    left: Option<Key>,
}

impl Ready {
    /// Everything that is ready, as far as it fits into one batch; when more messages are to be expected, what follows
    /// closely too. `None` when nobody can send any more.
    async fn gather(&mut self, sequencer: &Sequencer, expected: usize) -> Option<Vec<Waiting>> {
        let mut next = match self.left.take() {
            Some(left) => left,
            None => self.queues.recv().await?,
        };
        let (mut batch, mut bytes): (Vec<Waiting>, usize) = (Vec::new(), 0);
        loop {
            let (before, mut full) = (batch.len(), false);
            let mut count = before;
            batch.extend(sequencer.take(&next, |waiting| {
                let weight = waiting.message.weight();
                full = count == MAX_BATCH || count > 0 && bytes + weight > MAX_BATCH_BYTES;
                if !full {
                    count += 1;
                    bytes += weight;
                }
                !full
            }));
            if full {
                // Whatever else is in a queue of which something was taken comes when that is answered.
                if batch.len() == before {
                    self.left = Some(next);
                }
                return Some(batch);
            }
            next = match self.queues.try_recv() {
                Ok(next) => next,
                Err(_) if batch.is_empty() => self.queues.recv().await?,
                Err(_) if batch.len() >= expected => return Some(batch),
                Err(_) => match timeout(LINGER, self.queues.recv()).await {
                    Ok(Some(next)) => next,
                    Ok(None) | Err(_) => return Some(batch),
                },
            };
        }
    }
}

/// Everything that waits for its id to be looked up, as far as it goes into one look-up. `None` when nobody can send any more.
async fn gather_look_ups(waiting: &mut mpsc::UnboundedReceiver<Waiting>) -> Option<Vec<Waiting>> {
    let mut batch = Vec::new();
    (waiting.recv_many(&mut batch, MAX_BATCH).await > 0).then_some(batch)
}

/// What looks up and appends.
#[derive(Debug)]
struct Line {
    ctx: Ctx<Chat>,
    appender: Appender,
    known: Known,
    min_batch: usize,
    sequencer: Arc<Sequencer>,
}

impl Line {
    async fn append_alone(&self, mut message: Outgoing, until: Instant) -> Result<Sent> {
        if message.given {
            let key = message.key();
            match self.known.find(std::slice::from_ref(&key)).await {
                Ok(found) => {
                    if let Some(stored) = found.ids.get(&key) {
                        return self.settle(&message, stored.clone()).await;
                    }
                    message.named_by(&found.secret);
                }
                Err(error) => {
                    message.named_by(&self.known.secret().ok_or_else(|| error.clone())?);
                    return match self.appender.known(&message, until).await {
                        Ok(Some(seq)) => self.settle(&message, Stored { seq, content: None }).await,
                        Ok(None) => Err(error),
                        Err(trouble) => Err(trouble.into_error()),
                    };
                }
            }
        }
        self.one(&message, until, || true).await
    }

    /// Passes on what is new of the ids that senders gave. Look-ups may end in any order: a message that is ready waits for
    /// those before it.
    async fn look_up(self: Arc<Self>, mut waiting: mpsc::UnboundedReceiver<Waiting>) {
        let lookups = Arc::new(Semaphore::new(LOOKUPS));
        while let Ok(permit) = lookups.clone().acquire_owned().await
            && let Some(batch) = gather_look_ups(&mut waiting).await
        {
            let line = self.clone();
            tokio::spawn(async move {
                // It shows in the trace of the first.
                let span = batch
                    .first()
                    .map_or_else(Span::none, |first| first.span.clone());
                let known = line.pass_on_new(in_time(batch)).instrument(span).await;
                drop(permit);
                // Reading what stands there may take long; nobody else waits for it.
                futures::future::join_all(
                    known
                        .into_iter()
                        .map(|(waiting, stored)| line.settle_waiting(waiting, stored)),
                )
                .await;
            });
        }
    }

    /// One batch after the other. Two at once would be smaller ones, and the server takes them one by one all the same.
    async fn append_all(self: Arc<Self>, queues: mpsc::UnboundedReceiver<Key>) {
        let mut ready = Ready { queues, left: None };
        let mut expected = 0;
        while let Some(batch) = ready.gather(&self.sequencer, expected).await {
            expected = if batch.len() < self.min_batch {
                0
            } else {
                batch.len() * 3 / 4
            };
            self.sequencer.expect(expected);
            // A task of its own, so that a panic costs this batch only: its senders hear of it.
            let appending = tokio::spawn(self.clone().append(in_time(batch)));
            let _ = timeout(PATIENCE, appending).await;
        }
    }

    /// Appends a batch, with one flush if it is worth it.
    async fn append(self: Arc<Self>, batch: Vec<Waiting>) {
        let (mut batch, repeated) = split_repeated(batch);
        if self.is_worth_a_batch(&batch) {
            batch = self.append_together(batch).await;
        }
        // One by one each learns what is wrong with it alone. What the batch stored after all is answered as known.
        batch.extend(repeated);
        let runs = by_queue(batch)
            .into_iter()
            .map(|run| self.clone().append_run(run));
        futures::future::join_all(runs).await;
    }

    /// Whether these take longer one by one, those of each queue one after the other, than as a batch.
    fn is_worth_a_batch(&self, batch: &[Waiting]) -> bool {
        let mut in_queue: HashMap<&Key, usize> = HashMap::new();
        let longest = batch.iter().map(|waiting| {
            let count = in_queue.entry(waiting.slot.key()).or_default();
            *count += 1;
            *count
        });
        batch.len() >= self.min_batch
            || longest
                .max()
                .is_some_and(|run| run > 1 && run * SEQUENTIAL_COST >= self.min_batch)
    }

    /// Appends all or nothing; returns those that are not answered.
    async fn append_together(&self, batch: Vec<Waiting>) -> Vec<Waiting> {
        match self.try_batch(batch).await {
            // One of them is known: not worth telling apart by anything but asking, which costs no flush.
            Err((batch, Trouble::Known)) => {
                let unknown = self.settle_remembered(batch).await;
                if !self.is_worth_a_batch(&unknown) {
                    return unknown;
                }
                self.try_batch(unknown)
                    .await
                    .map_or_else(|(batch, _)| batch, |()| Vec::new())
            }
            Err((batch, _)) => batch,
            Ok(()) => Vec::new(),
        }
    }

    /// Appends messages of one queue, each when the one before it has its answer. From the first one that has to be tried again,
    /// they go on by themselves, and whoever waits for this does not wait for them.
    async fn append_run(self: Arc<Self>, mut run: VecDeque<Waiting>) {
        while let Some(waiting) = run.pop_front() {
            match self
                .try_one(&waiting.message, waiting.until, || {
                    !waiting.answer.is_closed()
                })
                .await
            {
                Some(sent) => waiting.answer(sent),
                None => {
                    run.push_front(waiting);
                    tokio::spawn(self.retry_run(run));
                    return;
                }
            }
        }
    }

    async fn retry_run(self: Arc<Self>, run: VecDeque<Waiting>) {
        tokio::time::sleep(RETRY_PAUSE).await;
        for waiting in run {
            let sent = self
                .one(&waiting.message, waiting.until, || {
                    !waiting.answer.is_closed()
                })
                .await;
            waiting.answer(sent);
        }
    }

    /// Makes ready what is new; returns those whose id was used before.
    async fn pass_on_new(&self, batch: Vec<Waiting>) -> Vec<(Waiting, Stored)> {
        let keys: Vec<known::Key> = batch.iter().map(|waiting| waiting.message.key()).collect();
        let found = match self.known.find(&keys).await {
            Ok(found) => found,
            Err(error) => {
                self.without_index(batch, &error).await;
                return Vec::new();
            }
        };
        let mut known = Vec::new();
        for mut waiting in batch {
            match found.ids.get(&waiting.message.key()) {
                Some(stored) => known.push((waiting, stored.clone())),
                None => {
                    waiting.message.named_by(&found.secret);
                    self.sequencer.ready(waiting);
                }
            }
        }
        known
    }

    /// While nobody can tell whether an id is new, JetStream is asked: what it remembers is a resend for sure. What it
    /// does not may be an older one, and is refused rather than appended twice.
    async fn without_index(&self, mut batch: Vec<Waiting>, error: &Error) {
        if let Some(secret) = self.known.secret() {
            batch
                .iter_mut()
                .for_each(|waiting| waiting.message.named_by(&secret));
            batch = self.settle_remembered(batch).await;
        }
        for waiting in batch {
            waiting.answer(Err(error.clone()));
        }
    }

    /// Answers those whose id JetStream remembers; returns the others.
    async fn settle_remembered(&self, batch: Vec<Waiting>) -> Vec<Waiting> {
        let ask = async |waiting: Waiting| match self
            .appender
            .known(&waiting.message, waiting.until)
            .await
        {
            Ok(Some(seq)) => {
                self.settle_waiting(waiting, Stored { seq, content: None })
                    .await;
                None
            }
            Ok(None) => Some(waiting),
            Err(trouble) => {
                waiting.answer(Err(trouble.into_error()));
                None
            }
        };
        futures::future::join_all(batch.into_iter().map(ask))
            .await
            .into_iter()
            .flatten()
            .collect()
    }

    /// One attempt to append all or nothing; returns them when that was not possible.
    async fn try_batch(&self, batch: Vec<Waiting>) -> Result<(), (Vec<Waiting>, Trouble)> {
        // Of the one that has longest: one whose time is nearly over must not end the attempt for all.
        let until = batch
            .iter()
            .map(|waiting| waiting.until)
            .max()
            .unwrap_or_else(Instant::now);
        let messages: Vec<&Outgoing> = batch.iter().map(|waiting| &waiting.message).collect();
        match self.appender.batch(&messages, until).await {
            Ok(first) => {
                let mut seq = first;
                for waiting in batch {
                    waiting.answer(Ok(Sent {
                        seq,
                        duplicate: false,
                    }));
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

    /// Appends one message, as often as its time allows and somebody is `wanted` to hear of it.
    async fn one(
        &self,
        message: &Outgoing,
        until: Instant,
        wanted: impl Fn() -> bool,
    ) -> Result<Sent> {
        loop {
            if let Some(sent) = self.try_one(message, until, &wanted).await {
                return sent;
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    /// One attempt to append one message; `None` when another one is worth its while.
    async fn try_one(
        &self,
        message: &Outgoing,
        until: Instant,
        wanted: impl Fn() -> bool,
    ) -> Option<Result<Sent>> {
        match self.appender.one(message, until).await {
            Ok(Appended { seq, known: false }) => Some(Ok(Sent {
                seq,
                duplicate: false,
            })),
            Ok(Appended { seq, known: true }) => {
                Some(self.settle(message, Stored { seq, content: None }).await)
            }
            Err(Trouble::Passing(_)) if Instant::now() + RETRY_PAUSE < until && wanted() => None,
            Err(trouble) => Some(Err(trouble.into_error())),
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
            return Ok(Sent {
                seq: stored.seq,
                duplicate: false,
            });
        }
        if self.is_same(message, &stored).await? {
            return Ok(Sent {
                seq: stored.seq,
                duplicate: true,
            });
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
        if let Some(raw) = self.ctx.stream().at(stored.seq).await? {
            let incoming = parse(&raw.message, self.ctx.limits()).ok();
            return Ok(incoming.is_some_and(|incoming| message.is(&incoming)));
        }
        let key = message.key();
        let indexed = self.known.index(std::slice::from_ref(&key)).await?;
        let content = indexed.get(&key).and_then(|stored| stored.content.as_ref());
        Ok(content.is_none_or(|(room, text)| message.says(room, text)))
    }
}

/// Splits off messages that share sender and id with an earlier one, and whatever follows them in their queue: a batch that
/// holds an id twice is refused.
fn split_repeated(batch: Vec<Waiting>) -> (Vec<Waiting>, Vec<Waiting>) {
    let (mut ids, mut behind) = (HashSet::new(), HashSet::new());
    batch.into_iter().partition(|waiting| {
        let queue = waiting.slot.key();
        let first = !behind.contains(queue) && ids.insert(waiting.message.key());
        if !first {
            behind.insert(queue.clone());
        }
        first
    })
}

/// The messages of each queue, in their order.
fn by_queue(batch: Vec<Waiting>) -> Vec<VecDeque<Waiting>> {
    let (mut index, mut runs) = (HashMap::new(), Vec::<VecDeque<Waiting>>::new());
    for waiting in batch {
        let place = *index
            .entry(waiting.slot.key().clone())
            .or_insert(runs.len());
        match runs.get_mut(place) {
            Some(run) => run.push_back(waiting),
            None => runs.push(VecDeque::from([waiting])),
        }
    }
    runs
}

/// Those whose sender still waits; the time of the others is answered as over.
fn in_time(batch: Vec<Waiting>) -> Vec<Waiting> {
    let now = Instant::now();
    let (live, late): (Vec<_>, Vec<_>) = batch
        .into_iter()
        .filter(|waiting| !waiting.answer.is_closed())
        .partition(|waiting| waiting.until > now);
    for waiting in late {
        waiting.answer(Err(Error::new(
            Code::Unavailable,
            "there was no time left to append this; it was not stored, try again",
        )));
    }
    live
}

/// A message of no importance in this slot, for tests.
#[cfg(test)]
pub fn waiting(slot: Slot) -> Waiting {
    let draft = protocol::send::Draft {
        text: "x".to_owned(),
        id: None,
        timestamp: None,
    };
    let user =
        protocol::name::User::parse("ann").unwrap_or_else(|refusal| unreachable!("{refusal:?}"));
    let message = Outgoing::new(user, "subject".to_owned(), "room".to_owned(), draft, 0);
    Waiting {
        message,
        until: Instant::now(),
        span: Span::none(),
        answer: oneshot::channel().0,
        slot,
    }
}
