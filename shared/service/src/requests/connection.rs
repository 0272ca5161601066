//! A connection that only receives: it subscribes, delivers messages, notices when the server is
//! gone, and reconnects.

use std::time::{Duration, Instant};

use async_nats::ServerAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::handshake::{self, ConnectError, Connected, Credentials};
use super::protocol::{Delivery, Frame};
use base::backoff::Backoff;
use base::error::Fatal;
use base::log_once::LogOnce;
use nats::connection::PermissionViolations;
use nats::settings::NatsSettings;

/// How often we send PING. A server that hangs is noticed after two to three of these; one that
/// closes the connection, at once.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// How many intervals may pass without a byte from the server while a PING is unanswered.
const MAX_SILENT_INTERVALS: u32 = 2;
/// How long writing a few bytes may take. If it takes longer, the server no longer reads.
const WRITE_LIMIT: Duration = Duration::from_secs(2);
/// Between attempts to connect: first this, then twice as long each time, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// The most bytes that one read takes.
const READ_BYTES: usize = 64 * 1024;

/// A subscription to make.
pub(crate) struct Subscription {
    pub subject: String,
    pub queue: Option<&'static str>,
}

/// Takes the index of a subscription, a message of it, and when its bytes were read. Called on the
/// connection's task, so it must not block.
pub(super) type Deliver = Box<dyn FnMut(usize, Delivery, Instant) + Send>;

/// The connection's task, and what this user lacked permission for.
pub(super) struct Receiving {
    /// Ends when everything has been drained; any other end is a fault.
    pub task: JoinHandle<()>,
    /// Subscriptions that the server refused.
    pub violations: PermissionViolations,
}

/// Connects, waiting while the servers are away, and subscribes. Returns when the server has every
/// subscription. When `stop` is cancelled it unsubscribes, and everything that the server has sent
/// by then is still delivered.
///
/// # Errors
/// The configuration is wrong, the server rejects this user, or `stop` was cancelled first.
pub(super) async fn start(
    settings: &NatsSettings,
    name: &str,
    subscriptions: Vec<Subscription>,
    deliver: Deliver,
    stop: CancellationToken,
) -> Result<Receiving, Fatal> {
    let violations = PermissionViolations::default();
    let mut receiver = Receiver {
        servers: Servers {
            configured: handshake::addresses(settings)?,
            discovered: Vec::new(),
            next: 0,
        },
        credentials: Credentials::new(settings, name)?,
        subscriptions,
        deliver,
        stop,
        violations: violations.clone(),
        subscribed: None,
    };
    let stopped = || Fatal::new("stopped while connecting to NATS");
    let connected = receiver.connect(true).await?.ok_or_else(stopped)?;
    let (subscribed_tx, subscribed) = oneshot::channel();
    receiver.subscribed = Some(subscribed_tx);
    let task = tokio::spawn(receiver.run(connected));
    subscribed.await.map_err(|_| stopped())?;
    Ok(Receiving { task, violations })
}

/// Where to connect: the configured servers, and the members of their cluster that they announce.
struct Servers {
    configured: Vec<ServerAddr>,
    discovered: Vec<ServerAddr>,
    next: usize,
}

impl Servers {
    /// The next server in turn, and the name that its certificate must have. Announced members are
    /// known by address only, so they must have the name of the first configured server.
    fn next(&mut self) -> (ServerAddr, String) {
        let all: Vec<&ServerAddr> = self.configured.iter().chain(&self.discovered).collect();
        let at = self.next % all.len();
        let address = all[at].clone();
        self.next = (at + 1) % all.len();
        let certified = if at < self.configured.len() {
            &address
        } else {
            &self.configured[0]
        };
        let name = certified.host().to_owned();
        (address, name)
    }

    fn count(&self) -> usize {
        self.configured.len() + self.discovered.len()
    }

    fn discover(&mut self, urls: &[String]) {
        let scheme = if self.configured.iter().any(ServerAddr::tls_required) {
            "tls"
        } else {
            "nats"
        };
        let parsed = urls
            .iter()
            .filter_map(|url| format!("{scheme}://{url}").parse::<ServerAddr>().ok());
        let known = |address: &ServerAddr| {
            self.configured
                .iter()
                .any(|named| (named.host(), named.port()) == (address.host(), address.port()))
        };
        self.discovered = parsed.filter(|address| !known(address)).collect();
    }
}

/// Why a connection ended.
enum Ended {
    /// We unsubscribed, and everything that the server had sent by then was delivered.
    Drained,
    Lost(String),
}

struct Receiver {
    servers: Servers,
    credentials: Credentials,
    subscriptions: Vec<Subscription>,
    deliver: Deliver,
    stop: CancellationToken,
    violations: PermissionViolations,
    subscribed: Option<oneshot::Sender<()>>,
}

/// The state of one connection.
#[derive(Default)]
struct Session {
    /// PINGs without their PONG; the server answers them in order.
    unanswered: u32,
    /// Whether a byte arrived since the last tick.
    heard: bool,
    silent_intervals: u32,
    draining: bool,
}

impl Receiver {
    async fn run(mut self, mut connected: Connected) {
        loop {
            match self.serve(&mut connected).await {
                Ended::Drained => return,
                Ended::Lost(why) if self.stop.is_cancelled() => {
                    tracing::warn!(
                        why,
                        "the connection for requests broke while it was drained; \
                         requests that were on their way get no answer"
                    );
                    return;
                }
                Ended::Lost(why) => {
                    tracing::warn!(why, "the connection for requests broke; reconnecting")
                }
            }
            match self.connect(false).await {
                Ok(Some(again)) => connected = again,
                // Stopped meanwhile. Nothing is on its way to a connection that does not exist.
                Ok(None) | Err(_) => return,
            }
            tracing::info!("requests are received again");
        }
    }

    /// Tries every server in turn until one accepts us; `None` when stopped meanwhile. `first`: at
    /// the start a server that rejects this user means that the configuration is wrong; later it
    /// may be in the middle of a change.
    async fn connect(&mut self, first: bool) -> Result<Option<Connected>, Fatal> {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut log = LogOnce::default();
        loop {
            for _ in 0..self.servers.count() {
                let (address, tls_name) = self.servers.next();
                let attempt = tokio::select! {
                    attempt = handshake::connect(&address, &tls_name, &self.credentials) => attempt,
                    () = self.stop.cancelled() => return Ok(None),
                };
                match attempt {
                    Ok(connected) => {
                        self.servers.discover(&connected.info.connect_urls);
                        return Ok(Some(connected));
                    }
                    Err(ConnectError::Unauthorized(_)) if first => {
                        return Err(Fatal::new(
                            "NATS refused this user: check NATS_USER and NATS_PASS (or NATS_CREDS) \
                             against the server's configuration",
                        ));
                    }
                    Err(error) => {
                        let text = error.to_string();
                        if log.is_news(&text) {
                            let server = format!("{}:{}", address.host(), address.port());
                            tracing::warn!(
                                server,
                                why = text,
                                "waiting for NATS: the connection for requests cannot be made"
                            );
                        }
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next_pause()) => {}
                () = self.stop.cancelled() => return Ok(None),
            }
        }
    }

    /// Subscribes and delivers until the connection ends.
    async fn serve(&mut self, connected: &mut Connected) -> Ended {
        let mut session = Session {
            unanswered: 1,
            ..Session::default()
        };
        let mut lines = String::new();
        for (index, subscription) in self.subscriptions.iter().enumerate() {
            let queue = subscription
                .queue
                .map(|queue| format!(" {queue}"))
                .unwrap_or_default();
            lines.push_str(&format!(
                "SUB {}{queue} {}\r\n",
                subscription.subject,
                index + 1
            ));
        }
        let mut outcome = write(connected, &(lines + "PING\r\n")).await;
        let mut ticks = interval(PING_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let stop = self.stop.clone();
        loop {
            if let Err(ended) = outcome {
                return ended;
            }
            connected.decoder.buffer.reserve(READ_BYTES);
            // In this order: a flood does not delay a stop, and bytes in the socket count as a sign
            // of life, also when this process was suspended for a while.
            outcome = tokio::select! {
                biased;
                () = stop.cancelled(), if !session.draining => {
                    self.unsubscribe(connected, &mut session).await
                }
                read = connected.stream.read_buf(&mut connected.decoder.buffer) => {
                    let arrived = Instant::now();
                    session.heard = true;
                    match read {
                        Ok(0) => Err(Ended::Lost("the server closed the connection".to_owned())),
                        Ok(_) => self.frames(connected, &mut session, arrived).await,
                        Err(error) => Err(Ended::Lost(error.to_string())),
                    }
                }
                _ = ticks.tick() => check_alive(connected, &mut session).await,
            };
        }
    }

    /// Handles every complete frame in the bytes read so far.
    async fn frames(
        &mut self,
        connected: &mut Connected,
        session: &mut Session,
        arrived: Instant,
    ) -> Result<(), Ended> {
        while let Some(frame) = connected
            .decoder
            .next()
            .map_err(|error| Ended::Lost(error.to_string()))?
        {
            match frame {
                Frame::Message(delivery) => {
                    let index = usize::try_from(delivery.sid)
                        .ok()
                        .and_then(|sid| sid.checked_sub(1));
                    if let Some(index) = index.filter(|index| *index < self.subscriptions.len()) {
                        (self.deliver)(index, delivery, arrived);
                    }
                }
                Frame::Ping => write(connected, "PONG\r\n").await?,
                Frame::Pong => {
                    session.unanswered = session.unanswered.saturating_sub(1);
                    if session.unanswered == 0 {
                        if session.draining {
                            return Err(Ended::Drained);
                        }
                        if let Some(subscribed) = self.subscribed.take() {
                            let _ = subscribed.send(());
                        }
                    }
                }
                Frame::Info(json) => {
                    if let Ok(info) = handshake::parse_info(&json) {
                        connected.decoder.set_max_payload(info.max_payload);
                        self.servers.discover(&info.connect_urls);
                    }
                }
                Frame::Error(text) => {
                    tracing::warn!(
                        error = text,
                        "the NATS server reports an error on the connection for requests"
                    );
                    self.violations.note(&text);
                }
                Frame::Ok => {}
            }
        }
        Ok(())
    }

    /// The server handles these in order: after its PONG it sends no more messages.
    async fn unsubscribe(
        &mut self,
        connected: &mut Connected,
        session: &mut Session,
    ) -> Result<(), Ended> {
        session.draining = true;
        session.unanswered += 1;
        let unsubscribe: String = (1..=self.subscriptions.len())
            .map(|sid| format!("UNSUB {sid}\r\n"))
            .collect();
        write(connected, &(unsubscribe + "PING\r\n")).await
    }
}

/// Once an interval: checks that the server still sends something, and sends the next PING.
async fn check_alive(connected: &mut Connected, session: &mut Session) -> Result<(), Ended> {
    if session.unanswered > 0 && !session.heard {
        session.silent_intervals += 1;
        if session.silent_intervals >= MAX_SILENT_INTERVALS {
            return Err(Ended::Lost("the server does not answer PING".to_owned()));
        }
    } else {
        session.silent_intervals = 0;
    }
    session.heard = false;
    if session.unanswered == 0 {
        session.unanswered += 1;
        write(connected, "PING\r\n").await?;
    }
    Ok(())
}

async fn write(connected: &mut Connected, lines: &str) -> Result<(), Ended> {
    let written = async {
        connected.stream.write_all(lines.as_bytes()).await?;
        connected.stream.flush().await
    };
    match tokio::time::timeout(WRITE_LIMIT, written).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Ended::Lost(error.to_string())),
        Err(_) => Err(Ended::Lost(
            "the server does not read what we send".to_owned(),
        )),
    }
}
