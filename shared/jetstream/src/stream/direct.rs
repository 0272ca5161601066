//! Batched direct gets, and malformed messages among them.
//!
//! A stored message with malformed headers ends the connection of the client that receives it. The
//! messages that arrived before it are kept, so the next one is the suspect: it is read through the
//! JSON API, its sequence is remembered, and the next batch begins after it. The next read stops
//! right before a remembered message. So one malformed message among thousands costs one connection
//! and one request, once.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Duration;

use async_nats::{StatusCode, Subscriber};
use futures::StreamExt;
use serde_json::json;
use tokio::time::{Instant, timeout, timeout_at};

use super::{Limit, RawMessage, StreamError, StreamMessage, StreamReader};
use crate::api;
use base::seq::Seq;
use base::subject::matches;
use base::time::parse_rfc3339_ms;
use nats::connection::{ApiError, Connection, connect};

/// How long one direct get may take.
const DIRECT_TIMEOUT: Duration = Duration::from_millis(1_500);
/// A read that has lost so many connections reads the rest message by message.
const MAX_LOST: usize = 16;
/// The most malformed messages remembered; the oldest are forgotten first.
const MAX_REMEMBERED: usize = 10_000;
/// The most that one direct get may bring.
const MAX_BATCH: usize = 1_000;
const MAX_BATCH_BYTES: usize = 8 << 20;
/// The status that ends a batch.
const END_OF_BATCH: u16 = 204;

const GONE: StreamError = StreamError::Direct("the connection is gone");
const SILENT: StreamError = StreamError::Direct("no answer in time");

/// Consecutive messages of a subject, malformed ones included.
#[derive(Default)]
pub(super) struct Read {
    /// Oldest first, each with whether it is malformed.
    pub messages: Vec<(StreamMessage, bool)>,
    /// The subject had no more messages when it was read.
    pub complete: bool,
}

#[derive(Default)]
struct Batch {
    messages: Vec<StreamMessage>,
    /// How many messages of the subject follow.
    pending: usize,
    /// The connection was lost before the batch ended.
    lost: Option<StreamError>,
}

impl Batch {
    /// Checks the batch against the reply that ends it.
    fn ended(mut self, end: &async_nats::Message) -> Result<Batch, StreamError> {
        let number = |name: &str| {
            let value = end.headers.as_ref()?.get(name)?;
            value.as_str().parse::<u64>().ok()
        };
        let pending = number("Nats-Num-Pending").unwrap_or(0);
        self.pending = usize::try_from(pending).unwrap_or(usize::MAX);
        let sent = number("Nats-Last-Sequence").unwrap_or(0);
        match self.messages.last() {
            Some(last) if last.seq.get() != sent => {
                Err(StreamError::Direct("part of the answer was lost"))
            }
            _ => Ok(self),
        }
    }
}

/// Malformed messages found so far: sequence and subject.
pub(super) type Malformed = std::sync::Mutex<BTreeMap<Seq, String>>;

impl StreamReader {
    /// The oldest messages of `subject` from `from` on, within `limit`; at least one well-formed
    /// message if there is any.
    pub(super) async fn read(
        &self,
        subject: &str,
        from: Seq,
        limit: Limit,
    ) -> Result<Read, StreamError> {
        let mut read = Read::default();
        let mut next = from;
        let mut bytes = 0;
        let mut well_formed = 0;
        let mut lost = 0;
        while well_formed == 0 || (well_formed < limit.messages && bytes < limit.bytes) {
            limit.check_time()?;
            let mut wanted = Limit {
                messages: limit.messages.max(1) - well_formed,
                bytes: limit.bytes.saturating_sub(bytes),
                ..limit
            };
            let suspect = self.malformed_from(subject, next);
            wanted.messages = match suspect {
                _ if lost >= MAX_LOST => 0,
                Some(at) if at == next => 0,
                Some(at) => {
                    let before = self.between(subject, next, at, limit).await?;
                    before.min(wanted.messages)
                }
                None => wanted.messages,
            };
            let mut batch = Batch::default();
            if wanted.messages > 0 {
                batch = self.get_direct(subject, next, wanted, true).await?;
                if let Some(error) = batch.lost.take() {
                    lost += 1;
                    self.drop_direct(&error).await;
                } else if batch.messages.is_empty() || (batch.pending == 0 && suspect.is_none()) {
                    // Nothing follows, unless it is behind a malformed message.
                    read.complete = suspect.is_none();
                } else {
                    well_formed += batch.messages.len();
                    next = read.extend(batch.messages, &mut bytes).unwrap_or(next);
                    continue;
                }
            }
            well_formed += batch.messages.len();
            next = read.extend(batch.messages, &mut bytes).unwrap_or(next);
            if read.complete {
                break;
            }
            let found = self.next(subject, next).await?;
            self.remember(subject, next, found.as_ref());
            let Some(raw) = found else {
                read.complete = true;
                break;
            };
            well_formed += usize::from(!raw.malformed);
            bytes += raw.header_block.len() + raw.message.payload.len();
            next = raw.message.seq.next();
            read.messages.push((raw.message, raw.malformed));
        }
        Ok(read)
    }

    /// About how many messages of `subject` are in `from..before`. While the stream grows the
    /// number is too low, so reading so many messages never reaches `before`.
    pub(super) async fn between(
        &self,
        subject: &str,
        from: Seq,
        before: Seq,
        limit: Limit,
    ) -> Result<usize, StreamError> {
        // In this order: a message appended between the two requests is in the second count only.
        let all = self.count(subject, from, limit).await?;
        let beyond = self.count(subject, before, limit).await?;
        Ok(all.saturating_sub(beyond))
    }

    /// How many messages of `subject` the stream holds from `from` on. The reply has no stored
    /// headers, so it cannot be malformed. nats-server 2.15 includes the message it sends in the
    /// number of those that follow; with a server that does not, the count is one too low, which
    /// does no harm.
    async fn count(&self, subject: &str, from: Seq, limit: Limit) -> Result<usize, StreamError> {
        if from == Seq::MAX {
            return Ok(0);
        }
        let one = Limit {
            messages: 1,
            bytes: 1,
            ..limit
        };
        let mut batch = self.get_direct(subject, from, one, false).await?;
        if let Some(error) = batch.lost.take() {
            self.drop_direct(&error).await;
            batch = self.get_direct(subject, from, one, false).await?;
        }
        match batch.lost {
            Some(error) => Err(error),
            None => Ok(batch.pending),
        }
    }

    /// One batched direct get: the messages of `subject` from `from` on, ended by status 204, or by
    /// 404 if there are none. Without `headers` it only counts the messages that follow.
    async fn get_direct(
        &self,
        subject: &str,
        from: Seq,
        limit: Limit,
        headers: bool,
    ) -> Result<Batch, StreamError> {
        let mut connection = self.direct().await?;
        let deadline = limit.until.min(Instant::now() + DIRECT_TIMEOUT);
        let mut batch = Batch::default();
        let request = json!({
            "seq": from.get().max(1),
            "next_by_subj": subject,
            "no_hdr": !headers,
            "batch": limit.messages.clamp(1, MAX_BATCH),
            "max_bytes": limit.bytes.clamp(1, MAX_BATCH_BYTES),
        });
        let Some(mut replies) = self.request_direct(&connection, &request).await else {
            batch.lost = Some(GONE);
            return Ok(batch);
        };
        loop {
            // Biased: what arrived before the connection broke comes first.
            let reply = tokio::select! {
                biased;
                reply = timeout_at(deadline, replies.next()) => match reply {
                    Ok(Some(reply)) => reply,
                    Ok(None) => return Ok(Batch { lost: Some(GONE), ..batch }),
                    Err(_) => return Ok(Batch { lost: Some(SILENT), ..batch }),
                },
                () = connection.broken() => return Ok(Batch { lost: Some(GONE), ..batch }),
            };
            match reply.status {
                None if headers => batch.messages.push(direct_message(reply)?),
                // Without headers it has no sequence either; it only had to be counted.
                None => {}
                Some(StatusCode::NOT_FOUND) => return Ok(batch),
                Some(StatusCode::NO_RESPONDERS) => {
                    return Err(ApiError::Away("JetStream is not there").into());
                }
                Some(status) if status.as_u16() == END_OF_BATCH => {
                    return batch.ended(&reply);
                }
                Some(_) => return Err(StreamError::Direct("the server refused the request")),
            }
        }
    }

    /// Sends a direct get; `None` when the connection is gone.
    async fn request_direct(
        &self,
        connection: &Connection,
        request: &serde_json::Value,
    ) -> Option<Subscriber> {
        let client = connection.client();
        let inbox = client.new_inbox();
        let replies = client.subscribe(inbox.clone()).await.ok()?;
        let subject = api::direct_get(self.names.stream);
        client
            .publish_with_reply(subject, inbox, request.to_string().into())
            .await
            .ok()?;
        Some(replies)
    }

    /// The connection for direct gets: opened when first needed, and again after it broke.
    async fn direct(&self) -> Result<Connection, StreamError> {
        let mut direct = self.direct.lock().await;
        if let Some(connection) = &*direct {
            return Ok(connection.clone());
        }
        let name = format!("{} (direct gets)", self.client_name);
        match timeout(DIRECT_TIMEOUT, connect(&self.settings, &name, &self.stop)).await {
            Ok(Ok(connection)) => Ok(direct.insert(connection).clone()),
            Ok(Err(_)) | Err(_) => Err(StreamError::Direct("no connection")),
        }
    }

    async fn drop_direct(&self, error: &StreamError) {
        tracing::debug!(
            %error,
            "the connection for direct gets was lost; the next message is read through the JSON API"
        );
        self.direct.lock().await.take();
    }

    /// The sequence of the first malformed message of `subject` from `from` on, if one is
    /// remembered.
    fn malformed_from(&self, subject: &str, from: Seq) -> Option<Seq> {
        let malformed = self
            .malformed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        malformed
            .range(from..)
            .find(|(_, of)| matches(subject, of))
            .map(|(seq, _)| *seq)
    }

    /// Remembers what the first message of `subject` from `asked` on is: if it is malformed, its
    /// sequence; in any case that no malformed one is before it.
    fn remember(&self, subject: &str, asked: Seq, found: Option<&RawMessage>) {
        let mut known = self
            .malformed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let through = found.map_or(Seq::MAX, |raw| raw.message.seq);
        known.retain(|seq, of| *seq < asked || *seq > through || !matches(subject, of));
        if let Some(RawMessage {
            message,
            malformed: true,
            ..
        }) = found
        {
            tracing::warn!(
                seq = %message.seq,
                "the stream holds a message whose headers no client can parse; reads skip it until \
                 the consumer has removed it"
            );
            known.insert(message.seq, message.subject.clone());
        }
        while known.len() > MAX_REMEMBERED {
            known.pop_first();
        }
    }

    /// Forgets what is acknowledged: such messages have been removed from the stream.
    pub(super) fn forget_malformed(&self, through: Seq) {
        let mut known = self
            .malformed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *known = known.split_off(&through.next());
    }
}

impl Read {
    /// Appends `messages` and adds their size to `bytes`; the sequence after the last of them.
    fn extend(&mut self, messages: Vec<StreamMessage>, bytes: &mut usize) -> Option<Seq> {
        *bytes += messages
            .iter()
            .map(|message| message.payload.len())
            .sum::<usize>();
        let next = messages.last().map(|last| last.seq.next());
        self.messages
            .extend(messages.into_iter().map(|message| (message, false)));
        next
    }
}

fn direct_message(reply: async_nats::Message) -> Result<StreamMessage, StreamError> {
    const UNREADABLE: StreamError = StreamError::Direct("an answer without the stream's headers");
    let headers = reply.headers.ok_or(UNREADABLE)?;
    // The server adds its headers after the stored ones, which may have the same names: the last
    // value is the server's.
    let own = |name: &str| {
        headers
            .get_all(name)
            .last()
            .map(|value| value.as_str().to_owned())
            .ok_or(UNREADABLE)
    };
    Ok(StreamMessage {
        seq: own("Nats-Sequence")?
            .parse()
            .ok()
            .and_then(Seq::new)
            .ok_or(UNREADABLE)?,
        subject: own("Nats-Subject")?,
        received_ms: parse_rfc3339_ms(&own("Nats-Time-Stamp")?).ok_or(UNREADABLE)?,
        payload: reply.payload,
        headers: Some(headers),
    })
}
