//! Reading the log directly: the ack floor, a subject's messages after it, single messages.
//!
//! Stored headers may be such that they end the connection of whoever receives them (the server keeps
//! them unread). So direct gets have a connection of their own, and the message at which it broke is
//! read through the JSON API, where headers come as base64 and no parser sees them (`direct.rs`).
//!
//! Every read takes a [`Limit`].

mod direct;
mod stored;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api;
use base::error::{Code, Error};
use base::seq::Seq;
use direct::Malformed;
use nats::connection::{ApiError, Connection};
use nats::settings::NatsSettings;
use stored::StreamInfo;

pub(crate) use stored::ConsumerInfo;
pub use stored::GetReply;

/// A floor may be this old. An old one is still safe (the floor only grows), only slower.
const FLOOR_AGE: Duration = Duration::from_millis(50);
/// JSON gets under way at once while walking.
const JSON_CONCURRENCY: usize = 32;
/// Between two looks at the clock while walking.
const WALK_STEP: u64 = 256;
const EVERY_SUBJECT: &str = ">";

/// How much one read may bring, and until when. Every read of the stream takes one.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    /// At most so many messages.
    pub messages: usize,
    /// No further message once there are so many bytes of payload.
    pub bytes: usize,
    /// After this the read is given up as [`StreamError::Late`].
    pub until: Instant,
}

impl Limit {
    /// So many messages and bytes, within `time` from now.
    pub fn within(messages: usize, bytes: usize, time: Duration) -> Limit {
        Limit {
            messages,
            bytes,
            until: Instant::now() + time,
        }
    }

    fn check(&self) -> Result<(), StreamError> {
        if Instant::now() < self.until {
            Ok(())
        } else {
            Err(StreamError::Late)
        }
    }
}

/// One message of the log.
#[derive(Debug, Clone)]
pub struct StreamMessage {
    /// Its place in the one order.
    pub seq: Seq,
    /// As published.
    pub subject: String,
    /// Readable ones only.
    pub headers: Option<HeaderMap>,
    /// As published.
    pub payload: Bytes,
    /// When the log took it, in Unix milliseconds.
    pub received_ms: i64,
}

/// Consecutive messages of one subject. Malformed ones are passed over: they are on their way to the
/// dead letters.
#[derive(Debug, Clone, Default)]
pub struct Window {
    /// Oldest first.
    pub messages: Vec<StreamMessage>,
    /// Nothing of the subject is left beyond the window, in the direction it was read.
    pub complete: bool,
}

/// What a walk by number found.
#[derive(Debug, Clone)]
pub struct Scanned {
    /// Oldest first, malformed ones too.
    pub messages: Vec<RawMessage>,
    /// Every number up to here was asked for; below the `to` of the walk when its limit was reached.
    pub through: Seq,
}

/// Why the log could not be read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StreamError {
    /// JetStream's API.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The direct get failed.
    #[error("direct get: {0}")]
    Direct(&'static str),
    /// The time of the read's [`Limit`] was up.
    #[error("reading the stream took too long")]
    Late,
    /// There is more than the read's [`Limit`] allows, and a part of it is no answer.
    #[error("there is more of it than one request may read: {0}")]
    TooMuch(&'static str),
}

/// A message as the JSON API gives it, headers unread.
#[derive(Debug, Clone)]
pub struct RawMessage {
    /// The message; without headers when they are malformed.
    pub message: StreamMessage,
    /// The headers as stored; empty when there are none.
    pub header_block: Vec<u8>,
    /// No client can read its headers or its subject.
    pub malformed: bool,
}

/// An answer, and when it was asked for.
type Asked<T> = (Instant, Result<T, StreamError>);

/// Which stream is read, and which of its consumers acknowledges what is stored.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// The stream.
    pub stream: &'static str,
    /// Its durable consumer.
    pub consumer: &'static str,
}

impl Names {
    pub(crate) fn stream(&self, verb: &str) -> String {
        api::stream(verb, self.stream)
    }

    pub(crate) fn consumer(&self, verb: &str) -> String {
        api::consumer(verb, self.stream, self.consumer)
    }
}

/// A reader of the log.
#[derive(Debug)]
pub struct StreamReader {
    control: Connection,
    settings: NatsSettings,
    client_name: &'static str,
    names: Names,
    stop: CancellationToken,
    direct: Mutex<Option<Connection>>,
    malformed: Malformed,
    floor: Mutex<Option<(Instant, Seq)>>,
    range: Mutex<Option<Asked<(Seq, Seq)>>>,
}

impl StreamReader {
    /// A reader of the stream `names`; `control` is the connection for the JSON API, and those made
    /// for direct gets and deliveries are called after `client_name`.
    pub fn new(
        control: Connection,
        settings: NatsSettings,
        client_name: &'static str,
        names: Names,
        stop: CancellationToken,
    ) -> Arc<StreamReader> {
        Arc::new(StreamReader {
            control,
            settings,
            client_name,
            names,
            stop,
            direct: Mutex::default(),
            malformed: Malformed::default(),
            floor: Mutex::default(),
            range: Mutex::default(),
        })
    }

    /// The connection for the JSON API.
    pub(crate) fn control(&self) -> &Connection {
        &self.control
    }

    pub(crate) fn settings(&self) -> &NatsSettings {
        &self.settings
    }

    pub(crate) fn client_name(&self) -> &'static str {
        self.client_name
    }

    pub(crate) fn consumer_names(&self) -> Names {
        self.names
    }

    pub(crate) fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// Everything up to here was committed to PostgreSQL before it was acknowledged.
    ///
    /// # Errors
    /// JetStream does not answer. Without a stream or consumer the floor is 0: nothing is known to be stored.
    pub async fn stored_through(&self) -> Result<Seq, StreamError> {
        let mut cached = self.floor.lock().await;
        if let Some((at, floor)) = *cached
            && at.elapsed() < FLOOR_AGE
        {
            return Ok(floor);
        }
        let asked = Instant::now();
        let floor = self.stored_through_now().await?;
        self.forget_malformed(floor);
        *cached = Some((asked, floor));
        Ok(floor)
    }

    /// The floor as it is, for whoever waits for it to move.
    ///
    /// # Errors
    /// As [`StreamReader::stored_through`].
    pub async fn stored_through_now(&self) -> Result<Seq, StreamError> {
        match self.consumer().await {
            Ok(info) => Ok(Seq::new(info.ack_floor.stream_seq).unwrap_or(Seq::MAX)),
            Err(error) if error.is(ApiError::NO_CONSUMER) || error.is(ApiError::NO_STREAM) => {
                Ok(Seq::ZERO)
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) async fn consumer(&self) -> Result<ConsumerInfo, ApiError> {
        self.control
            .api(&self.names.consumer("INFO"), &json!({}))
            .await
    }

    /// The oldest messages of `subject` from `from` on, within `limit`; at least one if there is any.
    ///
    /// # Errors
    /// The log does not answer, or not in time.
    pub async fn first(
        &self,
        subject: &str,
        from: Seq,
        limit: Limit,
    ) -> Result<Window, StreamError> {
        let read = self.read(subject, from, limit).await?;
        let good = read
            .messages
            .into_iter()
            .filter_map(|(message, malformed)| (!malformed).then_some(message));
        Ok(Window {
            messages: good.collect(),
            complete: read.complete,
        })
    }

    /// The newest messages of `subject` in `from..before`: at least `limit.messages` if there are as
    /// many, and no older one once there are `limit.bytes`. Nothing is missing right below `before`.
    ///
    /// # Errors
    /// The log does not answer, or not in time.
    pub async fn last(
        &self,
        subject: &str,
        from: Seq,
        before: Seq,
        limit: Limit,
    ) -> Result<Window, StreamError> {
        if from >= before {
            return Ok(Window {
                messages: Vec::new(),
                complete: true,
            });
        }
        let begin = self.beginning_of_last(subject, from, before, limit).await?;
        let (mut next, mut bytes, mut found) = (begin, 0, VecDeque::new());
        let mut complete = begin == from;
        'read: loop {
            let read = self.read(subject, next, limit).await?;
            let Some((last, _)) = read.messages.last() else {
                break;
            };
            next = last.seq.next();
            for (message, malformed) in read.messages {
                if message.seq >= before {
                    break 'read;
                }
                if !malformed {
                    bytes += message.payload.len();
                    found.push_back(message);
                }
            }
            // The oldest give way; what is kept ends right below `before`.
            while bytes > limit.bytes && found.len() > 1 {
                bytes -= found
                    .pop_front()
                    .map_or(0, |message: StreamMessage| message.payload.len());
                complete = false;
            }
            if read.complete || next >= before {
                break;
            }
        }
        Ok(Window {
            messages: found.into(),
            complete,
        })
    }

    /// Where to begin so that not many more than `limit.messages` of `subject` stand in
    /// `from..before`: found by bisection, rather than reading a long tail from its beginning.
    async fn beginning_of_last(
        &self,
        subject: &str,
        from: Seq,
        before: Seq,
        limit: Limit,
    ) -> Result<Seq, StreamError> {
        let (_, last) = self.range().await?;
        let enough = limit.messages.saturating_add(limit.messages / 4 + 8);
        let (mut low, mut high) = (from, before.min(last.next()));
        let mut counted = self.between(subject, low, before, limit).await?;
        while high.get().saturating_sub(low.get()) > 1 && counted > enough {
            limit.check()?;
            let middle = Seq::new(low.get().midpoint(high.get())).unwrap_or(high);
            // Counted too low while the stream grows: then it begins earlier than need be, never later.
            let count = self.between(subject, middle, before, limit).await?;
            if count >= limit.messages {
                (low, counted) = (middle, count);
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// The first sequence the log still holds, and the last one it gave out, as they were after this
    /// call began. One question serves everybody who waited when it was sent.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn range(&self) -> Result<(Seq, Seq), StreamError> {
        let called = Instant::now();
        let mut shared = self.range.lock().await;
        if let Some((asked, range)) = &*shared
            && *asked > called
        {
            return range.clone();
        }
        let asked = Instant::now();
        let info = self
            .control
            .api::<StreamInfo>(&self.names.stream("INFO"), &json!({}))
            .await;
        let seq = |seq| Seq::new(seq).unwrap_or(Seq::MAX);
        let range = info
            .map(|info| (seq(info.state.first_seq), seq(info.state.last_seq)))
            .map_err(StreamError::from);
        *shared = Some((asked, range.clone()));
        range
    }

    /// Every message in `from..=to`, malformed ones too, by number, as far as `limit` reaches: so
    /// many numbers. Whoever wants all of them goes on behind [`Scanned::through`].
    ///
    /// # Errors
    /// The log does not answer, or not in time.
    pub async fn scan(&self, from: Seq, to: Seq, limit: Limit) -> Result<Scanned, StreamError> {
        let (mut next, mut bytes, mut messages) = (from.get().max(1), 0, Vec::new());
        let last = to
            .get()
            .min(next.saturating_add(limit.messages.max(1) as u64 - 1));
        while next <= last && bytes < limit.bytes {
            limit.check()?;
            let end = last.min(next.saturating_add(WALK_STEP - 1));
            let found: Vec<Option<RawMessage>> = futures::stream::iter(next..=end)
                .map(|seq| self.raw(json!({ "seq": seq })))
                .buffered(JSON_CONCURRENCY)
                .try_collect()
                .await?;
            messages.extend(
                found
                    .into_iter()
                    .flatten()
                    .inspect(|raw: &RawMessage| bytes += raw.message.payload.len()),
            );
            next = end + 1;
        }
        Ok(Scanned {
            messages,
            through: Seq::new(next - 1).unwrap_or(to),
        })
    }

    /// The message in one place, malformed or not.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn at(&self, seq: Seq) -> Result<Option<RawMessage>, StreamError> {
        self.raw(json!({ "seq": seq })).await
    }

    /// The oldest messages from `from` on, whatever their subject, within `limit`: malformed ones,
    /// too, which [`first`](StreamReader::first) passes over; each with whether it is malformed. Empty when
    /// there are no more.
    ///
    /// # Errors
    /// The log does not answer, or not in time.
    pub async fn every(
        &self,
        from: Seq,
        limit: Limit,
    ) -> Result<Vec<(StreamMessage, bool)>, StreamError> {
        Ok(self.read(EVERY_SUBJECT, from, limit).await?.messages)
    }

    /// The first message of `subject` from `from` on, malformed or not.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn next(&self, subject: &str, from: Seq) -> Result<Option<RawMessage>, StreamError> {
        self.raw(json!({"seq": from.get().max(1), "next_by_subj": subject}))
            .await
    }

    /// Overwrites and removes the message at `seq`, if it is the one that `is` says; whether it was there. Looked at first, because a
    /// log that was made anew may hold somebody else's message in that place.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn erase(
        &self,
        seq: Seq,
        is: impl FnOnce(&StreamMessage) -> bool,
    ) -> Result<bool, StreamError> {
        match self.raw(json!({ "seq": seq })).await? {
            Some(raw) if !raw.malformed && is(&raw.message) => {
                self.remove(json!({ "seq": seq })).await.map(|()| true)
            }
            Some(_) | None => Ok(false),
        }
    }

    /// Removes one message from the log.
    pub(crate) async fn delete(&self, seq: Seq) -> Result<(), StreamError> {
        self.remove(json!({"seq": seq, "no_erase": true})).await
    }

    async fn remove(&self, request: serde_json::Value) -> Result<(), StreamError> {
        #[derive(Deserialize)]
        struct Deleted {}
        match self
            .control
            .api::<Deleted>(&self.names.stream("MSG.DELETE"), &request)
            .await
        {
            Ok(Deleted {}) => Ok(()),
            // Another copy was faster.
            Err(error @ ApiError::Refused { .. })
                if self.raw(json!({ "seq": request["seq"] })).await?.is_none() =>
            {
                tracing::debug!(%error, "already deleted");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn raw(&self, request: serde_json::Value) -> Result<Option<RawMessage>, StreamError> {
        match self
            .control
            .api::<GetReply>(&self.names.stream("MSG.GET"), &request)
            .await
        {
            Ok(reply) => Ok(Some(reply.message.read()?)),
            Err(error) if error.is(ApiError::NO_MESSAGE) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl From<StreamError> for Error {
    fn from(error: StreamError) -> Error {
        let reason = match error {
            StreamError::TooMuch(_) => {
                "too much of this waits to be stored for one request to read; try again when it is"
            }
            StreamError::Late => "reading the log took too long; try again",
            StreamError::Api(_) | StreamError::Direct(_) => "the log does not answer; try again",
        };
        Error::new(Code::Unavailable, reason).with_detail(error)
    }
}
