//! A connection that only receives: it subscribes, hands on what comes, notices its own death, and comes back.

use std::time::{Duration, Instant};

use async_nats::ServerAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::handshake::{self, Connected, Credentials, Refusal};
use super::protocol::{Delivery, Frame};
use base::backoff::Backoff;
use base::error::Fatal;
use base::log_once::LogOnce;
use nats::connection::PermissionViolations;
use nats::settings::NatsSettings;

/// How often the server is asked whether it is there. One that hangs in silence is noticed after two to three of
/// these; one that hangs up, at once.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// How many intervals may pass without a byte from the server while a PING waits for its answer.
const MAX_SILENT_INTERVALS: u32 = 2;
/// How long a few bytes may take to leave; longer, and the server does not read any more.
const WRITE_LIMIT: Duration = Duration::from_secs(2);
/// Between attempts to connect: this first, then twice as much each time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// What is read at once.
const READ_BYTES: usize = 64 * 1024;

/// What to subscribe to.
pub(crate) struct Subscription {
    pub subject: String,
    pub queue: Option<&'static str>,
}

/// Takes what came on the subscription of this index, and when its bytes came. Called on the connection's task: it
/// must not block.
pub(super) type Deliver = Box<dyn FnMut(usize, Delivery, Instant) + Send>;

/// The connection's task, and what this user lacked permission for.
pub(super) struct Receiving {
    /// Ends when everything has been drained; any other end is a fault.
    pub task: JoinHandle<()>,
    /// Subscriptions that the server refused.
    pub violations: PermissionViolations,
}

/// Connects, waiting while the servers are away, and subscribes. Returns when the server has every subscription.
/// When `stop` is cancelled it unsubscribes, and everything the server had sent by then is still delivered.
///
/// # Errors
/// The configuration is wrong, the server does not know this user, or `stop` came first.
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

/// Where to connect: the servers that were named, and those of their cluster that they named themselves.
struct Servers {
    configured: Vec<ServerAddr>,
    discovered: Vec<ServerAddr>,
    next: usize,
}

impl Servers {
    /// The next in turn, and the name its certificate must have: members of a cluster are told by their addresses.
    fn next(&mut self) -> (ServerAddr, String) {
        let all: Vec<&ServerAddr> = self.configured.iter().chain(&self.discovered).collect();
        let at = self.next % all.len();
        let address = all[at].clone();
        self.next = (at + 1) % all.len();
        let named = if at < self.configured.len() {
            &address
        } else {
            &self.configured[0]
        };
        let name = named.host().to_owned();
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
        let read = urls
            .iter()
            .filter_map(|url| format!("{scheme}://{url}").parse::<ServerAddr>().ok());
        let known = |address: &ServerAddr| {
            self.configured
                .iter()
                .any(|named| (named.host(), named.port()) == (address.host(), address.port()))
        };
        self.discovered = read.filter(|address| !known(address)).collect();
    }
}

/// Why a connection ended.
enum Ended {
    /// We unsubscribed, and everything that had been sent by then was delivered.
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

/// What is known of one connection while it lives.
#[derive(Default)]
struct Session {
    /// PINGs without their PONG; the server answers them in order.
    unanswered: u32,
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
                        "the connection for requests broke while it was drained"
                    );
                    return;
                }
                Ended::Lost(why) => {
                    tracing::warn!(why, "the connection for requests broke; connecting again")
                }
            }
            match self.connect(false).await {
                Ok(Some(again)) => connected = again,
                // Stopped meanwhile: nothing can be on its way to a connection that is not there.
                Ok(None) | Err(_) => return,
            }
            tracing::info!("requests are received again");
        }
    }

    /// Tries every server in turn until one takes us; `None` when told to stop. `first`: a server that does not
    /// know us is a fault of the configuration, later it may be one that is just being configured.
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
                    Err(Refusal::Unauthorized(_)) if first => {
                        return Err(Fatal::new(
                            "NATS refused this user: check NATS_USER and NATS_PASS (or NATS_CREDS) against \
                             the server's configuration",
                        ));
                    }
                    Err(refusal) => {
                        let text = refusal.to_string();
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
            // In this order: a flood does not hold up a stop, and what lies in the socket counts as a sign of life
            // also after we were not running for a while.
            outcome = tokio::select! {
                biased;
                () = stop.cancelled(), if !session.draining => self.unsubscribe(connected, &mut session).await,
                read = connected.stream.read_buf(&mut connected.decoder.buffer) => {
                    let arrived = Instant::now();
                    session.heard = true;
                    match read {
                        Ok(0) => Err(Ended::Lost("the server hung up".to_owned())),
                        Ok(_) => self.frames(connected, &mut session, arrived).await,
                        Err(error) => Err(Ended::Lost(error.to_string())),
                    }
                }
                _ = ticks.tick() => look_alive(connected, &mut session).await,
            };
        }
    }

    /// Everything the bytes read so far hold.
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
                    if let Ok(info) = handshake::read_info(&json) {
                        connected.decoder.set_max_payload(info.max_payload);
                        self.servers.discover(&info.connect_urls);
                    }
                }
                Frame::Error(text) => {
                    tracing::warn!(
                        error = text,
                        "NATS: the server objects to the connection for requests"
                    );
                    self.violations.note(&text);
                }
                Frame::Ok => {}
            }
        }
        Ok(())
    }

    /// The server handles these in order: what it sends before its PONG is all it will ever send.
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

/// Once an interval: whether the server still says anything, and the next PING.
async fn look_alive(connected: &mut Connected, session: &mut Session) -> Result<(), Ended> {
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
        Err(_) => Err(Ended::Lost("the server does not read".to_owned())),
    }
}
