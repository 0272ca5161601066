//! Consuming the log: batches from the durable consumer all copies share.
//!
//! One connection of its own for the deliveries, because a stored message with malformed headers ends the
//! connection of whoever receives it (see [`crate::stream::Log`]). Then what was on its way to us is read from the stream
//! instead, once nothing more can be sent to the lost connection; the malformed ones are handed on marked as
//! such and removed from the stream. What other replicas have under way is theirs.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_nats::Subject;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep_until, timeout};

use crate::pull::{IN_PROGRESS, Lost, PullError, Pulls, SILENCE};
use crate::stream::{ConsumerInfo, Limit, StreamError, StreamMessage, StreamReader};
use base::error::Fatal;
use base::seq::Seq;
use nats::connection::{connect, jittered};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// Batches stored side by side: while the database works on one, the other is parsed or waits for its commit.
const LANES: usize = 2;

/// How long a batch may gather while another is being stored.
const LINGER: Duration = Duration::from_millis(10);

/// One step of a rescue.
const RESCUE_BYTES: usize = 16 << 20;
const RESCUE_TIME: Duration = Duration::from_secs(30);

/// The consumer's ack_wait until it has told its own.
const ACK_WAIT: Duration = Duration::from_secs(30);
/// Of ack_wait: after this part of it the server hears that long work goes on. A report that comes late still comes in time.
const REPORT_AFTER: u32 = 4;

/// One message of the log, as delivered.
#[derive(Debug)]
pub struct Delivery {
    /// The message.
    pub message: StreamMessage,
    /// How often it was delivered, this time included; 0 when it was fetched, not delivered.
    pub attempt: u64,
    /// The header block no client can read, or the empty block under a subject that is not UTF-8.
    pub malformed: Option<Vec<u8>>,
    pub(crate) ack: Option<Subject>,
}

/// A copy's part in consuming the log.
#[derive(Clone)]
pub struct Worker(Arc<Shared>);

struct Shared {
    log: Arc<StreamReader>,
    max_batch: usize,
    stuck_after: Duration,
    progress: AtomicU64,
    /// Counts how often long work told that it goes on.
    going_on: AtomicU64,
    /// Counts batches on their way to be stored.
    handed_on: AtomicU64,
    ack_wait_ms: AtomicU64,
    waiting: AtomicBool,
    lanes: Arc<Semaphore>,
}

/// Deliveries on their way to be stored, and their place.
struct Batch {
    deliveries: Arc<[Delivery]>,
    lane: OwnedSemaphorePermit,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("name", &self.0.log.client_name())
            .finish_non_exhaustive()
    }
}

/// How the connection before ended.
struct Before {
    trouble: PullError,
    lost: Lost,
}

/// Work on a batch that may take longer than the server waits for an acknowledgement.
#[derive(Debug)]
pub struct AckExtension<'a> {
    worker: &'a Worker,
    deliveries: &'a [Delivery],
    told: Instant,
}

impl AckExtension<'_> {
    /// Waits for a part of the work, which must end by itself: meanwhile nothing of the batch, nor of what waits for its turn behind it, is
    /// delivered again, and the watchdog does not take us for stuck. Between the parts nothing is said; whoever stands still there
    /// for ack_wait loses the batch to another copy.
    pub async fn part<T>(&mut self, part: impl Future<Output = T>) -> T {
        let mut part = pin!(part);
        loop {
            tokio::select! {
                biased;
                done = &mut part => return done,
                () = sleep_until(self.told + self.worker.report_after()) => self.tell().await,
            }
        }
    }

    async fn tell(&mut self) {
        self.told = Instant::now();
        self.worker.0.going_on.fetch_add(1, Ordering::Relaxed);
        for ack in self
            .deliveries
            .iter()
            .filter_map(|delivery| delivery.ack.clone())
        {
            if let Err(error) = self
                .worker
                .0
                .log
                .control()
                .client()
                .publish(ack, IN_PROGRESS.into())
                .await
            {
                tracing::debug!(%error, "the server does not hear that work goes on; the messages may come again, and do no harm");
            }
        }
    }
}

impl Worker {
    /// A part in consuming the consumer of `log`: at most `max_batch` messages at once, and an error when
    /// nothing moves for `stuck_after`.
    pub fn new(log: Arc<StreamReader>, max_batch: usize, stuck_after: Duration) -> Worker {
        Worker(Arc::new(Shared {
            log,
            max_batch,
            stuck_after,
            progress: AtomicU64::new(0),
            going_on: AtomicU64::new(0),
            handed_on: AtomicU64::new(0),
            ack_wait_ms: AtomicU64::new(ACK_WAIT.as_millis() as u64),
            waiting: AtomicBool::new(false),
            lanes: Arc::new(Semaphore::new(LANES)),
        }))
    }

    /// Tells the watchdog that nothing moves because the database is away, not because we are stuck.
    pub fn waiting(&self, waiting: bool) {
        self.0.waiting.store(waiting, Ordering::Relaxed);
    }

    /// Work on `deliveries` that begins now.
    pub fn extend_acks<'a>(&'a self, deliveries: &'a [Delivery]) -> AckExtension<'a> {
        AckExtension {
            worker: self,
            deliveries,
            told: Instant::now(),
        }
    }

    fn report_after(&self) -> Duration {
        Duration::from_millis(self.0.ack_wait_ms.load(Ordering::Relaxed)) / REPORT_AFTER
    }

    fn note_ack_wait(&self, info: &ConsumerInfo) {
        let ack_wait = Duration::from_nanos(info.config.ack_wait);
        if !ack_wait.is_zero() {
            self.0.ack_wait_ms.store(
                u64::try_from(ack_wait.as_millis()).unwrap_or(u64::MAX),
                Ordering::Relaxed,
            );
        }
    }

    /// Messages acknowledged since the start.
    pub fn progress(&self) -> u64 {
        self.0.progress.load(Ordering::Relaxed)
    }

    /// Pulls batches and hands each to `store` until told to stop; acknowledges a batch after `store`
    /// returned true. Two batches are stored side by side, and the next one is pulled meanwhile.
    ///
    /// # Errors
    /// The consumer cannot be made to move: messages are pending, and nothing was acknowledged for a minute.
    pub async fn run<S, F>(&self, store: S) -> Result<(), Fatal>
    where
        S: Fn(Arc<[Delivery]>) -> F,
        F: Future<Output = bool>,
    {
        let (sender, mut batches) = mpsc::channel::<Batch>(LANES);
        let puller = tokio::spawn(self.clone().pull(sender));
        let consume = async {
            let mut lanes = FuturesUnordered::new();
            loop {
                tokio::select! {
                    batch = batches.recv() => match batch {
                        Some(batch) => lanes.push(self.handle(&store, batch)),
                        None => break,
                    },
                    Some(()) = lanes.next() => {}
                }
            }
            while lanes.next().await.is_some() {}
        };
        let mut outcome = tokio::select! {
            () = consume => Ok(()),
            stuck = self.watch() => Err(stuck),
        };
        puller.abort();
        if let Err(error) = puller.await
            && error.is_panic()
        {
            outcome = Err(Fatal::new(format!(
                "the task that pulls messages is gone: {error}; leaving so that a fresh start can"
            )));
        }
        // An acknowledgement that is only queued is no acknowledgement.
        let flushed = timeout(SILENCE, self.0.log.control().client().flush()).await;
        if !matches!(flushed, Ok(Ok(()))) {
            tracing::warn!(
                "the last acknowledgements may not have arrived; those messages come again, and do no harm"
            );
        }
        outcome
    }

    async fn handle<F: Future<Output = bool>>(
        &self,
        store: &impl Fn(Arc<[Delivery]>) -> F,
        batch: Batch,
    ) {
        if store(batch.deliveries.clone()).await {
            self.settle(&batch.deliveries).await;
        }
        drop(batch.lane);
    }

    async fn settle(&self, batch: &[Delivery]) {
        let mut settled = 0;
        for delivery in batch {
            if let Some(ack) = &delivery.ack {
                match self
                    .0
                    .log
                    .control()
                    .client()
                    .publish(ack.clone(), "+ACK".into())
                    .await
                {
                    Ok(()) => settled += 1,
                    Err(error) => {
                        tracing::warn!(%error, "an acknowledgement could not be sent; the message comes again")
                    }
                }
            }
            if delivery.malformed.is_some()
                && let Err(error) = self.0.log.delete(delivery.message.seq).await
            {
                tracing::warn!(seq = %delivery.message.seq, %error, "a malformed message could not be removed from the stream yet");
            }
        }
        self.0.progress.fetch_add(settled, Ordering::Relaxed);
    }

    async fn pull(self, batches: mpsc::Sender<Batch>) {
        let mut pause = FIRST_PAUSE;
        let mut told = false;
        let mut before = None;
        while !self.0.log.stop().is_cancelled() {
            let begun = Instant::now();
            let handed_on = self.0.handed_on.load(Ordering::Relaxed);
            let ended = match self.pull_until_trouble(&batches, before).await {
                Ok(()) => return,
                Err(ended) => ended,
            };
            let trouble = ended.trouble;
            before = Some(ended);
            if begun.elapsed() > LONGEST_PAUSE {
                told = false;
            }
            // Messages that break one connection after another do not hold up those between them.
            if self.0.handed_on.load(Ordering::Relaxed) != handed_on
                || begun.elapsed() > LONGEST_PAUSE
            {
                pause = FIRST_PAUSE;
            }
            if !told {
                tracing::warn!(%trouble, "pulling was interrupted");
                told = true;
            }
            tokio::select! {
                () = tokio::time::sleep(jittered(pause)) => {}
                () = self.0.log.stop().cancelled() => return,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Waits for a place to store a batch in; `None` never happens while the worker lives.
    async fn lane(&self) -> Option<OwnedSemaphorePermit> {
        self.0.lanes.clone().acquire_owned().await.ok()
    }

    /// Waits for a place; `None` when told to stop. While long work keeps all of them, the server hears that what it sent
    /// already is not forgotten.
    async fn lane_for(&self, pulls: &mut Pulls) -> Result<Option<OwnedSemaphorePermit>, PullError> {
        let mut before = self.0.going_on.load(Ordering::Relaxed);
        loop {
            tokio::select! {
                lane = self.lane() => return Ok(lane),
                () = self.0.log.stop().cancelled() => return Ok(None),
                () = tokio::time::sleep(self.report_after()) => {}
            }
            let now = self.0.going_on.load(Ordering::Relaxed);
            if now != before {
                pulls.hold().await?;
            }
            before = now;
        }
    }

    async fn pull_until_trouble(
        &self,
        batches: &mpsc::Sender<Batch>,
        before: Option<Before>,
    ) -> Result<(), Before> {
        let connection = connect(
            self.0.log.settings(),
            &format!("{} (deliveries)", self.0.log.client_name()),
            self.0.log.stop(),
        )
        .await;
        let Ok(connection) = connection else {
            return Err(Before {
                trouble: PullError::Broken,
                lost: before.map(|before| before.lost).unwrap_or_default(),
            });
        };
        let mut delivered = Seq::ZERO;
        if let Ok(info) = self.0.log.consumer().await {
            self.note_ack_wait(&info);
            delivered = Seq::new(info.delivered.stream_seq).unwrap_or(Seq::MAX);
        }
        if let Some(Before {
            trouble: PullError::Broken | PullError::Silent,
            lost,
        }) = before
            && let Err(error) = self.rescue(batches, lost).await
        {
            tracing::debug!(%error, "what was under way could not be fetched; it comes again after ack_wait");
        }
        let fresh = |trouble| Before {
            trouble,
            lost: Lost {
                after: delivered,
                messages: self.0.max_batch,
                ..Lost::default()
            },
        };
        let mut pulls = Pulls::start(
            connection,
            self.0.log.consumer_names(),
            self.0.max_batch,
            delivered,
        )
        .await
        .map_err(fresh)?;
        match self.pull_from(&mut pulls, batches).await {
            Ok(()) => {
                pulls.give_back().await;
                Ok(())
            }
            Err(trouble) => {
                let lost = pulls.lost();
                pulls.close().await;
                Err(Before { trouble, lost })
            }
        }
    }

    async fn pull_from(
        &self,
        pulls: &mut Pulls,
        batches: &mpsc::Sender<Batch>,
    ) -> Result<(), PullError> {
        loop {
            // A lane first, then messages: what comes while all are busy makes the next batch larger, and while the
            // database is away nothing more is asked for.
            let Some(lane) = self.lane_for(pulls).await? else {
                return Ok(());
            };
            // While the other lane is busy a small batch gains nothing by hurrying; a lone message never waits.
            let linger = if self.0.lanes.available_permits() + 1 < LANES {
                LINGER
            } else {
                Duration::ZERO
            };
            let deliveries = tokio::select! {
                deliveries = pulls.next(linger) => deliveries?.into(),
                () = self.0.log.stop().cancelled() => return Ok(()),
            };
            if self.hand_on(batches, deliveries, lane).await.is_err() {
                return Ok(());
            }
        }
    }

    /// An error: nobody stores any more.
    async fn hand_on(
        &self,
        batches: &mpsc::Sender<Batch>,
        deliveries: Arc<[Delivery]>,
        lane: OwnedSemaphorePermit,
    ) -> Result<(), ()> {
        self.0.handed_on.fetch_add(1, Ordering::Relaxed);
        batches.send(Batch { deliveries, lane }).await.map_err(drop)
    }

    /// Hands on what was on its way to a connection that broke. Behind the highest sequence we received stands what the server sent
    /// there and we never saw: as many messages as it had been asked for. A malformed message that is delivered again stands further
    /// down; nobody can acknowledge it, so in the end the ack floor waits right below it: there only malformed ones are looked for.
    async fn rescue(&self, batches: &mpsc::Sender<Batch>, lost: Lost) -> Result<(), StreamError> {
        if !self.store_rescued(batches, lost.ready).await {
            return Ok(());
        }
        let info = self.0.log.consumer().await?;
        let seq = |seq| Seq::new(seq).unwrap_or(Seq::MAX);
        let (floor, delivered) = (
            seq(info.ack_floor.stream_seq),
            seq(info.delivered.stream_seq),
        );
        let after = lost.after.max(floor);
        let below = Limit::within(self.0.max_batch, RESCUE_BYTES, RESCUE_TIME);
        let beyond = Limit::within(lost.messages, RESCUE_BYTES, RESCUE_TIME);
        for (from, to, limit) in [
            (floor.next(), after, below),
            (after.next(), delivered, beyond),
        ] {
            if from > to {
                continue;
            }
            // Number by number: a direct get that meets a malformed message takes its time to notice.
            let mut found = self.0.log.scan(from, to, limit).await?.messages;
            found.retain(|raw| raw.malformed || from > after);
            let malformed = found.iter().filter(|raw| raw.malformed).count();
            if malformed > 0 {
                tracing::warn!(
                    malformed,
                    "messages whose headers or subject no client can read; moving them to the dead letters"
                );
            }
            let rescued = found
                .into_iter()
                .map(|raw| Delivery {
                    malformed: raw.malformed.then_some(raw.header_block),
                    message: raw.message,
                    attempt: 0,
                    ack: None,
                })
                .collect();
            if !self.store_rescued(batches, rescued).await {
                return Ok(());
            }
        }
        Ok(())
    }

    /// False when nobody stores any more.
    async fn store_rescued(
        &self,
        batches: &mpsc::Sender<Batch>,
        mut rescued: Vec<Delivery>,
    ) -> bool {
        while !rescued.is_empty() {
            let rest = rescued.split_off(self.0.max_batch.min(rescued.len()));
            let Some(lane) = self.lane().await else {
                return false;
            };
            if self.hand_on(batches, rescued.into(), lane).await.is_err() {
                return false;
            }
            rescued = rest;
        }
        true
    }

    /// Ends with an error when messages are pending and nothing moves, so that whoever runs this starts it afresh.
    async fn watch(&self) -> Fatal {
        let mut last = (0, 0, 0);
        let mut moved = Instant::now();
        let mut paused = false;
        loop {
            tokio::time::sleep(WATCH_INTERVAL).await;
            let Ok(info) = self.0.log.consumer().await else {
                // Without an answer there is nothing to judge: NATS is away, or the consumer is not there yet.
                moved = Instant::now();
                continue;
            };
            self.note_ack_wait(&info);
            if info.paused != paused {
                paused = info.paused;
                match paused {
                    true => tracing::warn!(
                        "the consumer is paused: nothing is delivered until its pause ends or `nats consumer resume`"
                    ),
                    false => tracing::info!("the consumer is not paused any more"),
                }
            }
            let ConsumerInfo {
                ack_floor,
                num_ack_pending,
                num_pending,
                ..
            } = info;
            let now = (
                ack_floor.stream_seq,
                self.progress(),
                self.0.going_on.load(Ordering::Relaxed),
            );
            let idle = num_ack_pending + num_pending == 0;
            if now != last || idle || paused || self.0.waiting.load(Ordering::Relaxed) {
                (last, moved) = (now, Instant::now());
            } else if moved.elapsed() > self.0.stuck_after {
                return Fatal::new(format!(
                    "stuck: {num_pending} messages pending, {num_ack_pending} unacknowledged, nothing moved for {} s; leaving so that a fresh start can",
                    self.0.stuck_after.as_secs()
                ));
            }
        }
    }
}
