//! Appends to the stream so that nothing is lost, doubled or reordered, whatever fails on the way.
//!
//! One atomic batch at a time: JetStream accepts all of it or nothing, in its order, so after a
//! broken connection the same batch is sent again. A batch that contains a message JetStream
//! already has is refused as a whole (error 10201). Then we ask for each message by its id, with a
//! publish that can never be stored, and send those that are new as another batch. Publishing the
//! messages of such a batch one by one would be simpler, but would lose their order if the
//! connection broke with hundreds of them in flight.

use std::collections::HashSet;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::header::HeaderMap;
use async_nats::{Message, Subscriber};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use tokio::time::{Instant, sleep, timeout};

use crate::line::Outgoing;
use base::error::Fatal;
use jetstream::batch::BatchHeaders;
use jetstream::publish::{PublishError, ask_whether_remembered, err_code, read_ack, remembered};
use nats::connection::Connection;

/// The server lost part of the batch, has too many batches, is still busy with the same id, or is
/// electing a leader.
const TRANSIENT: [u64; 4] = [
    err_code::BATCH_INCOMPLETE,
    err_code::TOO_MANY_BATCHES,
    err_code::BUSY[0],
    err_code::BUSY[1],
];

/// After this the batch counts as lost and is sent again.
const ACK_TIMEOUT: Duration = Duration::from_secs(30);
/// How long we wait for a stream that has not accepted anything yet: stream-bootstrap may be
/// creating it. One that did accept messages is waited for like any other transient error.
const STREAM_TIMEOUT: Duration = Duration::from_secs(5);
/// A transient error that repeats for this long while we are connected is final.
const RETRY_FOR: Duration = Duration::from_secs(120);
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// How soon a missing permission is noticed; the server reports it beside the replies.
const POLL_PERMISSIONS: Duration = Duration::from_millis(250);

/// The outcome of a batch.
#[derive(Debug, Clone, Copy, Default)]
pub struct Appended {
    /// New in the stream.
    pub published: u64,
    /// In the stream already.
    pub known: u64,
}

/// Appends batch after batch.
pub struct Appender {
    connection: Connection,
    replies: Subscriber,
    inbox: String,
    attempt: u64,
    /// All of the last batch was in the stream already: look up the next one before it is sent.
    look_up_first: bool,
    /// The stream has accepted a batch.
    accepted: bool,
    print: Box<dyn Fn(&str)>,
}

/// Why an attempt did not succeed.
enum AppendError {
    Known,
    NoStream,
    Transient(String),
    Fatal(Fatal),
}

impl Appender {
    /// `print` shows the user a line while we wait for something.
    ///
    /// # Errors
    /// The connection is closed.
    pub async fn new(
        connection: Connection,
        print: impl Fn(&str) + 'static,
    ) -> Result<Appender, Fatal> {
        let inbox = connection.client().new_inbox();
        let replies = connection
            .client()
            .subscribe(format!("{inbox}.*.*"))
            .await
            .map_err(|_| Fatal::new("the connection to NATS is closed"))?;
        Ok(Appender {
            connection,
            replies,
            inbox,
            attempt: 0,
            look_up_first: false,
            accepted: false,
            print: Box::new(print),
        })
    }

    /// Appends what the stream does not have yet, in this order.
    ///
    /// # Errors
    /// Retrying does not help. The stream then has all of the new messages of `batch`, or none.
    pub async fn append(&mut self, mut batch: Vec<Outgoing>) -> Result<Appended, Fatal> {
        let whole = batch.len() as u64;
        let mut ids = HashSet::new();
        batch.retain(|message| ids.insert(message.message_id.as_str().to_owned()));
        let mut begun = Instant::now();
        let mut printed = false;
        let mut look_up = self.look_up_first;
        while !batch.is_empty() {
            let attempt = if look_up {
                self.unknown(&batch).await.map(Some)
            } else {
                self.commit(&batch).await.map(|()| None)
            };
            match attempt {
                Ok(Some(unknown)) => {
                    self.look_up_first = !unknown.contains(&true);
                    let mut unknown = unknown.into_iter();
                    batch.retain(|_| unknown.next().unwrap_or(true));
                    look_up = false;
                }
                Ok(None) => {
                    self.accepted = true;
                    break;
                }
                Err(AppendError::Known) => look_up = true,
                Err(AppendError::Fatal(fatal)) => return Err(fatal),
                Err(AppendError::NoStream)
                    if begun.elapsed()
                        > if self.accepted {
                            RETRY_FOR
                        } else {
                            STREAM_TIMEOUT
                        } =>
                {
                    return Err(Fatal::new(
                        "no stream accepts these messages: is stream-bootstrap running?",
                    ));
                }
                Err(AppendError::NoStream) => sleep(RETRY_PAUSE).await,
                Err(AppendError::Transient(why)) => {
                    if begun.elapsed() > RETRY_FOR {
                        return Err(Fatal::new(format!("giving up: {why}")));
                    }
                    if !printed {
                        (self.print)(&format!(
                            "{why}; waiting, and trying the same messages again"
                        ));
                        printed = true;
                    }
                    sleep(RETRY_PAUSE).await;
                    // Returns once connected, however long that takes; only connected time counts.
                    let away = Instant::now();
                    let _ = self.connection.client().flush().await;
                    begun += away.elapsed();
                }
            }
        }
        Ok(Appended {
            published: batch.len() as u64,
            known: whole - batch.len() as u64,
        })
    }

    /// Sends one atomic batch and waits for its acknowledgement.
    async fn commit(&mut self, batch: &[Outgoing]) -> Result<(), AppendError> {
        self.begin();
        let mut numbered = BatchHeaders::new(self.connection.client());
        let last = batch.len() - 1;
        for (index, message) in batch.iter().enumerate() {
            let mut headers = message.headers();
            if index == last {
                numbered.commit(&mut headers);
            } else {
                numbered.add(&mut headers);
            }
            // The first is answered, too: an error of the whole batch then arrives as itself and
            // not as "incomplete".
            let reply = if index == last {
                Some("commit")
            } else {
                (index == 0).then_some("first")
            };
            self.publish(&message.subject, reply, headers, message.payload.clone())
                .await?;
        }
        let deadline = Instant::now() + ACK_TIMEOUT;
        loop {
            let reply = self.next(deadline).await?;
            // An empty reply says that the message was received and is not stored yet.
            if !reply.payload.is_empty() || reply.status.is_some() {
                return Ok(read_ack(&reply).map(|_| ())?);
            }
        }
    }

    /// For each message, whether it is not in the stream.
    async fn unknown(&mut self, batch: &[Outgoing]) -> Result<Vec<bool>, AppendError> {
        self.begin();
        for (index, message) in batch.iter().enumerate() {
            let mut headers = message.headers();
            ask_whether_remembered(&mut headers);
            self.publish(
                &message.subject,
                Some(&index.to_string()),
                headers,
                Bytes::new(),
            )
            .await?;
        }
        let deadline = Instant::now() + ACK_TIMEOUT;
        let mut unknown = vec![None; batch.len()];
        let mut open = batch.len();
        while open > 0 {
            let reply = self.next(deadline).await?;
            let known = remembered(read_ack(&reply))?.is_some();
            let index = reply
                .subject
                .rsplit('.')
                .next()
                .and_then(|index| index.parse::<usize>().ok());
            if let Some(slot @ None) = index.and_then(|index| unknown.get_mut(index)) {
                *slot = Some(!known);
                open -= 1;
            }
        }
        Ok(unknown.into_iter().flatten().collect())
    }

    /// Begins a new attempt: replies to earlier ones and earlier disconnects no longer count.
    fn begin(&mut self) {
        self.attempt += 1;
        while self.connection.broken().now_or_never().is_some() {}
    }

    async fn publish(
        &mut self,
        subject: &str,
        reply: Option<&str>,
        headers: HeaderMap,
        payload: Bytes,
    ) -> Result<(), AppendError> {
        let client = self.connection.client();
        let sent = match reply {
            Some(reply) => {
                let reply = format!("{}.{}.{reply}", self.inbox, self.attempt);
                client
                    .publish_with_reply_and_headers(subject.to_owned(), reply, headers, payload)
                    .await
            }
            None => {
                client
                    .publish_with_headers(subject.to_owned(), headers, payload)
                    .await
            }
        };
        sent.map_err(|error| {
            AppendError::Fatal(Fatal::new(format!(
                "a message cannot be published: {error}"
            )))
        })
    }

    /// The next reply to this attempt.
    async fn next(&mut self, deadline: Instant) -> Result<Message, AppendError> {
        let prefix = format!("{}.{}.", self.inbox, self.attempt);
        loop {
            let reply = tokio::select! {
                reply = timeout(POLL_PERMISSIONS, self.replies.next()) => reply,
                () = self.connection.broken() => return Err(disconnected()),
            };
            match reply {
                Ok(Some(reply)) if reply.subject.starts_with(&prefix) => return Ok(reply),
                Ok(Some(_)) => {}
                Ok(None) => {
                    return Err(AppendError::Fatal(Fatal::new(
                        "the connection to NATS is closed",
                    )));
                }
                Err(_) => {
                    if let Some(violation) = self.connection.permission_violation() {
                        let line = format!(
                            "NATS refuses this user: {violation}; import as a trusted publisher \
                             (nats/accounts.conf)"
                        );
                        return Err(AppendError::Fatal(Fatal::new(line)));
                    }
                    if self.connection.client().connection_state() != State::Connected {
                        return Err(disconnected());
                    }
                    if Instant::now() > deadline {
                        return Err(AppendError::Transient(
                            "JetStream does not answer".to_owned(),
                        ));
                    }
                }
            }
        }
    }
}

impl From<PublishError> for AppendError {
    fn from(error: PublishError) -> AppendError {
        let (err_code, description) = match error {
            PublishError::NoStream => return AppendError::NoStream,
            PublishError::Unanswered(why) => return AppendError::Transient(why),
            PublishError::NotJetStream => {
                return AppendError::Fatal(Fatal::new(
                    "the reply is not JetStream's: another service listens on the stream's \
                     subjects",
                ));
            }
            PublishError::Refused {
                err_code,
                description,
            } => (err_code, description),
        };
        match err_code {
            err_code::DUPLICATE_IN_BATCH => AppendError::Known,
            err_code if TRANSIENT.contains(&err_code) => {
                AppendError::Transient(format!("JetStream: {description} ({err_code})"))
            }
            err_code if err_code::FULL.contains(&err_code) => {
                AppendError::Fatal(Fatal::new(format!(
                    "the stream is full ({description}, {err_code}): make room or raise max_bytes \
                     in \
             nats/streams, then import the same files again"
                )))
            }
            err_code::BATCHES_DISABLED => AppendError::Fatal(Fatal::new(
                "the stream does not allow atomic batches: let stream-bootstrap apply nats/streams",
            )),
            err_code => AppendError::Fatal(Fatal::new(format!(
                "JetStream refuses: {description} ({err_code})"
            ))),
        }
    }
}

fn disconnected() -> AppendError {
    AppendError::Transient("the connection to NATS broke".to_owned())
}
