//! Consuming the log: batches from the durable consumer all copies share.
//!
//! One connection of its own for the deliveries, because a stored message with malformed headers ends the
//! connection of whoever receives it (see [`crate::Log`]). Then what was under way is fetched through the
//! JSON API instead, the malformed ones are handed on marked as such and removed from the stream.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_nats::{Message, StatusCode, Subject, Subscriber};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use wire::{Seq, jetstream};

use crate::log::ConsumerInfo;
use crate::{Connection, Fatal, Log, LogError, LogMessage, Settings, connect};

/// Longer than a pull, shorter than the consumer's ack_wait: what one pull brought is not brought again by it.
const PULL_EXPIRES: Duration = Duration::from_secs(20);
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Two heartbeats missed: the consumer's leader changed, or the connection is dead without knowing it.
const SILENCE: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// Batches stored side by side: while the database works on one, the other is parsed or waits for its commit.
const LANES: usize = 2;

/// How long a batch may gather while another is being stored.
const LINGER: Duration = Duration::from_millis(10);

/// One message of the log, as delivered.
#[derive(Debug)]
pub struct Delivery {
    /// The message.
    pub message: LogMessage,
    /// How often it was delivered, this time included; 0 when it was fetched, not delivered.
    pub attempt: u64,
    /// The header block no client can read, or the empty block under a subject that is not UTF-8.
    pub malformed: Option<Vec<u8>>,
    ack: Option<Subject>,
}

/// A copy's part in consuming the log.
#[derive(Clone)]
pub struct Worker(Arc<Shared>);

struct Shared {
    control: Connection,
    log: Arc<Log>,
    settings: Settings,
    name: &'static str,
    stop: CancellationToken,
    max_batch: usize,
    stuck_after: Duration,
    progress: AtomicU64,
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
        f.debug_struct("Worker").field("name", &self.0.name).finish_non_exhaustive()
    }
}

impl Worker {
    pub(crate) fn new(
        control: Connection,
        log: Arc<Log>,
        settings: Settings,
        name: &'static str,
        stop: CancellationToken,
        max_batch: usize,
        stuck_after: Duration,
    ) -> Worker {
        Worker(Arc::new(Shared {
            control,
            log,
            settings,
            name,
            stop,
            max_batch,
            stuck_after,
            progress: AtomicU64::new(0),
            waiting: AtomicBool::new(false),
            lanes: Arc::new(Semaphore::new(LANES)),
        }))
    }

    /// Tells the watchdog that nothing moves because the database is away, not because we are stuck.
    pub fn waiting(&self, waiting: bool) {
        self.0.waiting.store(waiting, Ordering::Relaxed);
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
        let outcome = tokio::select! {
            () = consume => Ok(()),
            stuck = self.watch() => Err(stuck),
        };
        puller.abort();
        // An acknowledgement that is only queued is no acknowledgement.
        let flushed = timeout(SILENCE, self.0.control.client().flush()).await;
        if !matches!(flushed, Ok(Ok(()))) {
            tracing::warn!("the last acknowledgements may not have arrived; those messages come again, and do no harm");
        }
        outcome
    }

    async fn handle<F: Future<Output = bool>>(&self, store: &impl Fn(Arc<[Delivery]>) -> F, batch: Batch) {
        if store(batch.deliveries.clone()).await {
            self.settle(&batch.deliveries).await;
        }
        drop(batch.lane);
    }

    async fn settle(&self, batch: &[Delivery]) {
        let mut settled = 0;
        for delivery in batch {
            if let Some(ack) = &delivery.ack {
                match self.0.control.client().publish(ack.clone(), "+ACK".into()).await {
                    Ok(()) => settled += 1,
                    Err(error) => tracing::warn!(%error, "an acknowledgement could not be sent; the message comes again"),
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
        while !self.0.stop.is_cancelled() {
            let begun = Instant::now();
            let trouble = match self.pull_until_trouble(&batches).await {
                Ok(()) => return,
                Err(trouble) => trouble,
            };
            if begun.elapsed() > LONGEST_PAUSE {
                (pause, told) = (FIRST_PAUSE, false);
            }
            if !told {
                tracing::warn!(%trouble, "pulling was interrupted");
                told = true;
            }
            if trouble != Trouble::NoConsumer
                && let Err(error) = self.rescue(&batches).await
            {
                tracing::debug!(%error, "what was under way could not be fetched yet");
            }
            tokio::select! {
                () = tokio::time::sleep(jittered(pause)) => {}
                () = self.0.stop.cancelled() => return,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Waits for a place to store a batch in; `None` never happens while the worker lives.
    async fn lane(&self) -> Option<OwnedSemaphorePermit> {
        self.0.lanes.clone().acquire_owned().await.ok()
    }

    async fn pull_until_trouble(&self, batches: &mpsc::Sender<Batch>) -> Result<(), Trouble> {
        let connection = connect(&self.0.settings.nats, &format!("{} (deliveries)", self.0.name), &self.0.stop).await;
        let Ok(connection) = connection else { return Err(Trouble::Broken) };
        let mut pulls = Pulls::start(connection, self.0.max_batch).await?;
        loop {
            // A lane first, then messages: what comes while all are busy makes the next batch larger, and while the
            // database is away nothing more is asked for.
            let lane = tokio::select! {
                lane = self.lane() => lane,
                () = self.0.stop.cancelled() => return Ok(()),
            };
            let Some(lane) = lane else { return Ok(()) };
            // While the other lane is busy a small batch gains nothing by hurrying; a lone message never waits.
            let linger = if self.0.lanes.available_permits() + 1 < LANES { LINGER } else { Duration::ZERO };
            let deliveries = tokio::select! {
                deliveries = pulls.next(linger) => deliveries?.into(),
                () = self.0.stop.cancelled() => return Ok(()),
            };
            if batches.send(Batch { deliveries, lane }).await.is_err() {
                return Ok(());
            }
        }
    }

    /// Fetches everything that was delivered and not acknowledged, without anybody parsing headers.
    async fn rescue(&self, batches: &mpsc::Sender<Batch>) -> Result<(), LogError> {
        let info = self.0.log.consumer().await?;
        let from = Seq::new(info.ack_floor.stream_seq).unwrap_or(Seq::MAX).next();
        let to = Seq::new(info.delivered.stream_seq).unwrap_or(Seq::MAX);
        let mut next = from;
        while next <= to {
            let end = Seq::new(next.get() + self.0.max_batch as u64 - 1).unwrap_or(to).min(to);
            let found = self.0.log.walk(next, end).await?;
            let malformed = found.iter().filter(|raw| raw.malformed).count();
            if malformed > 0 {
                tracing::warn!(malformed, "messages whose headers or subject no client can read; moving them to the dead letters");
            }
            let batch: Vec<Delivery> = found
                .into_iter()
                .map(|raw| Delivery { malformed: raw.malformed.then_some(raw.header_block), message: raw.message, attempt: 0, ack: None })
                .collect();
            if !batch.is_empty() {
                let Some(lane) = self.lane().await else { return Ok(()) };
                if batches.send(Batch { deliveries: batch.into(), lane }).await.is_err() {
                    return Ok(());
                }
            }
            next = end.next();
        }
        Ok(())
    }

    /// Ends with an error when messages are pending and nothing moves, so that whoever runs this starts it afresh.
    async fn watch(&self) -> Fatal {
        let mut last = (0, 0);
        let mut moved = Instant::now();
        loop {
            tokio::time::sleep(WATCH_INTERVAL).await;
            let Ok(ConsumerInfo { ack_floor, num_ack_pending, num_pending, .. }) = self.0.log.consumer().await else {
                // Without an answer there is nothing to judge: NATS is away, or the consumer is not there yet.
                moved = Instant::now();
                continue;
            };
            let now = (ack_floor.stream_seq, self.progress());
            let idle = num_ack_pending + num_pending == 0;
            if now != last || idle || self.0.waiting.load(Ordering::Relaxed) {
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

/// Why pulling was interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Trouble {
    #[error("the connection broke")]
    Broken,
    #[error("the consumer fell silent")]
    Silent,
    #[error("there is no such consumer; is stream-bootstrap running?")]
    NoConsumer,
}

/// Pull requests under way on one connection.
struct Pulls {
    connection: Connection,
    inbox: String,
    replies: Subscriber,
    max_batch: usize,
    number: u64,
    /// Pulls under way, oldest first: number, and messages it may still bring. The server serves them in this order.
    open: VecDeque<(u64, usize)>,
    ready: VecDeque<Delivery>,
}

impl Pulls {
    async fn start(connection: Connection, max_batch: usize) -> Result<Pulls, Trouble> {
        let inbox = connection.client().new_inbox();
        let replies = connection.client().subscribe(format!("{inbox}.*")).await.map_err(|_| Trouble::Broken)?;
        let mut pulls = Pulls { connection, inbox, replies, max_batch, number: 0, open: VecDeque::new(), ready: VecDeque::new() };
        pulls.keep_open().await?;
        Ok(pulls)
    }

    /// Asks for more before the server has sent all it was asked for: it never waits for us.
    async fn keep_open(&mut self) -> Result<(), Trouble> {
        while self.open.iter().map(|(_, left)| left).sum::<usize>() <= self.max_batch / 2 {
            self.ask().await?;
        }
        Ok(())
    }

    async fn ask(&mut self) -> Result<(), Trouble> {
        self.number += 1;
        self.open.push_back((self.number, self.max_batch));
        let request = json!({
            "batch": self.max_batch,
            "expires": u64::try_from(PULL_EXPIRES.as_nanos()).unwrap_or(u64::MAX),
            "idle_heartbeat": u64::try_from(HEARTBEAT.as_nanos()).unwrap_or(u64::MAX),
        });
        let reply = format!("{}.{}", self.inbox, self.number);
        self.connection
            .client()
            .publish_with_reply(jetstream::CONSUMER_NEXT, reply, request.to_string().into())
            .await
            .map_err(|_| Trouble::Broken)
    }

    /// Waits for a message, then takes what else is there or comes within `linger`. Asks for more before it
    /// returns, so that the server sends while the batch is being stored.
    async fn next(&mut self, linger: Duration) -> Result<Vec<Delivery>, Trouble> {
        while self.ready.is_empty() {
            let mut connection = self.connection.clone();
            let message = tokio::select! {
                message = timeout(SILENCE, self.replies.next()) => message.map_err(|_| Trouble::Silent)?.ok_or(Trouble::Broken)?,
                () = connection.broken() => return Err(Trouble::Broken),
            };
            self.take(message)?;
            self.keep_open().await?;
        }
        let until = Instant::now() + linger;
        while self.ready.len() < self.max_batch {
            let message = match self.replies.next().now_or_never() {
                None if linger > Duration::ZERO => timeout_at(until, self.replies.next()).await.ok(),
                ready => ready,
            };
            match message {
                Some(Some(message)) => self.take(message)?,
                Some(None) | None => break,
            }
            self.keep_open().await?;
        }
        Ok(self.ready.drain(..).collect())
    }

    fn take(&mut self, message: Message) -> Result<(), Trouble> {
        let Some(status) = message.status else {
            if let Some((_, left)) = self.open.front_mut() {
                *left -= 1;
                if *left == 0 {
                    self.open.pop_front();
                }
            }
            match delivery(message) {
                Some(delivery) => self.ready.push_back(delivery),
                None => tracing::warn!("a delivery without a readable acknowledgement subject was left to come again"),
            }
            return Ok(());
        };
        if status == StatusCode::IDLE_HEARTBEAT {
            return Ok(());
        }
        if status == StatusCode::NO_RESPONDERS {
            return Err(Trouble::NoConsumer);
        }
        // 404, 408 and 409 end the pull they answer; 409 also tells of a consumer that was deleted or moved.
        let ended: Option<u64> = message.subject.rsplit('.').next().and_then(|number| number.parse().ok());
        self.open.retain(|(number, _)| Some(*number) != ended);
        let told = message.description.as_deref().unwrap_or_default();
        if status == StatusCode::REQUEST_TERMINATED && !told.contains("Exceeded") && !told.contains("Batch Completed") {
            tracing::debug!(told, "the pull was ended");
            return Err(if told.contains("Consumer Deleted") { Trouble::NoConsumer } else { Trouble::Silent });
        }
        Ok(())
    }
}

/// Reads what the server says about a delivery from its acknowledgement subject,
/// `$JS.ACK.<stream>.<consumer>.<attempt>.<stream seq>.<consumer seq>.<nanoseconds>.<pending>`; the second
/// form of it has two more tokens, domain and account, before the stream.
fn delivery(message: Message) -> Option<Delivery> {
    let ack = message.reply?;
    let tokens: Vec<&str> = ack.split('.').collect();
    let fields = match tokens.len() {
        9 => &tokens[2..],
        11.. => &tokens[4..],
        _ => return None,
    };
    let nanos: i64 = fields.get(5)?.parse().ok()?;
    let message = LogMessage {
        seq: Seq::new(fields.get(3)?.parse().ok()?)?,
        subject: message.subject.to_string(),
        headers: message.headers,
        payload: message.payload,
        received_ms: nanos / 1_000_000,
    };
    let attempt = fields.get(2)?.parse().ok()?;
    Some(Delivery { message, attempt, malformed: None, ack: Some(ack) })
}

/// Between half of `pause` and all of it, so that copies do not come back in step.
fn jittered(pause: Duration) -> Duration {
    let spread = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.subsec_nanos() % 1_000);
    pause.mul_f64(0.5 + f64::from(spread) / 2_000.0)
}
