//! The NATS service API (ADR-32), one responder for all functions.
//!
//! Not async-nats' own: that one counts `respond()` calls, handles requests one after the other, leaves
//! `metadata` out of STATS and loses requests when it stops.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::marker::PhantomData;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::header::{HeaderMap, HeaderValue};
use async_nats::{Client, Message, Subscriber};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;
use wire::{Code, EndpointInfo, EndpointStats, INBOX, Info, Ping, SERVICE_REPLY, Stats, header};

use crate::requests::Requests;
use crate::telemetry::{self, remote_parent};
use crate::{Error, Fatal, Identity};

/// What every endpoint of every function is subscribed with; the default of the service API.
pub(crate) const QUEUE_GROUP: &str = "q";

/// A request, parsed.
#[derive(Debug)]
pub struct Request<Q> {
    /// What is asked.
    pub ask: Q,
}

/// A reply to an endpoint that gives `R`.
#[derive(Debug)]
pub struct Reply<R> {
    pub(crate) body: Bytes,
    pub(crate) headers: Vec<(&'static str, String)>,
    gives: PhantomData<fn() -> R>,
}

impl<R> Clone for Reply<R> {
    fn clone(&self) -> Self {
        Reply { body: self.body.clone(), headers: self.headers.clone(), gives: PhantomData }
    }
}

impl<R> Reply<R> {
    /// A reply that was encoded elsewhere; `headers` hold nothing a user sent.
    pub fn encoded(body: Bytes, headers: Vec<(&'static str, String)>) -> Reply<R> {
        Reply { body, headers, gives: PhantomData }
    }
}

impl<R: Serialize> Reply<R> {
    /// `value` as JSON.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub fn json(value: &R) -> Result<Reply<R>, Error> {
        let body = serde_json::to_vec(value).map_err(Error::internal)?;
        Ok(Reply::encoded(body.into(), Vec::new()))
    }
}

/// Counts what an endpoint or a worker did, for STATS and for metrics.
#[derive(Debug, Clone)]
pub struct Meter(Arc<Counters>);

#[derive(Debug)]
struct Counters {
    endpoint: &'static str,
    requests: AtomicU64,
    errors: AtomicU64,
    nanos: AtomicU64,
    last_error: Mutex<String>,
    data: Mutex<BTreeMap<String, u64>>,
    instruments: telemetry::Instruments,
}

impl Meter {
    pub(crate) fn new(endpoint: &'static str) -> Meter {
        Meter(Arc::new(Counters {
            endpoint,
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            nanos: AtomicU64::new(0),
            last_error: Mutex::default(),
            data: Mutex::default(),
            instruments: telemetry::Instruments::new(),
        }))
    }

    /// `requests` were handled, in `took` altogether.
    pub fn handled(&self, requests: u64, took: Duration) {
        self.0.requests.fetch_add(requests, Ordering::Relaxed);
        self.0.nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.0.instruments.handled(self.0.endpoint, requests, took);
    }

    /// One of them was refused. `what` is shown to operators: `code:reason`.
    pub fn refused(&self, what: String) {
        self.0.errors.fetch_add(1, Ordering::Relaxed);
        self.0.instruments.refused(self.0.endpoint);
        *self.0.last_error.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    /// Adds to a counter of the function's own, shown under `data` in STATS.
    pub fn count(&self, name: &str, more: u64) {
        if more > 0 {
            let mut data = self.0.data.lock().unwrap_or_else(PoisonError::into_inner);
            *data.entry(name.to_owned()).or_default() += more;
        }
    }

    /// What something is now, shown under `data` in STATS and exported as the gauge `scrollback.{name}`.
    pub fn gauge(&self, name: &'static str, value: u64) {
        self.0.data.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), value);
        self.0.instruments.gauge(name, value);
    }

    fn stats(&self, endpoint: &EndpointInfo) -> EndpointStats {
        let (requests, nanos) = (self.0.requests.load(Ordering::Relaxed), self.0.nanos.load(Ordering::Relaxed));
        EndpointStats {
            name: endpoint.name.clone(),
            subject: endpoint.subject.clone(),
            queue_group: endpoint.queue_group.clone(),
            num_requests: requests,
            num_errors: self.0.errors.load(Ordering::Relaxed),
            last_error: self.0.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            processing_time: nanos,
            average_processing_time: nanos.checked_div(requests).unwrap_or(0),
            data: self.0.data.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}

/// Body and headers of a reply, ready to send.
type Encoded = (Bytes, Vec<(&'static str, String)>);

pub(crate) type Handler = Arc<dyn Fn(Message) -> BoxFuture<'static, Result<Encoded, Error>> + Send + Sync>;

/// One line of INFO and STATS: an endpoint with a handler, or a worker without.
pub(crate) struct Registered {
    pub info: EndpointInfo,
    pub meter: Meter,
    pub handler: Option<Handler>,
}

/// Everything one copy answers.
pub(crate) struct Service {
    client: Client,
    identity: Identity,
    id: String,
    metadata: BTreeMap<String, String>,
    started: String,
    endpoints: Vec<Registered>,
    places: Arc<Semaphore>,
    deadline: Duration,
}

impl Service {
    pub(crate) fn new(client: Client, identity: Identity, endpoints: Vec<Registered>, places: usize, deadline: Duration) -> Arc<Service> {
        let id = client.new_inbox().rsplit('.').next().unwrap_or_default().to_owned();
        let now = time::OffsetDateTime::now_utc();
        let started = now.format(&time::format_description::well_known::Rfc3339).unwrap_or_default();
        let metadata = BTreeMap::from([("project".to_owned(), "scrollback".to_owned())]);
        Arc::new(Service { client, identity, id, metadata, started, endpoints, places: Arc::new(Semaphore::new(places)), deadline })
    }

    /// Subscribes to everything and answers until `stop`, then finishes what was taken.
    /// Returns once the server has every subscription; the task ends when the last answer is out.
    ///
    /// # Errors
    /// The connection is gone.
    pub(crate) async fn start(self: &Arc<Self>, requests: Requests, stop: &CancellationToken) -> Result<JoinHandle<()>, Fatal> {
        let gone = |_| Fatal::new("the connection to NATS was lost while subscribing");
        let answering = TaskTracker::new();
        let drain = CancellationToken::new();
        let (drained, all_drained) = mpsc::channel(1);
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            if endpoint.handler.is_some() {
                let client = requests.connection.client();
                let subscription = client.queue_subscribe(endpoint.info.subject.clone(), QUEUE_GROUP.to_owned()).await.map_err(gone)?;
                answering.spawn(self.clone().answer(index, subscription, drain.clone(), drained.clone(), answering.clone()));
            }
        }
        drop(drained);
        for (verb, subject) in wire::discovery_subjects(self.identity.name, &self.id) {
            let subscription = self.client.subscribe(subject).await.map_err(gone)?;
            tokio::spawn(self.clone().discovery(verb, subscription, stop.clone()));
        }
        for client in [requests.connection.client(), &self.client] {
            client.flush().await.map_err(|_| Fatal::new("the connection to NATS was lost while subscribing"))?;
        }
        answering.close();
        Ok(tokio::spawn(drain_on(stop.clone(), requests, drain, all_drained, answering)))
    }

    /// Takes requests of one endpoint; `drained` is dropped when its subscription is being drained.
    async fn answer(
        self: Arc<Self>,
        index: usize,
        mut subscription: Subscriber,
        drain: CancellationToken,
        drained: mpsc::Sender<Infallible>,
        answering: TaskTracker,
    ) {
        let mut drained = Some(drained);
        loop {
            // A place first, then a request: what finds no place waits in the subscription, not in tasks.
            let place = tokio::select! {
                place = self.places.clone().acquire_owned() => place,
                () = drain.cancelled(), if drained.is_some() => {
                    if let Err(error) = subscription.drain().await {
                        tracing::warn!(%error, "an endpoint could not be drained");
                    }
                    drained = None;
                    continue;
                }
            };
            let Ok(place) = place else { return };
            let request = tokio::select! {
                request = subscription.next() => request,
                () = drain.cancelled(), if drained.is_some() => continue,
            };
            let Some(request) = request else { return };
            let service = self.clone();
            answering.spawn(async move {
                service.one(index, request).await;
                drop(place);
            });
        }
    }

    async fn one(&self, index: usize, request: Message) {
        let Registered { info, meter, handler: Some(handler) } = &self.endpoints[index] else { return };
        let begun = Instant::now();
        let reply_to = request.reply.clone();
        let span = tracing::info_span!(
            "request",
            otel.name = format!("{} {}", self.identity.name, info.subject),
            otel.kind = "server",
            otel.status_code = tracing::field::Empty,
            messaging.system = "nats",
            messaging.destination.name = %request.subject,
            error.r#type = tracing::field::Empty,
        );
        remote_parent(&span, request.headers.as_ref());
        let outcome = match reply_to.as_deref().map(may_reply_to) {
            Some(true) => {
                let work = AssertUnwindSafe(handler(request)).catch_unwind().instrument(span.clone());
                match tokio::time::timeout(self.deadline, work).await {
                    Ok(Ok(outcome)) => outcome,
                    Ok(Err(_panic)) => Err(Error::internal("the handler panicked")),
                    Err(_) => Err(Error::new(Code::Unavailable, "this took too long; try again")),
                }
            }
            Some(false) => Err(Error::new(Code::BadRequest, "the reply subject must begin with _INBOX. or _R_.")),
            None => Err(Error::new(Code::BadRequest, "a request needs a reply subject")),
        };
        let outcome = outcome.and_then(|reply| self.fits(reply));
        meter.handled(1, begun.elapsed());
        if let Err(error) = &outcome {
            meter.refused(format!("{}:{}", error.code.number(), error.reason));
            span.record("error.type", error.code.number());
            if error.code == Code::Internal {
                span.record("otel.status_code", "ERROR");
                span.in_scope(|| tracing::error!(endpoint = info.name, %error, "a request failed"));
            } else {
                span.in_scope(|| tracing::debug!(endpoint = info.name, %error, "a request was refused"));
            }
        }
        if let Some(reply_to) = reply_to.filter(|subject| may_reply_to(subject)) {
            self.send(reply_to, outcome).await;
        }
    }

    fn fits(&self, reply: Encoded) -> Result<Encoded, Error> {
        if reply.0.len() + HEADER_ROOM > self.client.server_info().max_payload {
            return Err(Error::new(Code::TooLarge, "the answer is larger than the server's max_payload; ask for less"));
        }
        Ok(reply)
    }

    async fn send(&self, reply_to: async_nats::Subject, outcome: Result<Encoded, Error>) {
        let (body, headers) = outcome.unwrap_or_else(|error| {
            let body = serde_json::to_vec(&error.body()).unwrap_or_default();
            let headers = vec![
                (header::SERVICE_ERROR, error.reason.clone().into_owned()),
                (header::SERVICE_ERROR_CODE, error.code.number().to_string()),
            ];
            (body.into(), headers)
        });
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            // `insert` panics on a line break; a sentence that holds one is not worth a process.
            if let Ok(value) = value.parse::<HeaderValue>() {
                map.insert(name, value);
            }
        }
        let sent = if map.is_empty() {
            self.client.publish(reply_to, body).await
        } else {
            self.client.publish_with_headers(reply_to, map, body).await
        };
        if let Err(error) = sent {
            tracing::warn!(%error, "a reply could not be sent");
        }
    }

    async fn discovery(self: Arc<Self>, verb: &'static str, mut subscription: Subscriber, stop: CancellationToken) {
        loop {
            let request = tokio::select! {
                request = subscription.next() => request,
                () = stop.cancelled() => return,
            };
            let Some(request) = request else { return };
            if let Some(reply_to) = request.reply.filter(|subject| may_reply_to(subject)) {
                let body = match verb {
                    "PING" => serde_json::to_vec(&self.ping()),
                    "INFO" => serde_json::to_vec(&self.info()),
                    _ => serde_json::to_vec(&self.stats()),
                };
                self.send(reply_to, body.map(|body| (body.into(), Vec::new())).map_err(Error::internal)).await;
            }
        }
    }

    fn ping(&self) -> Ping {
        Ping {
            kind: "io.nats.micro.v1.ping_response".to_owned(),
            name: self.identity.name.to_owned(),
            id: self.id.clone(),
            version: self.identity.version.to_owned(),
            metadata: self.metadata.clone(),
        }
    }

    fn info(&self) -> Info {
        Info {
            kind: "io.nats.micro.v1.info_response".to_owned(),
            name: self.identity.name.to_owned(),
            id: self.id.clone(),
            version: self.identity.version.to_owned(),
            description: self.identity.description.to_owned(),
            metadata: self.metadata.clone(),
            endpoints: self.endpoints.iter().map(|endpoint| endpoint.info.clone()).collect(),
        }
    }

    fn stats(&self) -> Stats {
        Stats {
            kind: "io.nats.micro.v1.stats_response".to_owned(),
            name: self.identity.name.to_owned(),
            id: self.id.clone(),
            version: self.identity.version.to_owned(),
            metadata: self.metadata.clone(),
            started: self.started.clone(),
            endpoints: self.endpoints.iter().map(|endpoint| endpoint.meter.stats(&endpoint.info)).collect(),
        }
    }
}

/// Waits for `stop`, then drains every endpoint and waits for the last answer.
async fn drain_on(
    stop: CancellationToken,
    requests: Requests,
    drain: CancellationToken,
    mut all_drained: mpsc::Receiver<Infallible>,
    answering: TaskTracker,
) {
    stop.cancelled().await;
    let paused = requests.pause().await;
    drain.cancel();
    // Ends when every endpoint has dropped its sender.
    let _ = all_drained.recv().await;
    let draining = paused.drain();
    answering.wait().await;
    drop(draining);
}

/// What a reply's headers may take of `max_payload`.
const HEADER_ROOM: usize = 1024;

/// Reply subjects are not checked by the server: without this, a request with reply `chat.general` or
/// `$JS.API.STREAM.DELETE.…` would make us publish there, with our rights.
fn may_reply_to(subject: &str) -> bool {
    [INBOX, SERVICE_REPLY].iter().any(|prefix| subject.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('.')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_go_to_inboxes_only() {
        for good in ["_INBOX.publisher.abc", "_INBOX.abc.1", "_R_.x.y"] {
            assert!(may_reply_to(good), "{good}");
        }
        for bad in ["chat.general", "$JS.API.STREAM.DELETE.CHAT_MESSAGES", "_INBOXX.a", "_INBOX", "_R_", ""] {
            assert!(!may_reply_to(bad), "{bad}");
        }
    }
}
