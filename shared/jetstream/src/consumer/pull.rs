//! Pull requests on a connection of their own.

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::{Message, StatusCode, Subscriber};
use futures::{FutureExt, StreamExt};
use serde_json::json;
use tokio::task::unconstrained;
use tokio::time::{Instant, timeout, timeout_at};

use super::Delivery;
use super::extension::IN_PROGRESS;
use crate::info::ConsumerInfo;
use crate::stream::{Names, StreamMessage};
use base::seq::Seq;
use nats::connection::{ApiError, Connection};

/// How long the server keeps a pull request. Shorter than the consumer's `ack_wait`, so that one
/// request never brings the same message twice.
const PULL_EXPIRES: Duration = Duration::from_secs(20);
/// How often the server reports that a request is open and there is nothing to send.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Two heartbeats are missing: the consumer has a new leader, the connection is dead without our
/// knowing, or the server is overloaded.
const SILENCE: Duration = Duration::from_secs(5);
/// How long a broken connection may take to close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Asks the server to deliver a message to somebody else, now.
const NAK: &str = "-NAK";

/// Why pulling ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum PullError {
    #[error("the connection broke")]
    Broken,
    #[error("the consumer fell silent")]
    Silent,
    #[error("the consumer does not exist; whatever creates it may not be running")]
    NoConsumer,
}

/// What is lost with a connection that broke.
#[derive(Debug, Default)]
pub(super) struct Lost {
    /// Received, and not handed over yet.
    pub ready: Vec<Delivery>,
    /// The highest sequence received, or delivered before the connection was made: lost messages
    /// are above it.
    pub after: Seq,
    /// At most so many messages were on their way.
    pub messages: usize,
}

/// A pull request that the server still serves.
struct OpenPull {
    number: u64,
    /// How many messages it may still bring.
    left: usize,
}

/// The pull requests of one connection, and what they brought.
pub(super) struct PullRequests {
    connection: Connection,
    names: Names,
    inbox: String,
    replies: Subscriber,
    max_batch: usize,
    /// The number of the newest request.
    number: u64,
    /// Oldest first, which is the order in which the server serves them.
    open: VecDeque<OpenPull>,
    ready: VecDeque<Delivery>,
    /// The highest sequence received.
    highest: Seq,
}

impl PullRequests {
    /// Begins to pull. `delivered` is the highest sequence that was delivered before.
    pub(super) async fn start(
        connection: Connection,
        names: Names,
        max_batch: usize,
        delivered: Seq,
    ) -> Result<PullRequests, PullError> {
        let inbox = connection.client().new_inbox();
        let replies = connection
            .client()
            .subscribe(format!("{inbox}.*"))
            .await
            .map_err(|_| PullError::Broken)?;
        let mut pulls = PullRequests {
            connection,
            names,
            inbox,
            replies,
            max_batch,
            number: 0,
            open: VecDeque::new(),
            ready: VecDeque::new(),
            highest: delivered,
        };
        pulls.keep_open().await?;
        Ok(pulls)
    }

    /// Asks for more before the server has sent all it was asked for, so that it never waits for
    /// us.
    async fn keep_open(&mut self) -> Result<(), PullError> {
        while self.outstanding() <= self.max_batch / 2 {
            self.request().await?;
        }
        Ok(())
    }

    /// How many messages the open requests may still bring.
    fn outstanding(&self) -> usize {
        self.open.iter().map(|pull| pull.left).sum()
    }

    async fn request(&mut self) -> Result<(), PullError> {
        self.number += 1;
        self.open.push_back(OpenPull {
            number: self.number,
            left: self.max_batch,
        });
        let request = json!({
            "batch": self.max_batch,
            "expires": u64::try_from(PULL_EXPIRES.as_nanos()).unwrap_or(u64::MAX),
            "idle_heartbeat": u64::try_from(HEARTBEAT.as_nanos()).unwrap_or(u64::MAX),
        });
        let subject = self.names.consumer("MSG.NEXT");
        let reply = format!("{}.{}", self.inbox, self.number);
        self.connection
            .client()
            .publish_with_reply(subject, reply, request.to_string().into())
            .await
            .map_err(|_| PullError::Broken)
    }

    /// Waits for a message, then adds what else is there or arrives within `linger`. Asks for more
    /// before it returns, so that the server sends while the batch is being processed.
    pub(super) async fn next(&mut self, linger: Duration) -> Result<Vec<Delivery>, PullError> {
        while self.ready.is_empty() {
            let mut connection = self.connection.clone();
            let message = tokio::select! {
                message = timeout(SILENCE, self.replies.next()) => message,
                () = connection.broken() => return Err(PullError::Broken),
            };
            match message {
                Ok(message) => self.accept(message.ok_or(PullError::Broken)?)?,
                Err(_) => self.probe().await?,
            }
            self.keep_open().await?;
        }
        let until = Instant::now() + linger;
        while self.ready.len() < self.max_batch {
            let message = match self.replies.next().now_or_never() {
                None if linger > Duration::ZERO => {
                    timeout_at(until, self.replies.next()).await.ok()
                }
                ready => ready,
            };
            match message {
                Some(Some(message)) => self.accept(message)?,
                Some(None) | None => break,
            }
            self.keep_open().await?;
        }
        let count = self.ready.len().min(self.max_batch);
        Ok(self.ready.drain(..count).collect())
    }

    /// Finds out whether silence means that the connection is dead. While JetStream answers over
    /// it, we keep it: messages on their way over a connection that we gave up would be delivered
    /// again, and an overloaded server would have more to do. The pull requests may be lost, so we
    /// send new ones; if the server kept the old ones, it sends a little more than we wanted.
    async fn probe(&mut self) -> Result<(), PullError> {
        match ConsumerInfo::fetch(&self.connection, self.names.stream, self.names.consumer).await {
            Ok(_) => {
                self.open.clear();
                Ok(())
            }
            Err(error) if error.is(ApiError::NO_CONSUMER) || error.is(ApiError::NO_STREAM) => {
                Err(PullError::NoConsumer)
            }
            Err(_) => Err(PullError::Silent),
        }
    }

    /// Extends the ack deadlines of everything the server has sent and nobody processes yet.
    pub(super) async fn extend_acks(&mut self) -> Result<(), PullError> {
        // This ends: the server sends no more than it was asked for. Unconstrained, because tokio's
        // cooperative budget would report "nothing there" after about a hundred messages.
        while let Some(message) = unconstrained(self.replies.next()).now_or_never() {
            self.accept(message.ok_or(PullError::Broken)?)?;
        }
        for ack in self
            .ready
            .iter()
            .filter_map(|delivery| delivery.ack.clone())
        {
            self.connection
                .client()
                .publish(ack, IN_PROGRESS.into())
                .await
                .map_err(|_| PullError::Broken)?;
        }
        Ok(())
    }

    /// Ends the connection on a graceful stop. Unprocessed messages are nak'ed, so that another
    /// process gets them at once and not after `ack_wait`.
    pub(super) async fn nak_unprocessed(mut self) {
        if self.replies.drain().await.is_ok() {
            while let Ok(Some(message)) = timeout(CLOSE_TIMEOUT, self.replies.next()).await {
                // A status that ends a pull request no longer matters.
                let _ = self.accept(message);
            }
        }
        for ack in self.ready.drain(..).filter_map(|delivery| delivery.ack) {
            if self
                .connection
                .client()
                .publish(ack, NAK.into())
                .await
                .is_err()
            {
                break;
            }
        }
        self.close().await;
    }

    /// What is lost with this connection.
    pub(super) fn lost(&mut self) -> Lost {
        // More than one batch is outstanding only where requests were given up that the server
        // kept.
        let outstanding = self.outstanding().clamp(self.max_batch, 2 * self.max_batch);
        Lost {
            ready: self.ready.drain(..).collect(),
            after: self.highest,
            messages: outstanding,
        }
    }

    /// Ends the connection. async-nats leaves a broken connection open until it has made a new one,
    /// and the server goes on sending to it. After this call nothing more is sent there.
    pub(super) async fn close(self) {
        // Dropped first, so that the client does not subscribe again on the new connection.
        drop(self.replies);
        let flushed = timeout(CLOSE_TIMEOUT, self.connection.client().flush()).await;
        if !matches!(flushed, Ok(Ok(()))) {
            tracing::debug!("the connection for deliveries was dropped before it was repaired");
        }
    }

    fn accept(&mut self, message: Message) -> Result<(), PullError> {
        let Some(status) = message.status else {
            self.accept_delivery(message);
            return Ok(());
        };
        if status == StatusCode::IDLE_HEARTBEAT {
            return Ok(());
        }
        if status == StatusCode::NO_RESPONDERS {
            return Err(PullError::NoConsumer);
        }
        // 404, 408 and 409 end the request they answer; 409 also reports a consumer that was
        // deleted or moved.
        let number = message.subject.rsplit('.').next();
        let number: Option<u64> = number.and_then(|number| number.parse().ok());
        self.open.retain(|pull| Some(pull.number) != number);
        let description = message.description.as_deref().unwrap_or_default();
        if status == StatusCode::REQUEST_TERMINATED
            && !description.contains("Exceeded")
            && !description.contains("Batch Completed")
        {
            tracing::debug!(description, "the server ended a pull request");
            return Err(if description.contains("Consumer Deleted") {
                PullError::NoConsumer
            } else {
                PullError::Silent
            });
        }
        Ok(())
    }

    fn accept_delivery(&mut self, message: Message) {
        if let Some(oldest) = self.open.front_mut() {
            oldest.left -= 1;
            if oldest.left == 0 {
                self.open.pop_front();
            }
        }
        match delivery(message) {
            Some(delivery) => {
                self.highest = self.highest.max(delivery.message.seq);
                self.ready.push_back(delivery);
            }
            None => tracing::warn!(
                "a delivery has an ack subject of an unknown form; ignoring it, it is delivered \
                 again"
            ),
        }
    }
}

/// Parses what the server reports about a delivery from its ack subject,
/// `$JS.ACK.<stream>.<consumer>.<attempt>.<stream seq>.<consumer seq>.<nanoseconds>.<pending>`. A
/// second form has two more tokens before the stream: domain and account.
fn delivery(message: Message) -> Option<Delivery> {
    let ack = message.reply?;
    let tokens: Vec<&str> = ack.split('.').collect();
    let fields = match tokens.len() {
        9 => &tokens[2..],
        11.. => &tokens[4..],
        _ => return None,
    };
    let nanos: i64 = fields.get(5)?.parse().ok()?;
    let message = StreamMessage {
        seq: Seq::new(fields.get(3)?.parse().ok()?)?,
        subject: message.subject.to_string(),
        headers: message.headers,
        payload: message.payload,
        received_ms: nanos / 1_000_000,
    };
    let attempt = fields.get(2)?.parse().ok()?;
    Some(Delivery {
        message,
        attempt,
        malformed: None,
        ack: Some(ack),
    })
}
