//! Reading a stream directly: messages of a subject, ranges of sequences, single messages.
//!
//! The server stores headers without parsing them, so a stream may hold messages whose headers end
//! the connection of every client that receives them. Direct gets therefore have a connection of
//! their own, and the message at which it broke is read through the JSON API, where headers are
//! base64 and nobody parses them (`direct.rs`).
//!
//! Every read takes a [`Limit`].

mod direct;
mod error;
mod limit;
mod message;
mod remove;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api;
use crate::info::{ConsumerInfo, StreamInfo};
use base::seq::Seq;
use direct::Malformed;
use nats::connection::{ApiError, Connection};
use nats::settings::NatsSettings;

pub use error::StreamError;
pub use limit::Limit;
pub use message::{GetReply, RawMessage, StoredMessage, StreamMessage};

/// The stored-through sequence may be this old. An old value is safe, because it only grows; reads
/// are only slower with it.
const STORED_THROUGH_AGE: Duration = Duration::from_millis(50);
/// Requests to the JSON API in flight during a scan.
const SCAN_CONCURRENCY: usize = 32;
/// A scan checks its time after so many sequences.
const SCAN_STEP: u64 = 256;
/// Every subject of a stream.
pub const EVERY_SUBJECT: &str = ">";

/// Consecutive messages of one subject. Malformed ones are skipped: they are about to be removed
/// from the stream ([`crate::consumer`]).
#[derive(Debug, Clone, Default)]
pub struct Window {
    /// Oldest first.
    pub messages: Vec<StreamMessage>,
    /// The subject has no more messages beyond the window, in the direction it was read.
    pub complete: bool,
}

/// What a [scan](StreamReader::scan) found.
#[derive(Debug, Clone)]
pub struct Scanned {
    /// Oldest first, malformed ones too.
    pub messages: Vec<RawMessage>,
    /// Every sequence up to here was read; below the `to` of the scan when its limit was reached.
    pub through: Seq,
}

/// A result, and when it was asked for.
type Asked<T> = (Instant, Result<T, StreamError>);

/// Which stream is read, and which of its consumers acknowledges processed messages.
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

/// Reads a stream.
#[derive(Debug)]
pub struct StreamReader {
    control: Connection,
    settings: NatsSettings,
    client_name: &'static str,
    names: Names,
    stop: CancellationToken,
    direct: Mutex<Option<Connection>>,
    malformed: Malformed,
    stored_through: Mutex<Option<(Instant, Seq)>>,
    range: Mutex<Option<Asked<(Seq, Seq)>>>,
}

impl StreamReader {
    /// Reads the stream `names`. `control` is the connection for the JSON API; the connections that
    /// the reader opens for direct gets and deliveries are named after `client_name`.
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
            stored_through: Mutex::default(),
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

    pub(crate) fn names(&self) -> Names {
        self.names
    }

    pub(crate) fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// The consumer's ack floor: everything up to here was processed before it was acknowledged.
    /// May be some milliseconds old.
    ///
    /// # Errors
    /// JetStream does not answer. Without a stream or consumer this is 0: nothing is known to be
    /// processed.
    pub async fn stored_through(&self) -> Result<Seq, StreamError> {
        let mut cached = self.stored_through.lock().await;
        if let Some((at, seq)) = *cached
            && at.elapsed() < STORED_THROUGH_AGE
        {
            return Ok(seq);
        }
        let asked = Instant::now();
        let seq = self.stored_through_now().await?;
        self.forget_malformed(seq);
        *cached = Some((asked, seq));
        Ok(seq)
    }

    /// [`stored_through`](StreamReader::stored_through) as it is now, for callers that wait for it
    /// to advance.
    ///
    /// # Errors
    /// As [`stored_through`](StreamReader::stored_through).
    pub async fn stored_through_now(&self) -> Result<Seq, StreamError> {
        match self.consumer().await {
            Ok(info) => Ok(info.acknowledged_through()),
            Err(error) if error.is(ApiError::NO_CONSUMER) || error.is(ApiError::NO_STREAM) => {
                Ok(Seq::ZERO)
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) async fn consumer(&self) -> Result<ConsumerInfo, ApiError> {
        ConsumerInfo::fetch(&self.control, self.names.stream, self.names.consumer).await
    }

    /// The oldest messages of `subject` from `from` on, within `limit`; at least one if there is
    /// any.
    ///
    /// # Errors
    /// The stream does not answer, or not in time.
    pub async fn first(
        &self,
        subject: &str,
        from: Seq,
        limit: Limit,
    ) -> Result<Window, StreamError> {
        let read = self.read(subject, from, limit).await?;
        let well_formed = read
            .messages
            .into_iter()
            .filter_map(|(message, malformed)| (!malformed).then_some(message));
        Ok(Window {
            messages: well_formed.collect(),
            complete: read.complete,
        })
    }

    /// The newest messages of `subject` in `from..before`: at least `limit.messages` if there are
    /// so many, and no older one once there are `limit.bytes`. Nothing is missing right below
    /// `before`.
    ///
    /// # Errors
    /// The stream does not answer, or not in time.
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
        let mut next = self.beginning_of_last(subject, from, before, limit).await?;
        let mut complete = next == from;
        let mut bytes = 0;
        let mut found: VecDeque<StreamMessage> = VecDeque::new();
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
            // The oldest are dropped, so that what is kept ends right below `before`.
            while bytes > limit.bytes && found.len() > 1 {
                bytes -= found.pop_front().map_or(0, |message| message.payload.len());
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

    /// Where to begin so that `from..before` has `limit.messages` messages of `subject` and not
    /// many more. Found by bisection, because reading a long stream from its beginning takes too
    /// long.
    async fn beginning_of_last(
        &self,
        subject: &str,
        from: Seq,
        before: Seq,
        limit: Limit,
    ) -> Result<Seq, StreamError> {
        let (_, last) = self.range().await?;
        let enough = limit.messages.saturating_add(limit.messages / 4 + 8);
        let mut low = from;
        let mut high = before.min(last.next());
        let mut counted = self.between(subject, low, before, limit).await?;
        while high.get().saturating_sub(low.get()) > 1 && counted > enough {
            limit.check_time()?;
            let middle = Seq::new(low.get().midpoint(high.get())).unwrap_or(high);
            // While the stream grows the count is too low: then we begin earlier than necessary.
            let count = self.between(subject, middle, before, limit).await?;
            if count >= limit.messages {
                low = middle;
                counted = count;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// The first sequence the stream still holds and the last one it assigned, as they were after
    /// this call began. Callers that wait at the same time share one request.
    ///
    /// # Errors
    /// The stream does not answer.
    pub async fn range(&self) -> Result<(Seq, Seq), StreamError> {
        let called = Instant::now();
        let mut shared = self.range.lock().await;
        if let Some((asked, range)) = &*shared
            && *asked > called
        {
            return range.clone();
        }
        let asked = Instant::now();
        let range = StreamInfo::fetch(&self.control, self.names.stream)
            .await
            .map(|info| (info.state.first(), info.state.last()))
            .map_err(StreamError::from);
        *shared = Some((asked, range.clone()));
        range
    }

    /// Every message in `from..=to`, malformed ones too, as far as `limit` reaches: at most so many
    /// sequences, whether there is a message or not. To read on, begin after [`Scanned::through`].
    ///
    /// # Errors
    /// The stream does not answer, or not in time.
    pub async fn scan(&self, from: Seq, to: Seq, limit: Limit) -> Result<Scanned, StreamError> {
        let mut next = from.get().max(1);
        let mut bytes = 0;
        let mut messages = Vec::new();
        let sequences = limit.messages.max(1) as u64;
        let last = to.get().min(next.saturating_add(sequences - 1));
        while next <= last && bytes < limit.bytes {
            limit.check_time()?;
            let end = last.min(next.saturating_add(SCAN_STEP - 1));
            let found: Vec<Option<RawMessage>> = futures::stream::iter(next..=end)
                .map(|seq| self.get_json(json!({ "seq": seq })))
                .buffered(SCAN_CONCURRENCY)
                .try_collect()
                .await?;
            for raw in found.into_iter().flatten() {
                bytes += raw.message.payload.len();
                messages.push(raw);
            }
            next = end + 1;
        }
        Ok(Scanned {
            messages,
            through: Seq::new(next - 1).unwrap_or(to),
        })
    }

    /// The message with this sequence, malformed or not.
    ///
    /// # Errors
    /// The stream does not answer.
    pub async fn at(&self, seq: Seq) -> Result<Option<RawMessage>, StreamError> {
        self.get_json(json!({ "seq": seq })).await
    }

    /// The oldest messages of every subject from `from` on, within `limit`, each with whether it is
    /// malformed: unlike [`first`](StreamReader::first), this does not skip those. Empty when there
    /// are no more.
    ///
    /// # Errors
    /// The stream does not answer, or not in time.
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
    /// The stream does not answer.
    pub async fn next(&self, subject: &str, from: Seq) -> Result<Option<RawMessage>, StreamError> {
        let request = json!({"seq": from.get().max(1), "next_by_subj": subject});
        self.get_json(request).await
    }

    /// One message through the JSON API.
    async fn get_json(&self, request: Value) -> Result<Option<RawMessage>, StreamError> {
        let subject = self.names.stream("MSG.GET");
        match self.control.api::<GetReply>(&subject, &request).await {
            Ok(reply) => Ok(Some(reply.message.read()?)),
            Err(error) if error.is(ApiError::NO_MESSAGE) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
