//! The NATS protocol by hand, for what a well-behaved client refuses to send.

use std::collections::VecDeque;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::NatsServer;

/// How long the server may take to answer PING.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A connection that sends exactly the bytes it is given: malformed headers, odd subjects, broken
/// protocol.
///
/// Nothing is checked, and nothing happens in the background: what the server sends is read by
/// [`flush`](Self::flush), [`next`](Self::next) and [`request`](Self::request), which also answer
/// its PINGs.
pub struct RawClient {
    connection: BufReader<TcpStream>,
    user: String,
    subscriptions: u32,
    received: VecDeque<RawMessage>,
    errors: Vec<String>,
    pongs_awaited: usize,
}

/// A message as it came over the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawMessage {
    /// The subject.
    pub subject: String,
    /// The reply subject, if there is one.
    pub reply: Option<String>,
    /// The header block with its first line `NATS/1.0…` and its empty last line; empty without
    /// headers.
    pub headers: Vec<u8>,
    /// The payload.
    pub payload: Vec<u8>,
}

impl RawClient {
    /// Connects as a user of `nats/accounts.conf`.
    ///
    /// # Panics
    ///
    /// When the server cannot be reached or refuses the user.
    pub async fn connect(server: &NatsServer, user: &str) -> Self {
        Self::connect_with(server, user, json!({})).await
    }

    /// Like [`connect`](Self::connect), with further fields of CONNECT, an object.
    ///
    /// # Panics
    ///
    /// As [`connect`](Self::connect).
    pub async fn connect_with(server: &NatsServer, user: &str, fields: serde_json::Value) -> Self {
        let connection = TcpStream::connect(("127.0.0.1", server.port()))
            .await
            .expect("nats-server listens");
        connection.set_nodelay(true).expect("a TCP connection");
        let mut client = Self {
            connection: BufReader::new(connection),
            user: user.to_owned(),
            subscriptions: 0,
            received: VecDeque::new(),
            errors: Vec::new(),
            pongs_awaited: 0,
        };
        let mut hello = json!({
            "verbose": false, "pedantic": false, "headers": true, "no_responders": true,
            "echo": true, "protocol": 1, "lang": "raw", "version": "0", "name": "raw",
            "user": user, "pass": server.password(user),
        });
        for (name, value) in fields.as_object().into_iter().flatten() {
            hello[name] = value.clone();
        }
        client.send(format!("CONNECT {hello}\r\n").as_bytes()).await;
        client
            .flush()
            .await
            .unwrap_or_else(|error| panic!("{user} cannot connect to nats-server: {error}"));
        client
    }

    /// Sends bytes as they are, protocol line, line ends and all. That the server closed the
    /// connection shows at the next [`flush`](Self::flush).
    pub async fn send(&mut self, bytes: &[u8]) {
        _ = self.connection.write_all(bytes).await;
    }

    /// Publishes: `PUB`, or with `headers` `HPUB`. `headers` is the whole block, from
    /// `NATS/1.0\r\n` to the empty line, and is sent as it is. Nothing is confirmed; see
    /// [`flush`](Self::flush).
    pub async fn publish_raw(
        &mut self,
        subject: &str,
        reply: Option<&str>,
        headers: Option<&[u8]>,
        payload: &[u8],
    ) {
        let reply = reply.map(|reply| format!(" {reply}")).unwrap_or_default();
        let headers_bytes = headers.map_or(0, <[u8]>::len);
        let total_bytes = headers_bytes + payload.len();
        let line = match headers {
            Some(_) => format!("HPUB {subject}{reply} {headers_bytes} {total_bytes}\r\n"),
            None => format!("PUB {subject}{reply} {total_bytes}\r\n"),
        };
        self.send(
            &[
                line.as_bytes(),
                headers.unwrap_or_default(),
                payload,
                b"\r\n",
            ]
            .concat(),
        )
        .await;
    }

    /// Subscribes; a wildcard may be used, and `subject queue` for a queue group. Refusals show at
    /// the next [`flush`](Self::flush).
    pub async fn subscribe(&mut self, subject: &str) {
        self.subscriptions += 1;
        self.send(format!("SUB {subject} {}\r\n", self.subscriptions).as_bytes())
            .await;
    }

    /// A new subject below this user's private inbox prefix.
    pub fn inbox(&mut self) -> String {
        self.subscriptions += 1;
        format!("_INBOX.{}.raw.{}", self.user, self.subscriptions)
    }

    /// Waits until the server has taken everything sent so far.
    ///
    /// # Errors
    ///
    /// What it complained about since the last time (`-ERR` lines, one per line), and `connection
    /// closed` when it has hung up.
    pub async fn flush(&mut self) -> Result<(), String> {
        self.pongs_awaited += 1;
        self.send(b"PING\r\n").await;
        let answered = timeout(ANSWER_WITHIN, async {
            while self.pongs_awaited > 0 && self.read().await.is_some() {}
        });
        if answered.await.is_err() {
            self.errors
                .push(format!("no answer to PING within {ANSWER_WITHIN:?}"));
        }
        if self.pongs_awaited > 0 {
            self.pongs_awaited = 0;
            self.errors.push("connection closed".to_owned());
        }
        let errors = std::mem::take(&mut self.errors);
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors.join("\n"))
        }
    }

    /// The next message of any subscription; `None` when none comes within `within`, or the server
    /// has hung up.
    pub async fn next(&mut self, within: Duration) -> Option<RawMessage> {
        if self.received.is_empty() {
            _ = timeout(within, async {
                while self.received.is_empty() && self.read().await.is_some() {}
            })
            .await;
        }
        self.received.pop_front()
    }

    /// Publishes with a reply subject of its own and waits for the first answer, within 10 s; where
    /// nobody listens that is the server's `NATS/1.0 503`. Messages of other subscriptions stay for
    /// [`next`](Self::next).
    ///
    /// # Errors
    ///
    /// What the server complained about, or that nobody answered.
    pub async fn request(
        &mut self,
        subject: &str,
        headers: Option<&[u8]>,
        payload: &[u8],
    ) -> Result<RawMessage, String> {
        let inbox = self.inbox();
        self.subscribe(&inbox).await;
        self.publish_raw(subject, Some(&inbox), headers, payload)
            .await;
        self.flush().await?;
        let mut answer = None;
        _ = timeout(ANSWER_WITHIN, async {
            loop {
                answer = self
                    .received
                    .iter()
                    .position(|message| message.subject == inbox);
                if answer.is_some() || self.read().await.is_none() {
                    return;
                }
            }
        })
        .await;
        answer
            .and_then(|index| self.received.remove(index))
            .ok_or_else(|| format!("nobody answers {subject} within {ANSWER_WITHIN:?}"))
    }

    /// Reads one protocol line and what belongs to it; `None` at the end of the connection.
    ///
    /// Cancelling it between a line and its message would lose the message's place: only while
    /// nothing has come yet is that sure not to happen, so the line is peeked at first.
    async fn read(&mut self) -> Option<()> {
        if self.connection.fill_buf().await.ok()?.is_empty() {
            return None;
        }
        // From here on the rest is on its way: the server writes a message in one piece.
        let mut line = Vec::new();
        self.connection.read_until(b'\n', &mut line).await.ok()?;
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["PING"] => self.send(b"PONG\r\n").await,
            ["PONG"] => self.pongs_awaited = self.pongs_awaited.saturating_sub(1),
            ["-ERR", ..] => self.errors.push(
                line.trim_start_matches("-ERR ")
                    .trim_matches('\'')
                    .to_owned(),
            ),
            ["MSG", subject, _, total] => self.message(subject, None, "0", total).await?,
            ["MSG", subject, _, reply, total] => {
                self.message(subject, Some(reply), "0", total).await?
            }
            ["HMSG", subject, _, headers, total] => {
                self.message(subject, None, headers, total).await?
            }
            ["HMSG", subject, _, reply, headers, total] => {
                self.message(subject, Some(reply), headers, total).await?
            }
            // INFO, +OK
            _ => {}
        }
        Some(())
    }

    async fn message(
        &mut self,
        subject: &str,
        reply: Option<&str>,
        headers: &str,
        total: &str,
    ) -> Option<()> {
        let (headers_bytes, total_bytes): (usize, usize) =
            (headers.parse().ok()?, total.parse().ok()?);
        let mut headers = vec![0; total_bytes + 2];
        self.connection.read_exact(&mut headers).await.ok()?;
        headers.truncate(total_bytes);
        let payload = headers.split_off(headers_bytes);
        self.received.push_back(RawMessage {
            subject: subject.to_owned(),
            reply: reply.map(str::to_owned),
            headers,
            payload,
        });
        Some(())
    }
}
