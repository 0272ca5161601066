//! Pull requests on a connection that is there for nothing else.

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::{Message, StatusCode, Subscriber};
use futures::{FutureExt, StreamExt};
use serde_json::json;
use tokio::task::unconstrained;
use tokio::time::{Instant, timeout, timeout_at};

use crate::consumer::Delivery;
use crate::stream::{ConsumerInfo, Names, StreamMessage};
use base::seq::Seq;
use nats::connection::{ApiError, Connection};

/// Longer than a pull, shorter than the consumer's ack_wait: what one pull brought is not brought again by it.
const PULL_EXPIRES: Duration = Duration::from_secs(20);
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Two heartbeats missed: the consumer's leader changed, the connection is dead without knowing it, or the server has too much to do.
pub(crate) const SILENCE: Duration = Duration::from_secs(5);
/// How long a broken connection may take until it is gone.
const CLOSE_WITHIN: Duration = Duration::from_secs(1);
/// To JetStream: this is worked on, its ack_wait begins anew.
pub(crate) const IN_PROGRESS: &str = "+WPI";
/// To JetStream: this is for somebody else.
const NOT_HERE: &str = "-NAK";

/// Why pulling was interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PullError {
    #[error("the connection broke")]
    Broken,
    #[error("the consumer fell silent")]
    Silent,
    #[error("there is no such consumer; is stream-bootstrap running?")]
    NoConsumer,
}

/// What a connection that broke leaves behind.
#[derive(Debug, Default)]
pub(crate) struct Lost {
    /// Received, and not handed on yet.
    pub ready: Vec<Delivery>,
    /// The highest sequence that was received, or delivered before there was this connection: what was lost comes after it.
    pub after: Seq,
    /// The server had at most so many more to send.
    pub messages: usize,
}

/// Pull requests under way on one connection.
pub(crate) struct Pulls {
    connection: Connection,
    names: Names,
    inbox: String,
    replies: Subscriber,
    max_batch: usize,
    number: u64,
    /// Pulls under way, oldest first: number, and messages it may still bring. The server serves them in this order.
    open: VecDeque<(u64, usize)>,
    ready: VecDeque<Delivery>,
    /// The highest sequence so far.
    highest: Seq,
}

impl Pulls {
    /// `delivered`: the highest sequence that was delivered before.
    pub(crate) async fn start(
        connection: Connection,
        names: Names,
        max_batch: usize,
        delivered: Seq,
    ) -> Result<Pulls, PullError> {
        let inbox = connection.client().new_inbox();
        let replies = connection
            .client()
            .subscribe(format!("{inbox}.*"))
            .await
            .map_err(|_| PullError::Broken)?;
        let mut pulls = Pulls {
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

    /// Asks for more before the server has sent all it was asked for: it never waits for us.
    async fn keep_open(&mut self) -> Result<(), PullError> {
        while self.open.iter().map(|(_, left)| left).sum::<usize>() <= self.max_batch / 2 {
            self.ask().await?;
        }
        Ok(())
    }

    async fn ask(&mut self) -> Result<(), PullError> {
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
            .publish_with_reply(
                self.names.consumer("MSG.NEXT"),
                reply,
                request.to_string().into(),
            )
            .await
            .map_err(|_| PullError::Broken)
    }

    /// Waits for a message, then takes what else is there or comes within `linger`. Asks for more before it
    /// returns, so that the server sends while the batch is being stored.
    pub(crate) async fn next(&mut self, linger: Duration) -> Result<Vec<Delivery>, PullError> {
        while self.ready.is_empty() {
            let mut connection = self.connection.clone();
            let message = tokio::select! {
                message = timeout(SILENCE, self.replies.next()) => message,
                () = connection.broken() => return Err(PullError::Broken),
            };
            match message {
                Ok(message) => self.take(message.ok_or(PullError::Broken)?)?,
                Err(_) => self.doubt().await?,
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
                Some(Some(message)) => self.take(message)?,
                Some(None) | None => break,
            }
            self.keep_open().await?;
        }
        Ok(self
            .ready
            .drain(..self.ready.len().min(self.max_batch))
            .collect())
    }

    /// While the consumer can be asked over this connection, the connection stays: what is on its way on another one that was given
    /// up would be delivered again, and a server that is busy would have more to do. The pulls may be lost, so new ones are made;
    /// should the server have kept the old ones, it sends a little more than we wanted.
    async fn doubt(&mut self) -> Result<(), PullError> {
        match self
            .connection
            .api::<ConsumerInfo>(&self.names.consumer("INFO"), &json!({}))
            .await
        {
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

    /// Keeps what the server has sent, and nobody took yet, from being sent again.
    pub(crate) async fn hold(&mut self) -> Result<(), PullError> {
        // There is no more than was asked for. Unconstrained: tokio would pretend that nothing is there after a hundred of them.
        while let Some(message) = unconstrained(self.replies.next()).now_or_never() {
            self.take(message.ok_or(PullError::Broken)?)?;
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

    /// Ends the connection; what the server sent and nobody took another copy gets at once, not after ack_wait.
    pub(crate) async fn give_back(mut self) {
        if self.replies.drain().await.is_ok() {
            while let Ok(Some(message)) = timeout(CLOSE_WITHIN, self.replies.next()).await {
                // What a status says of a pull does not matter any more.
                let _ = self.take(message);
            }
        }
        for ack in self.ready.drain(..).filter_map(|delivery| delivery.ack) {
            if self
                .connection
                .client()
                .publish(ack, NOT_HERE.into())
                .await
                .is_err()
            {
                break;
            }
        }
        self.close().await;
    }

    /// What is lost with this connection.
    pub(crate) fn lost(&mut self) -> Lost {
        // More than is asked for at once only where pulls were given up and the server has kept them.
        let asked = self
            .open
            .iter()
            .map(|(_, left)| left)
            .sum::<usize>()
            .clamp(self.max_batch, 2 * self.max_batch);
        Lost {
            ready: self.ready.drain(..).collect(),
            after: self.highest,
            messages: asked,
        }
    }

    /// Ends the connection. Until async-nats has made a new one it leaves a broken one open, and the server goes on sending there
    /// what nobody reads; what it sends after this nobody misses.
    pub(crate) async fn close(self) {
        // Without its subscription the new connection does not stand in for the old one.
        drop(self.replies);
        if !matches!(
            timeout(CLOSE_WITHIN, self.connection.client().flush()).await,
            Ok(Ok(()))
        ) {
            tracing::debug!("the connection for deliveries was given up before it was mended");
        }
    }

    fn take(&mut self, message: Message) -> Result<(), PullError> {
        let Some(status) = message.status else {
            if let Some((_, left)) = self.open.front_mut() {
                *left -= 1;
                if *left == 0 {
                    self.open.pop_front();
                }
            }
            match delivery(message) {
                Some(delivery) => {
                    self.highest = self.highest.max(delivery.message.seq);
                    self.ready.push_back(delivery);
                }
                None => tracing::warn!(
                    "a delivery without a readable acknowledgement subject was left to come again"
                ),
            }
            return Ok(());
        };
        if status == StatusCode::IDLE_HEARTBEAT {
            return Ok(());
        }
        if status == StatusCode::NO_RESPONDERS {
            return Err(PullError::NoConsumer);
        }
        // 404, 408 and 409 end the pull they answer; 409 also tells of a consumer that was deleted or moved.
        let ended: Option<u64> = message
            .subject
            .rsplit('.')
            .next()
            .and_then(|number| number.parse().ok());
        self.open.retain(|(number, _)| Some(*number) != ended);
        let told = message.description.as_deref().unwrap_or_default();
        if status == StatusCode::REQUEST_TERMINATED
            && !told.contains("Exceeded")
            && !told.contains("Batch Completed")
        {
            tracing::debug!(told, "the pull was ended");
            return Err(if told.contains("Consumer Deleted") {
                PullError::NoConsumer
            } else {
                PullError::Silent
            });
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
