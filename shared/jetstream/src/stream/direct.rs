//! Batched direct gets, and how a message nobody can parse is met among them.
//!
//! A stored message with malformed headers ends the connection of whoever receives it. What came
//! before it on the same connection is kept, so the message that follows is the suspect: it alone is
//! read through the JSON API, remembered, and the next batch begins behind it. The next reader stops
//! right before a message that is remembered. So one malformed message among thousands costs one
//! connection and one request, once.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use async_nats::StatusCode;
use futures::StreamExt;
use serde_json::json;
use tokio::time::{Instant, timeout, timeout_at};

use super::stored::unix_ms;
use super::{Limit, RawMessage, StreamError, StreamMessage, StreamReader};
use crate::api;
use base::seq::Seq;
use base::subject::matches;
use nats::connection::{ApiError, Connection, connect};

/// How long one direct get may take.
const DIRECT_TIMEOUT: std::time::Duration = std::time::Duration::from_millis(1_500);
/// Connections one read may lose; after that the rest comes message by message.
const MAX_LOST: usize = 16;
/// Malformed messages remembered; the oldest are forgotten first.
const MAX_REMEMBERED: usize = 10_000;
/// What one direct get may bring.
const MAX_BATCH: usize = 1_000;
const MAX_BATCH_BYTES: usize = 8 << 20;
/// The status that ends a batch.
const END_OF_BATCH: u16 = 204;

/// Consecutive messages of a subject, malformed ones included.
#[derive(Default)]
pub(super) struct Read {
    /// Oldest first; whether nobody can read its headers.
    pub messages: Vec<(StreamMessage, bool)>,
    /// Nothing of the subject followed when it was read.
    pub complete: bool,
}

#[derive(Default)]
struct Batch {
    messages: Vec<StreamMessage>,
    /// How many of the subject follow.
    pending: usize,
    /// The connection was lost before the batch ended.
    lost: Option<StreamError>,
}

/// Malformed messages that were met: where, and under which subject.
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
        let (mut next, mut bytes, mut good, mut lost) = (from, 0, 0, 0);
        while good == 0 || (good < limit.messages && bytes < limit.bytes) {
            limit.check()?;
            let wanted = Limit {
                messages: limit.messages.max(1) - good,
                bytes: limit.bytes.saturating_sub(bytes),
                ..limit
            };
            let suspect = self.malformed_from(subject, next);
            let batch = match suspect {
                _ if lost >= MAX_LOST => 0,
                Some(at) if at == next => 0,
                Some(at) => self
                    .between(subject, next, at, limit)
                    .await?
                    .min(wanted.messages),
                None => wanted.messages,
            };
            let mut part = Batch::default();
            if batch > 0 {
                part = self
                    .get(
                        subject,
                        next,
                        Limit {
                            messages: batch,
                            ..wanted
                        },
                        true,
                    )
                    .await?;
                if let Some(error) = part.lost.take() {
                    lost += 1;
                    self.drop_direct(&error).await;
                } else if part.messages.is_empty() || (part.pending == 0 && suspect.is_none()) {
                    // Nothing follows; before a malformed message, look at what does.
                    read.complete = suspect.is_none();
                } else {
                    good += part.messages.len();
                    next = read.extend(part.messages, &mut bytes).unwrap_or(next);
                    continue;
                }
            }
            good += part.messages.len();
            next = read.extend(part.messages, &mut bytes).unwrap_or(next);
            if read.complete {
                break;
            }
            let found = self.next(subject, next).await?;
            self.remember(subject, next, found.as_ref());
            let Some(raw) = found else {
                read.complete = true;
                break;
            };
            good += usize::from(!raw.malformed);
            bytes += raw.header_block.len() + raw.message.payload.len();
            next = raw.message.seq.next();
            read.messages.push((raw.message, raw.malformed));
        }
        Ok(read)
    }

    /// About how many messages of `subject` stand in `from..before`; fewer when the stream grows
    /// meanwhile, so whoever reads so many does not reach `before`.
    pub(super) async fn between(
        &self,
        subject: &str,
        from: Seq,
        before: Seq,
        limit: Limit,
    ) -> Result<usize, StreamError> {
        // The order matters: what is appended between the two questions is in the second count only.
        let all = self.count(subject, from, limit).await?;
        let beyond = self.count(subject, before, limit).await?;
        Ok(all.saturating_sub(beyond))
    }

    /// How many messages of `subject` the stream holds from `from` on. No header is sent, so none
    /// can be malformed. nats-server 2.15 counts the message it sends without headers among those
    /// that follow; one that does not makes this one too low, which harms nobody.
    async fn count(&self, subject: &str, from: Seq, limit: Limit) -> Result<usize, StreamError> {
        if from == Seq::MAX {
            return Ok(0);
        }
        let mut batch = self
            .get(
                subject,
                from,
                Limit {
                    messages: 1,
                    bytes: 1,
                    ..limit
                },
                false,
            )
            .await?;
        if let Some(error) = batch.lost.take() {
            self.drop_direct(&error).await;
            batch = self
                .get(
                    subject,
                    from,
                    Limit {
                        messages: 1,
                        bytes: 1,
                        ..limit
                    },
                    false,
                )
                .await?;
        }
        match batch.lost {
            Some(error) => Err(error),
            None => Ok(batch.pending),
        }
    }

    /// One batched direct get: the messages of `subject` from `from` on, ended by 204, or 404 at once.
    /// Without `headers` nothing but the number of those that follow.
    async fn get(
        &self,
        subject: &str,
        from: Seq,
        limit: Limit,
        headers: bool,
    ) -> Result<Batch, StreamError> {
        const GONE: StreamError = StreamError::Direct("the connection is gone");
        const SILENT: StreamError = StreamError::Direct("no answer in time");
        let mut connection = self.direct().await?;
        let client = connection.client().clone();
        let deadline = limit.until.min(Instant::now() + DIRECT_TIMEOUT);
        let mut batch = Batch::default();
        let inbox = client.new_inbox();
        let Ok(mut replies) = client.subscribe(inbox.clone()).await else {
            return Ok(Batch {
                lost: Some(GONE),
                ..batch
            });
        };
        let request = json!({
            "seq": from.get().max(1), "next_by_subj": subject, "no_hdr": !headers,
            "batch": limit.messages.clamp(1, MAX_BATCH), "max_bytes": limit.bytes.clamp(1, MAX_BATCH_BYTES),
        });
        if client
            .publish_with_reply(
                api::direct_get(self.names.stream),
                inbox,
                request.to_string().into(),
            )
            .await
            .is_err()
        {
            return Ok(Batch {
                lost: Some(GONE),
                ..batch
            });
        }
        loop {
            // What came before the connection broke is taken first.
            let reply = tokio::select! {
                biased;
                reply = timeout_at(deadline, replies.next()) => match reply {
                    Ok(Some(reply)) => reply,
                    Ok(None) => return Ok(Batch { lost: Some(GONE), ..batch }),
                    Err(_) => return Ok(Batch { lost: Some(SILENT), ..batch }),
                },
                () = connection.broken() => return Ok(Batch { lost: Some(GONE), ..batch }),
            };
            let number = |name: &str| {
                reply
                    .headers
                    .as_ref()?
                    .get(name)?
                    .as_str()
                    .parse::<u64>()
                    .ok()
            };
            match reply.status {
                None if headers => batch.messages.push(direct_message(reply)?),
                // It has no sequence either, and was only to be counted.
                None => {}
                Some(StatusCode::NOT_FOUND) => return Ok(batch),
                Some(StatusCode::NO_RESPONDERS) => {
                    return Err(ApiError::Away("JetStream is not there").into());
                }
                Some(status) if status.as_u16() == END_OF_BATCH => {
                    batch.pending = usize::try_from(number("Nats-Num-Pending").unwrap_or(0))
                        .unwrap_or(usize::MAX);
                    let sent = number("Nats-Last-Sequence").unwrap_or(0);
                    if headers
                        && batch
                            .messages
                            .last()
                            .is_some_and(|message| message.seq.get() != sent)
                    {
                        return Err(StreamError::Direct("part of the answer was lost"));
                    }
                    return Ok(batch);
                }
                Some(_) => return Err(StreamError::Direct("the server refused the request")),
            }
        }
    }

    /// The connection for direct gets, made when first needed and again after it broke.
    async fn direct(&self) -> Result<Connection, StreamError> {
        let mut direct = self.direct.lock().await;
        if let Some(connection) = &*direct {
            return Ok(connection.clone());
        }
        let name = format!("{} (log)", self.client_name);
        match timeout(DIRECT_TIMEOUT, connect(&self.settings, &name, &self.stop)).await {
            Ok(Ok(connection)) => Ok(direct.insert(connection).clone()),
            Ok(Err(_)) | Err(_) => Err(StreamError::Direct("no connection")),
        }
    }

    async fn drop_direct(&self, error: &StreamError) {
        tracing::debug!(%error, "the connection for direct gets was lost; the message that follows is read through the JSON API");
        self.direct.lock().await.take();
    }

    /// Where the first malformed message of `subject` stands that is known from `from` on.
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

    /// Notes the first message of `subject` from `asked` on: malformed or not, none stands before it.
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
            tracing::warn!(seq = %message.seq, "a message whose headers no client can read: readers pass it over");
            known.insert(message.seq, message.subject.clone());
        }
        while known.len() > MAX_REMEMBERED {
            known.pop_first();
        }
    }

    /// What is stored through has been moved to the dead letters, and out of the stream.
    pub(super) fn forget_malformed(&self, through: Seq) {
        let mut known = self
            .malformed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *known = known.split_off(&through.next());
    }
}

impl Read {
    /// Appends `messages`, and adds what they weigh; what follows the last of them.
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
    const UNREADABLE: StreamError = StreamError::Direct("an answer without the log's headers");
    let headers = reply.headers.ok_or(UNREADABLE)?;
    // The server appends its own headers behind the stored ones, which may hold the same names: the last is the server's.
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
        received_ms: unix_ms(&own("Nats-Time-Stamp")?).ok_or(UNREADABLE)?,
        payload: reply.payload,
        headers: Some(headers),
    })
}
