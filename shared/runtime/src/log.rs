//! Reading the log directly: the ack floor, a subject's messages after it, single messages.
//!
//! Stored headers may be such that they end the connection of whoever receives them (the server keeps
//! them unread). So direct gets have a connection of their own, and when it breaks, the same question is
//! asked through the JSON API, where headers come as base64 and no parser sees them.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{HeaderMap, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde::Deserialize;
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use wire::{Seq, jetstream};

use crate::{ApiError, Connection, MalformedHeaders, Settings, connect, parse_headers};

/// A floor may be this old. An old one is still safe (the floor only grows), only slower.
const FLOOR_AGE: Duration = Duration::from_millis(50);
/// A direct get that takes longer is asked again through the JSON API.
const DIRECT_TIMEOUT: Duration = Duration::from_millis(1_500);
/// After a direct get broke its connection, the JSON API serves for this long.
const DETOUR: Duration = Duration::from_secs(5);
/// JSON gets under way at once while walking.
const JSON_CONCURRENCY: usize = 32;
/// Messages the JSON API is asked for before somebody looks at the clock.
const MAX_WALK: usize = 256;
const EVERY_SUBJECT: &str = ">";

/// One message of the log.
#[derive(Debug, Clone)]
pub struct LogMessage {
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

impl LogMessage {
    /// The header `Nats-Msg-Id`, as the message came with it first.
    pub fn message_id(&self) -> Option<&str> {
        self.headers.as_ref().and_then(message_id)
    }
}

/// The header `Nats-Msg-Id`, as the message came with it first.
pub fn message_id(headers: &HeaderMap) -> Option<&str> {
    // Appended again, a message has an id of our own in front of JetStream.
    headers.get(wire::header::ORIGINAL_ID).or_else(|| headers.get(wire::header::MESSAGE_ID)).map(|id| id.as_str())
}

/// Consecutive messages of one subject.
#[derive(Debug, Clone, Default)]
pub struct Window {
    /// Oldest first.
    pub messages: Vec<LogMessage>,
    /// Nothing of the subject is left beyond the window, in the direction it was read.
    pub complete: bool,
}

/// Why the log could not be read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogError {
    /// JetStream's API.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The direct get failed.
    #[error("direct get: {0}")]
    Direct(&'static str),
}

/// A message as the JSON API gives it, headers unread.
#[derive(Debug, Clone)]
pub struct RawMessage {
    /// The message; without headers when they are malformed.
    pub message: LogMessage,
    /// The headers as stored; empty when there are none.
    pub header_block: Vec<u8>,
    /// No client can read its headers or its subject.
    pub malformed: bool,
}

/// A reader of the log.
#[derive(Debug)]
pub struct Log {
    control: Connection,
    settings: Settings,
    name: String,
    stop: CancellationToken,
    direct: Mutex<Option<Connection>>,
    detour: Mutex<Option<Instant>>,
    floor: Mutex<Option<(Instant, Seq)>>,
}

impl Log {
    pub(crate) fn new(control: Connection, settings: Settings, name: &str, stop: CancellationToken) -> Arc<Log> {
        Arc::new(Log {
            control,
            settings,
            name: name.to_owned(),
            stop,
            direct: Mutex::default(),
            detour: Mutex::default(),
            floor: Mutex::default(),
        })
    }

    /// Everything up to here was committed to PostgreSQL before it was acknowledged.
    ///
    /// # Errors
    /// JetStream does not answer. Without a stream or consumer the floor is 0: nothing is known to be stored.
    pub async fn floor(&self) -> Result<Seq, LogError> {
        let mut cached = self.floor.lock().await;
        if let Some((at, floor)) = *cached
            && at.elapsed() < FLOOR_AGE
        {
            return Ok(floor);
        }
        let asked = Instant::now();
        let floor = self.floor_now().await?;
        *cached = Some((asked, floor));
        Ok(floor)
    }

    /// The floor as it is, for whoever waits for it to move.
    ///
    /// # Errors
    /// As [`Log::floor`].
    pub async fn floor_now(&self) -> Result<Seq, LogError> {
        match self.consumer().await {
            Ok(info) => Ok(Seq::new(info.ack_floor.stream_seq).unwrap_or(Seq::MAX)),
            Err(error) if error.is(ApiError::NO_CONSUMER) || error.is(ApiError::NO_STREAM) => Ok(Seq::ZERO),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) async fn consumer(&self) -> Result<ConsumerInfo, ApiError> {
        self.control.api(jetstream::CONSUMER_INFO, &json!({})).await
    }

    /// The oldest messages of `subject` from `from` on, at most `need`, and no more than about `max_bytes`.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn first(&self, subject: &str, from: Seq, need: usize, max_bytes: usize) -> Result<Window, LogError> {
        if !self.on_detour().await {
            match self.first_direct(subject, from, need, max_bytes).await {
                Ok(window) => return Ok(window),
                Err(error) => self.take_detour(&error).await,
            }
        }
        self.first_json(subject, from, Seq::MAX, need, max_bytes).await
    }

    /// The newest messages of `subject` in `from..before`, at most about `need`.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn last(&self, subject: &str, from: Seq, before: Seq, need: usize) -> Result<Window, LogError> {
        if from >= before {
            return Ok(Window { messages: Vec::new(), complete: true });
        }
        if !self.on_detour().await {
            match self.last_direct(subject, from, before, need).await {
                Ok(window) => return Ok(window),
                Err(error) => self.take_detour(&error).await,
            }
        }
        let mut window = self.first_json(subject, from, before, usize::MAX, usize::MAX).await?;
        let surplus = window.messages.len().saturating_sub(need);
        window.messages.drain(..surplus);
        window.complete = surplus == 0;
        Ok(window)
    }

    /// The first sequence the log still holds, and the last one it gave out.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn range(&self) -> Result<(Seq, Seq), LogError> {
        let info: StreamInfo = self.control.api(jetstream::STREAM_INFO, &json!({})).await?;
        let seq = |seq| Seq::new(seq).unwrap_or(Seq::MAX);
        Ok((seq(info.state.first_seq), seq(info.state.last_seq)))
    }

    async fn last_direct(&self, subject: &str, from: Seq, before: Seq, need: usize) -> Result<Window, LogError> {
        // Nearly always the tail is short, and one question brings all of it.
        let enough = need.saturating_mul(4);
        let part = self.get(subject, from, enough, usize::MAX).await?;
        if part.pending == 0 || part.messages.last().is_some_and(|last| last.seq >= before.previous()) {
            let mut window = Window { messages: part.messages, complete: true };
            window.messages.retain(|message| message.seq < before);
            return Ok(window);
        }
        // A long one: find by bisection where its last `need` messages begin, rather than read it all.
        let beyond = self.count(subject, before).await?;
        let (_, last) = self.range().await?;
        let (mut low, mut high) = (from, before.min(last.next()));
        let mut counted = part.pending + part.messages.len();
        while high.get() - low.get() > 1 && counted.saturating_sub(beyond) > enough {
            let middle = Seq::new(low.get().midpoint(high.get())).unwrap_or(high);
            let count = self.count(subject, middle).await?;
            if count.saturating_sub(beyond) >= need {
                (low, counted) = (middle, count);
            } else {
                high = middle;
            }
        }
        let mut window = self.first_direct(subject, low, counted.saturating_sub(beyond), usize::MAX).await?;
        window.messages.retain(|message| message.seq < before);
        window.complete = low == from;
        Ok(window)
    }

    /// How many messages of `subject` the log holds from `from` on.
    async fn count(&self, subject: &str, from: Seq) -> Result<usize, LogError> {
        if from == Seq::MAX {
            return Ok(0);
        }
        let window = self.get(subject, from, 1, usize::MAX).await?;
        Ok(window.pending + window.messages.len())
    }

    async fn first_direct(&self, subject: &str, from: Seq, need: usize, max_bytes: usize) -> Result<Window, LogError> {
        let mut window = Window { messages: Vec::new(), complete: false };
        let (mut from, mut bytes) = (from, 0);
        while window.messages.len() < need && bytes < max_bytes {
            let part = self.get(subject, from, need - window.messages.len(), max_bytes - bytes).await?;
            bytes += part.messages.iter().map(|message| message.payload.len()).sum::<usize>();
            from = part.messages.last().map_or(from, |last| last.seq.next());
            let empty = part.messages.is_empty();
            window.messages.extend(part.messages);
            if part.pending == 0 || empty {
                window.complete = true;
                break;
            }
        }
        Ok(window)
    }

    /// One batched direct get: `batch` messages of `subject` from `from` on, ended by 204, or 404 at once.
    async fn get(&self, subject: &str, from: Seq, batch: usize, max_bytes: usize) -> Result<Batch, LogError> {
        const MAX_BATCH: usize = 1_000;
        const MAX_BATCH_BYTES: usize = 8 << 20;
        const GONE: LogError = LogError::Direct("the connection is gone");
        let mut connection = self.direct().await?;
        let client = connection.client().clone();
        let deadline = Instant::now() + DIRECT_TIMEOUT;
        let inbox = client.new_inbox();
        let mut replies = client.subscribe(inbox.clone()).await.map_err(|_| GONE)?;
        let request = json!({
            "seq": from.get().max(1), "next_by_subj": subject,
            "batch": batch.clamp(1, MAX_BATCH), "max_bytes": max_bytes.clamp(1, MAX_BATCH_BYTES),
        });
        client.publish_with_reply(jetstream::DIRECT_GET, inbox, request.to_string().into()).await.map_err(|_| GONE)?;
        let mut part = Batch::default();
        loop {
            let reply = tokio::select! {
                reply = timeout_at(deadline, replies.next()) => reply.map_err(|_| LogError::Direct("no answer in time"))?.ok_or(GONE)?,
                () = connection.broken() => return Err(GONE),
            };
            let number = |name: &str| reply.headers.as_ref()?.get(name)?.as_str().parse::<u64>().ok();
            match reply.status {
                None => part.messages.push(direct_message(reply)?),
                Some(StatusCode::NOT_FOUND) => return Ok(part),
                Some(StatusCode::NO_RESPONDERS) => return Err(ApiError::Away("JetStream is not there").into()),
                Some(status) if status.as_u16() == END_OF_BATCH => {
                    part.pending = usize::try_from(number("Nats-Num-Pending").unwrap_or(0)).unwrap_or(usize::MAX);
                    let sent = number("Nats-Last-Sequence").unwrap_or(0);
                    if part.messages.last().is_some_and(|message| message.seq.get() != sent) {
                        return Err(LogError::Direct("part of the answer was lost"));
                    }
                    return Ok(part);
                }
                Some(_) => return Err(LogError::Direct("the server refused the request")),
            }
        }
    }

    /// The connection for direct gets, made when first needed and again after it broke.
    async fn direct(&self) -> Result<Connection, LogError> {
        let mut direct = self.direct.lock().await;
        if let Some(connection) = &*direct {
            return Ok(connection.clone());
        }
        let made = timeout(DIRECT_TIMEOUT, connect(&self.settings.nats, &format!("{} (log)", self.name), &self.stop)).await;
        match made {
            Ok(Ok(connection)) => Ok(direct.insert(connection).clone()),
            Ok(Err(_)) | Err(_) => Err(LogError::Direct("no connection")),
        }
    }

    async fn on_detour(&self) -> bool {
        self.detour.lock().await.is_some_and(|since| since.elapsed() < DETOUR)
    }

    async fn take_detour(&self, error: &LogError) {
        let mut since = self.detour.lock().await;
        if !since.is_some_and(|since| since.elapsed() < DETOUR) {
            tracing::warn!(%error, "reading the log through the JSON API for a while");
        }
        *since = Some(Instant::now());
        self.direct.lock().await.take();
    }

    /// Walks `from..before` message by message. Messages with malformed headers are skipped: they are on
    /// their way to the dead letters.
    async fn first_json(&self, subject: &str, from: Seq, before: Seq, need: usize, max_bytes: usize) -> Result<Window, LogError> {
        let mut window = Window::default();
        let (mut from, mut bytes) = (from, 0);
        while window.messages.len() < need && bytes < max_bytes {
            let Some(raw) = self.raw(json!({"seq": from.get().max(1), "next_by_subj": subject})).await? else {
                window.complete = true;
                break;
            };
            if raw.message.seq >= before {
                window.complete = true;
                break;
            }
            from = raw.message.seq.next();
            if !raw.malformed {
                bytes += raw.message.payload.len();
                window.messages.push(raw.message);
            }
        }
        Ok(window)
    }

    /// Every message in `from..=to`, malformed ones too, by number.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn walk(&self, from: Seq, to: Seq) -> Result<Vec<RawMessage>, LogError> {
        let found: Vec<Option<RawMessage>> = futures::stream::iter(from.get().max(1)..=to.get())
            .map(|seq| self.raw(json!({ "seq": seq })))
            .buffered(JSON_CONCURRENCY)
            .try_collect()
            .await?;
        Ok(found.into_iter().flatten().collect())
    }

    /// The oldest messages from `from` on, whatever their subject, about `need` and `max_bytes` at most: malformed ones,
    /// too, which [`first`](Log::first) skips; each with whether it is malformed. Empty when there are no more.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn every(&self, from: Seq, need: usize, max_bytes: usize) -> Result<Vec<(LogMessage, bool)>, LogError> {
        if !self.on_detour().await {
            match self.first_direct(EVERY_SUBJECT, from, need, max_bytes).await {
                // A direct get that succeeds has met nothing malformed.
                Ok(window) => return Ok(window.messages.into_iter().map(|message| (message, false)).collect()),
                Err(error) => self.take_detour(&error).await,
            }
        }
        // Number by number, many at once; not before the first one there is, for a log may have wide gaps.
        let Some(first) = self.next(EVERY_SUBJECT, from).await? else { return Ok(Vec::new()) };
        let from = first.message.seq;
        let to = from.get().saturating_add(need.clamp(1, MAX_WALK) as u64 - 1);
        let mut found = self.walk(from, Seq::new(to).unwrap_or(Seq::MAX)).await?;
        if found.is_empty() {
            // Removed meanwhile; the log goes on all the same.
            found.push(first);
        }
        Ok(found.into_iter().map(|raw| (raw.message, raw.malformed)).collect())
    }

    /// The first message of `subject` from `from` on, malformed or not.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn next(&self, subject: &str, from: Seq) -> Result<Option<RawMessage>, LogError> {
        self.raw(json!({"seq": from.get().max(1), "next_by_subj": subject})).await
    }

    /// Overwrites and removes the message at `seq`, if it is the one that `is` says; whether it was there. Looked at first, because a
    /// log that was made anew may hold somebody else's message in that place.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn erase(&self, seq: Seq, is: impl FnOnce(&LogMessage) -> bool) -> Result<bool, LogError> {
        match self.raw(json!({ "seq": seq })).await? {
            Some(raw) if !raw.malformed && is(&raw.message) => self.remove(json!({ "seq": seq })).await.map(|()| true),
            Some(_) | None => Ok(false),
        }
    }

    /// Removes one message from the log.
    pub(crate) async fn delete(&self, seq: Seq) -> Result<(), LogError> {
        self.remove(json!({"seq": seq, "no_erase": true})).await
    }

    async fn remove(&self, request: serde_json::Value) -> Result<(), LogError> {
        #[derive(Deserialize)]
        struct Deleted {}
        match self.control.api::<Deleted>(jetstream::MESSAGE_DELETE, &request).await {
            Ok(Deleted {}) => Ok(()),
            // Another copy was faster.
            Err(error @ ApiError::Refused { .. }) if self.raw(json!({ "seq": request["seq"] })).await?.is_none() => {
                tracing::debug!(%error, "already deleted");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn raw(&self, request: serde_json::Value) -> Result<Option<RawMessage>, LogError> {
        match self.control.api::<GetReply>(jetstream::MESSAGE_GET, &request).await {
            Ok(reply) => Ok(Some(reply.message.read()?)),
            Err(error) if error.is(ApiError::NO_MESSAGE) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// The status that ends a batched direct get.
const END_OF_BATCH: u16 = 204;

#[derive(Default)]
struct Batch {
    messages: Vec<LogMessage>,
    /// How many of the subject follow.
    pending: usize,
}

fn direct_message(reply: async_nats::Message) -> Result<LogMessage, LogError> {
    const UNREADABLE: LogError = LogError::Direct("an answer without the log's headers");
    let headers = reply.headers.ok_or(UNREADABLE)?;
    // The server appends its own headers behind the stored ones, which may hold the same names: the last is the server's.
    let own = |name: &str| headers.get_all(name).last().map(|value| value.as_str().to_owned()).ok_or(UNREADABLE);
    Ok(LogMessage {
        seq: own("Nats-Sequence")?.parse().ok().and_then(Seq::new).ok_or(UNREADABLE)?,
        subject: own("Nats-Subject")?,
        received_ms: unix_ms(&own("Nats-Time-Stamp")?).ok_or(UNREADABLE)?,
        payload: reply.payload,
        headers: Some(headers),
    })
}

fn unix_ms(rfc3339: &str) -> Option<i64> {
    let at = OffsetDateTime::parse(rfc3339, &Rfc3339).ok()?;
    i64::try_from(at.unix_timestamp_nanos() / 1_000_000).ok()
}

#[derive(Deserialize)]
pub(crate) struct GetReply {
    pub message: StoredMessage,
}

#[derive(Deserialize)]
pub(crate) struct StoredMessage {
    subject: String,
    seq: u64,
    #[serde(default)]
    hdrs: String,
    #[serde(default)]
    data: String,
    time: String,
}

impl StoredMessage {
    pub fn read(self) -> Result<RawMessage, ApiError> {
        let decode = |text: &str| BASE64.decode(text).map_err(|_| ApiError::Unreadable("not base64".to_owned()));
        let header_block = decode(&self.hdrs)?;
        let headers = if header_block.is_empty() { Ok(None) } else { parse_headers(&header_block).map(Some) };
        // JSON cannot carry a subject that is not UTF-8: the server writes U+FFFD in its place.
        let malformed = headers.is_err() || self.subject.contains(char::REPLACEMENT_CHARACTER);
        let message = LogMessage {
            seq: Seq::new(self.seq).unwrap_or(Seq::MAX),
            subject: self.subject,
            headers: headers.unwrap_or_else(|MalformedHeaders| None),
            payload: decode(&self.data)?.into(),
            received_ms: unix_ms(&self.time).ok_or_else(|| ApiError::Unreadable("no time".to_owned()))?,
        };
        Ok(RawMessage { message, header_block, malformed })
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct ConsumerInfo {
    pub ack_floor: Position,
    pub delivered: Position,
    #[serde(default)]
    pub num_ack_pending: u64,
    #[serde(default)]
    pub num_pending: u64,
    #[serde(default)]
    pub config: ConsumerConfig,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct ConsumerConfig {
    /// In nanoseconds.
    #[serde(default)]
    pub ack_wait: u64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Position {
    pub stream_seq: u64,
}

#[derive(Deserialize)]
struct StreamInfo {
    state: StreamState,
}

#[derive(Deserialize)]
struct StreamState {
    first_seq: u64,
    last_seq: u64,
}
