//! Appending to the log so that nothing is lost, doubled or reordered, whatever fails on the way.
//!
//! One atomic batch at a time: JetStream takes all of it or nothing, in its order, so a connection that breaks in
//! the middle leaves no gap and the same batch is simply sent again. A batch with a message the log already knows is
//! refused as a whole (error 10201). Then each message is asked for by its id alone, with a question that can never
//! store anything, and the unknown ones make a new batch. Publishing the messages of such a batch one by one would
//! be simpler, and would lose their order when the connection breaks with hundreds of them under way.

use std::collections::HashSet;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::header::{HeaderMap, HeaderValue};
use async_nats::{Message, StatusCode, Subscriber};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use tokio::time::{Instant, sleep, timeout};

use crate::line::Outgoing;
use base::error::Fatal;
use jetstream::append::{PublishAck, PublishError};
use nats::connection::Connection;

const BATCH_ID: &str = "Nats-Batch-Id";
const BATCH_SEQUENCE: &str = "Nats-Batch-Sequence";
const BATCH_COMMIT: &str = "Nats-Batch-Commit";
const EXPECTED_LAST_ID: &str = "Nats-Expected-Last-Msg-Id";
/// No message has this id. The server looks whether it knows a message's id before it looks at what is expected, so
/// a message that expects this is answered "duplicate" or refused, and never stored.
const NEVER: &str = "import-asks-whether-it-is-there";

/// `err_code`s of JetStream that decide what comes next.
mod code {
    pub const KNOWN_MESSAGE: u64 = 10_201;
    pub const NOT_EXPECTED: u64 = 10_070;
    /// The server lost part of the batch, has too many at once, is still busy with the same id, or is electing a leader.
    pub const PASSING: [u64; 4] = [10_176, 10_210, 10_158, 10_008];
    /// The stream's budget is spent; the account's; the server's.
    pub const FULL: [u64; 4] = [10_077, 10_002, 10_047, 10_023];
    pub const NO_BATCHES: u64 = 10_174;
}

/// An acknowledgement that takes longer is not coming.
const ACK_TIMEOUT: Duration = Duration::from_secs(30);
/// A stream nobody has seen may be just being made; after this it is missing. One that took messages comes back.
const STREAM_PATIENCE: Duration = Duration::from_secs(5);
/// Trouble that repeats for this long while the connection holds will not pass.
const PATIENCE: Duration = Duration::from_secs(120);
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// How soon a missing permission is noticed; it arrives beside the answers.
const OBJECTION_INTERVAL: Duration = Duration::from_millis(250);

/// What became of a batch.
#[derive(Debug, Clone, Copy, Default)]
pub struct Appended {
    /// New in the log.
    pub published: u64,
    /// In the log already.
    pub known: u64,
}

/// Appends batch after batch.
pub struct Appender {
    connection: Connection,
    replies: Subscriber,
    inbox: String,
    attempt: u64,
    /// The last batch was known: ask first from now on, rather than send what is going to be refused.
    ask_first: bool,
    /// The stream has been seen at work.
    taken: bool,
    tell: Box<dyn Fn(&str)>,
}

/// Why an attempt did not succeed.
enum Trouble {
    Known,
    NoStream,
    Passing(String),
    Fatal(Fatal),
}

impl Appender {
    /// `tell` shows the user a line while something is being waited for.
    ///
    /// # Errors
    /// The connection is closed.
    pub async fn new(
        connection: Connection,
        tell: impl Fn(&str) + 'static,
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
            ask_first: false,
            taken: false,
            tell: Box::new(tell),
        })
    }

    /// Appends what the log does not know yet, in this order, and returns when it has it all.
    ///
    /// # Errors
    /// What waiting will not mend. Then the log has all that was new of `batch`, or nothing of it.
    pub async fn append(&mut self, mut batch: Vec<Outgoing>) -> Result<Appended, Fatal> {
        let whole = batch.len() as u64;
        let mut ids = HashSet::new();
        batch.retain(|message| ids.insert(message.message_id.as_str().to_owned()));
        let mut begun = Instant::now();
        let mut told = false;
        let mut ask = self.ask_first;
        while !batch.is_empty() {
            let attempt = if ask {
                self.unknown(&batch).await.map(Some)
            } else {
                self.commit(&batch).await.map(|()| None)
            };
            match attempt {
                Ok(Some(unknown)) => {
                    self.ask_first = !unknown.contains(&true);
                    let mut unknown = unknown.into_iter();
                    batch.retain(|_| unknown.next().unwrap_or(true));
                    ask = false;
                }
                Ok(None) => {
                    self.taken = true;
                    break;
                }
                Err(Trouble::Known) => ask = true,
                Err(Trouble::Fatal(fatal)) => return Err(fatal),
                Err(Trouble::NoStream)
                    if begun.elapsed()
                        > if self.taken {
                            PATIENCE
                        } else {
                            STREAM_PATIENCE
                        } =>
                {
                    return Err(Fatal::new(
                        "no stream takes these messages: is stream-bootstrap running?",
                    ));
                }
                Err(Trouble::NoStream) => sleep(RETRY_PAUSE).await,
                Err(Trouble::Passing(why)) => {
                    if begun.elapsed() > PATIENCE {
                        return Err(Fatal::new(format!("giving up: {why}")));
                    }
                    if !told {
                        (self.tell)(&format!(
                            "{why}; waiting, and trying the same messages again"
                        ));
                        told = true;
                    }
                    sleep(RETRY_PAUSE).await;
                    // Returns once connected, however long that takes; patience is for trouble while connected.
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
    async fn commit(&mut self, batch: &[Outgoing]) -> Result<(), Trouble> {
        self.begin();
        let id: HeaderValue = value(format!(
            "{}-{}",
            self.inbox.rsplit('.').next().unwrap_or_default(),
            self.attempt
        ));
        let last = batch.len() - 1;
        for (index, message) in batch.iter().enumerate() {
            let mut headers = message.headers();
            headers.insert(BATCH_ID, id.clone());
            headers.insert(BATCH_SEQUENCE, value(index + 1));
            if index == last {
                headers.insert(BATCH_COMMIT, value(1));
            }
            // The first is answered too: what is wrong with all of them is then heard as itself, not as "incomplete".
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
            // A batch's other messages are answered with nothing: taken, not yet stored.
            if !reply.payload.is_empty() || reply.status.is_some() {
                return answer(&reply).map(|_| ());
            }
        }
    }

    /// For each message, whether the log does not know it.
    async fn unknown(&mut self, batch: &[Outgoing]) -> Result<Vec<bool>, Trouble> {
        self.begin();
        for (index, message) in batch.iter().enumerate() {
            let mut headers = message.headers();
            headers.insert(EXPECTED_LAST_ID, value(NEVER));
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
            let known = match answer(&reply) {
                Ok(ack) => ack.duplicate,
                Err(Trouble::Known) => true,
                Err(other) => return Err(other),
            };
            let index = reply
                .subject
                .rsplit('.')
                .next()
                .and_then(|index| index.parse::<usize>().ok());
            if let Some(place @ None) = index.and_then(|index| unknown.get_mut(index)) {
                *place = Some(!known);
                open -= 1;
            }
        }
        Ok(unknown.into_iter().flatten().collect())
    }

    /// A new attempt: answers to earlier ones are no longer ours, and what broke before broke before.
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
    ) -> Result<(), Trouble> {
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
            Trouble::Fatal(Fatal::new(format!(
                "a message cannot be published: {error}"
            )))
        })
    }

    /// The next answer to this attempt.
    async fn next(&mut self, deadline: Instant) -> Result<Message, Trouble> {
        let prefix = format!("{}.{}.", self.inbox, self.attempt);
        loop {
            let reply = tokio::select! {
                reply = timeout(OBJECTION_INTERVAL, self.replies.next()) => reply,
                () = self.connection.broken() => return Err(Trouble::Passing("the connection to NATS broke".to_owned())),
            };
            match reply {
                Ok(Some(reply)) if reply.subject.starts_with(&prefix) => return Ok(reply),
                Ok(Some(_)) => {}
                Ok(None) => {
                    return Err(Trouble::Fatal(Fatal::new(
                        "the connection to NATS is closed",
                    )));
                }
                Err(_) => {
                    if let Some(objection) = self
                        .connection
                        .refused()
                        .filter(|objection| objection.contains("ermissions"))
                    {
                        let line = format!(
                            "NATS refuses this user: {objection}; import as a trusted publisher (nats/accounts.conf)"
                        );
                        return Err(Trouble::Fatal(Fatal::new(line)));
                    }
                    if self.connection.client().connection_state() != State::Connected {
                        return Err(Trouble::Passing("the connection to NATS broke".to_owned()));
                    }
                    if Instant::now() > deadline {
                        return Err(Trouble::Passing("JetStream does not answer".to_owned()));
                    }
                }
            }
        }
    }
}

/// Of digits, letters and dashes, which a header can hold; anything else makes an empty one.
fn value(text: impl ToString) -> HeaderValue {
    text.to_string().parse().unwrap_or_default()
}

/// Reads JetStream's answer; one that refuses what was only asked for is no trouble.
fn answer(reply: &Message) -> Result<PublishAck, Trouble> {
    if reply.status == Some(StatusCode::NO_RESPONDERS) {
        return Err(Trouble::NoStream);
    }
    let ack: PublishAck = serde_json::from_slice(&reply.payload).map_err(|_| {
        Trouble::Fatal(Fatal::new(
            "what answers is not JetStream: another service listens on the log's subjects",
        ))
    })?;
    let Some(PublishError {
        err_code,
        description,
    }) = &ack.error
    else {
        return Ok(ack);
    };
    Err(match *err_code {
        code::NOT_EXPECTED => return Ok(ack),
        code::KNOWN_MESSAGE => Trouble::Known,
        err_code if code::PASSING.contains(&err_code) => {
            Trouble::Passing(format!("JetStream says: {description} ({err_code})"))
        }
        err_code if code::FULL.contains(&err_code) => Trouble::Fatal(Fatal::new(format!(
            "the log is full ({description}, {err_code}): make room or raise max_bytes in nats/streams, then import the same again"
        ))),
        code::NO_BATCHES => Trouble::Fatal(Fatal::new(
            "the stream takes no atomic batches: let stream-bootstrap apply nats/streams",
        )),
        err_code => Trouble::Fatal(Fatal::new(format!(
            "JetStream refuses: {description} ({err_code})"
        ))),
    })
}
