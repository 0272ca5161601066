//! From the queue to the handlers: one dispatcher starts requests in turn, as permits allow.

use std::future::{Future, poll_fn};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures::FutureExt;
use opentelemetry::metrics::Counter;
use opentelemetry::{KeyValue, global};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Incoming;
use super::connection::{self, Deliver, Receiving, Subscription};
use super::protocol::Delivery;
use super::queue::{FairQueue, QueueLimits};
use crate::responder::{QUEUE_GROUP, Service, may_reply_to};
use base::error::{Code, Error, Fatal};
use nats::settings::NatsSettings;

/// While every permit is taken, requests whose deadline has passed are looked for this often.
const EXPIRE_INTERVAL: Duration = Duration::from_millis(100);
/// Questions of service discovery, and refusals, that may wait to be sent: what does not fit gets no answer.
const DISCOVERY_CAPACITY: usize = 1_024;
const REFUSALS_CAPACITY: usize = 16 * 1_024;

/// How requests are received and started.
pub(crate) struct Setup<'a> {
    pub nats: &'a NatsSettings,
    /// Handled side by side.
    pub permits: usize,
    pub limits: QueueLimits,
    /// From a request's arrival to its answer.
    pub deadline: Duration,
}

/// A function that answers. Its end is a fault until it was told to stop.
pub(crate) struct Answering {
    receiving: Receiving,
    dispatching: JoinHandle<()>,
    refusing: JoinHandle<()>,
    waiting: Arc<Waiting>,
    stop: CancellationToken,
}

impl Answering {
    /// Subscribes to everything `service` answers; returns when the server has every subscription.
    ///
    /// # Errors
    /// As [`connection::start`].
    pub(crate) async fn start(
        service: Arc<Service>,
        setup: Setup<'_>,
        stop: &CancellationToken,
    ) -> Result<Answering, Fatal> {
        let waiting = Arc::new(Waiting::new(setup.limits, service.endpoints.len()));
        waiting.export(service.identity.project);
        service.show_waiting(waiting.clone());
        let (refusals, to_refuse) = mpsc::channel(REFUSALS_CAPACITY);
        let (discovery, to_discover) = mpsc::channel(DISCOVERY_CAPACITY);
        let refuser = Refuser {
            service: service.clone(),
            refusals,
            lost: Lost::new(service.identity.project),
        };
        let (subscriptions, deliver) = subscribe(&service, &waiting, discovery, refuser.clone());
        let dispatcher = Dispatcher {
            service: service.clone(),
            waiting: waiting.clone(),
            permits: Arc::new(Semaphore::new(setup.permits)),
            deadline: setup.deadline,
            handling: TaskTracker::new(),
            refuser,
        };
        let dispatching = tokio::spawn(dispatcher.run(to_discover));
        let refusing = tokio::spawn(send_refusals(service.clone(), to_refuse));
        let name = format!("{} (requests)", service.identity.name);
        let receiving = match connection::start(
            setup.nats,
            &name,
            subscriptions,
            deliver,
            stop.clone(),
        )
        .await
        {
            Ok(receiving) => receiving,
            Err(fatal) => {
                dispatching.abort();
                return Err(fatal);
            }
        };
        Ok(Answering {
            receiving,
            dispatching,
            refusing,
            waiting,
            stop: stop.clone(),
        })
    }

    /// # Errors
    /// The server refused a subscription.
    pub(crate) fn check_permissions(&self) -> Result<(), Fatal> {
        self.receiving.violations.check()
    }

    /// Ends well when, after `stop`, everything that had been sent to us was answered; badly as soon as one of the
    /// loops ends before.
    ///
    /// # Errors
    /// Which one.
    pub(crate) async fn ended(mut self) -> Result<(), Fatal> {
        let bad = |what: &str, end: Result<(), JoinError>| {
            let why = end.map_or_else(|error| error.to_string(), |()| "it just ended".to_owned());
            Fatal::new(format!(
                "the task that {what} requests is gone: {why}; leaving so that a fresh start can answer"
            ))
        };
        tokio::select! {
            end = &mut self.receiving.task => {
                if end.is_err() || !self.stop.is_cancelled() {
                    return Err(bad("receives", end));
                }
            }
            end = &mut self.dispatching => return Err(bad("starts", end)),
            end = &mut self.refusing => return Err(bad("refuses", end)),
        }
        self.waiting.close();
        let end = self.dispatching.await;
        if end.is_err() {
            return Err(bad("starts", end));
        }
        let end = self.refusing.await;
        if end.is_err() {
            Err(bad("refuses", end))
        } else {
            Ok(())
        }
    }
}

/// What the function subscribes to, and where what comes on each goes.
fn subscribe(
    service: &Arc<Service>,
    waiting: &Arc<Waiting>,
    discovery: mpsc::Sender<(&'static str, String)>,
    refuser: Refuser,
) -> (Vec<Subscription>, Deliver) {
    enum Target {
        Endpoint(usize),
        Discovery(&'static str),
    }
    let mut subscriptions = Vec::new();
    let mut targets = Vec::new();
    for (index, endpoint) in service.endpoints.iter().enumerate() {
        if endpoint.handler.is_some() {
            subscriptions.push(Subscription {
                subject: endpoint.info.subject.clone(),
                queue: Some(QUEUE_GROUP),
            });
            targets.push(Target::Endpoint(index));
        }
    }
    for (verb, subject) in service.discovery_subjects() {
        subscriptions.push(Subscription {
            subject,
            queue: None,
        });
        targets.push(Target::Discovery(verb));
    }
    let (service, waiting) = (service.clone(), waiting.clone());
    let deliver = move |index: usize, delivery: Delivery, arrived: Instant| match targets[index] {
        Target::Endpoint(endpoint) => {
            let Delivery {
                subject,
                reply,
                headers,
                payload,
                ..
            } = delivery;
            let caller = caller(
                service.endpoints[endpoint].user_after,
                subject.as_deref(),
                reply.as_deref(),
            );
            let incoming = Incoming {
                endpoint,
                subject,
                reply,
                headers,
                payload,
                arrived,
            };
            for refused in waiting.push(&caller, incoming) {
                refuser.refuse(refused, Why::Overloaded);
            }
        }
        Target::Discovery(verb) => {
            if let Some(reply) = delivery.reply {
                // Full: somebody asks faster than we can answer, and asks again.
                let _ = discovery.try_send((verb, reply));
            }
        }
    };
    (subscriptions, Box::new(deliver))
}

/// Who asks, for sharing the queue: the user whose name the subject has after `user_after`, otherwise whose inbox
/// the answer goes to (`_INBOX.publisher`, or through a service import `_R_.{account}`).
fn caller(user_after: Option<&str>, subject: Option<&str>, reply: Option<&str>) -> Arc<str> {
    let user = user_after.and_then(|prefix| subject?.strip_prefix(prefix)?.split('.').next());
    match (user.filter(|user| !user.is_empty()), reply) {
        // A user may be called like an inbox.
        (Some(user), _) => format!("user {user}").into(),
        (None, Some(reply)) => {
            let end = reply
                .match_indices('.')
                .nth(1)
                .map_or(reply.len(), |(at, _)| at);
            reply[..end].into()
        }
        (None, None) => "".into(),
    }
}

/// The queue, and how to wait for it.
#[derive(Debug)]
pub(crate) struct Waiting {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    queue: FairQueue<Incoming>,
    by_endpoint: Vec<usize>,
    closed: bool,
}

impl Waiting {
    fn new(limits: QueueLimits, endpoints: usize) -> Waiting {
        let state = State {
            queue: FairQueue::new(limits),
            by_endpoint: vec![0; endpoints],
            closed: false,
        };
        Waiting {
            state: Mutex::new(state),
            changed: Notify::new(),
        }
    }

    /// How many wait for this endpoint.
    pub(crate) fn of(&self, endpoint: usize) -> usize {
        self.with(|state| state.by_endpoint.get(endpoint).copied().unwrap_or(0))
    }

    /// The gauge `{project}.waiting`, read whenever metrics are exported.
    fn export(self: &Arc<Self>, project: &'static str) {
        let waiting: Weak<Waiting> = Arc::downgrade(self);
        let count = move || {
            waiting
                .upgrade()
                .map(|waiting| waiting.with(|state| state.queue.len() as u64))
        };
        global::meter(project)
            .u64_observable_gauge(format!("{project}.waiting"))
            .with_description("Requests that wait to be handled")
            .with_callback(move |observer| {
                if let Some(count) = count() {
                    observer.observe(count, &[]);
                }
            })
            .build();
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn push(&self, caller: &Arc<str>, incoming: Incoming) -> Vec<Incoming> {
        let refused = self.with(|state| {
            state.by_endpoint[incoming.endpoint] += 1;
            let refused = state.queue.push(caller, incoming.bytes(), incoming);
            state.forget(&refused);
            refused
        });
        self.changed.notify_one();
        refused
    }

    fn pop(&self) -> Option<Incoming> {
        self.with(|state| {
            let next = state.queue.pop();
            state.forget(next.as_slice());
            next
        })
    }

    fn expire(&self, deadline: Duration) -> Vec<Incoming> {
        self.with(|state| {
            let late = state
                .queue
                .expire(|incoming| incoming.arrived.elapsed() > deadline);
            state.forget(&late);
            late
        })
    }

    fn any(&self) -> bool {
        self.with(|state| !state.queue.is_empty())
    }

    /// Nothing more will come.
    fn close(&self) {
        self.with(|state| state.closed = true);
        self.changed.notify_one();
    }

    fn is_over(&self) -> bool {
        self.with(|state| state.closed && state.queue.is_empty())
    }
}

impl State {
    fn forget(&mut self, gone: &[Incoming]) {
        for incoming in gone {
            self.by_endpoint[incoming.endpoint] -= 1;
        }
    }
}

struct Dispatcher {
    service: Arc<Service>,
    waiting: Arc<Waiting>,
    permits: Arc<Semaphore>,
    deadline: Duration,
    handling: TaskTracker,
    refuser: Refuser,
}

impl Dispatcher {
    /// Until the queue is closed and empty, and the last request is answered.
    async fn run(self, mut discovery: mpsc::Receiver<(&'static str, String)>) {
        while !self.waiting.is_over() {
            // Permits are asked for only when there is a request: an idle endpoint holds none.
            tokio::select! {
                biased;
                // First, so that a flood of requests does not make us look dead; and here, so that an answer to
                // PING says that this loop runs.
                Some((verb, reply)) = discovery.recv() => {
                    let service = self.service.clone();
                    begin(&self.handling, async move { service.discover(verb, reply).await }).await;
                }
                permit = self.permits.clone().acquire_owned(), if self.waiting.any() => {
                    if let (Ok(permit), Some(incoming)) = (permit, self.waiting.pop()) {
                        self.start(incoming, permit).await;
                    }
                }
                () = self.waiting.changed.notified() => {}
                () = tokio::time::sleep(EXPIRE_INTERVAL), if self.waiting.any() => {
                    for late in self.waiting.expire(self.deadline) {
                        self.refuser.refuse(late, Why::Late);
                    }
                }
            }
        }
        self.handling.close();
        self.handling.wait().await;
    }

    async fn start(&self, incoming: Incoming, permit: OwnedSemaphorePermit) {
        let deadline = incoming.arrived + self.deadline;
        if Instant::now() >= deadline {
            self.refuser.refuse(incoming, Why::Late);
            return;
        }
        let service = self.service.clone();
        let work = async move {
            // The handler has a net of its own, which answers with a 500. Here nobody can be answered any more.
            if AssertUnwindSafe(service.answer(incoming, deadline))
                .catch_unwind()
                .await
                .is_err()
            {
                tracing::error!("a request could not be answered: its answering panicked");
            }
            drop(permit);
        };
        begin(&self.handling, work).await;
    }
}

/// Polls `work` once, here and now, and leaves the rest to a task of its own. So what requests do before they first
/// wait happens in the order in which they were started.
async fn begin(handling: &TaskTracker, work: impl Future<Output = ()> + Send + 'static) {
    let mut work = Box::pin(work);
    // Nobody is woken by it: its task polls it again at once. Without a budget, because the dispatcher's own would
    // make something that is ready look as if it were not.
    let first =
        poll_fn(|_| Poll::Ready(work.as_mut().poll(&mut Context::from_waker(Waker::noop()))));
    let polled = tokio::task::unconstrained(first).await;
    if polled.is_pending() {
        handling.spawn(work);
    }
}

/// Why a request is refused unread.
#[derive(Clone, Copy)]
enum Why {
    Overloaded,
    Late,
}

/// Refuses requests that are not worth a permit, and counts them.
#[derive(Clone)]
struct Refuser {
    service: Arc<Service>,
    refusals: mpsc::Sender<(String, Error)>,
    lost: Lost,
}

#[derive(Clone)]
struct Lost {
    overloaded: Counter<u64>,
    late: Counter<u64>,
}

impl Lost {
    fn new(project: &'static str) -> Lost {
        let meter = global::meter(project);
        let counter = |name, about| {
            let name = format!("{project}.{name}");
            meter.u64_counter(name).with_description(about).build()
        };
        Lost {
            overloaded: counter(
                "overloaded",
                "Requests refused because too many were waiting",
            ),
            late: counter(
                "late",
                "Requests refused because they had waited longer than their deadline",
            ),
        }
    }
}

impl Refuser {
    /// Never waits: an answer that cannot be sent at once is not sent.
    fn refuse(&self, incoming: Incoming, why: Why) {
        let endpoint = &self.service.endpoints[incoming.endpoint];
        let (counter, name, reason) = match why {
            Why::Overloaded => (
                &self.lost.overloaded,
                "overloaded",
                "too many requests are waiting; try again",
            ),
            Why::Late => (&self.lost.late, "late", "this waited too long; try again"),
        };
        let error = Error::new(Code::Unavailable, reason);
        counter.add(1, &[KeyValue::new("endpoint", endpoint.meter.endpoint())]);
        endpoint.meter.count(name, 1);
        endpoint.meter.handled(1, Duration::ZERO);
        endpoint
            .meter
            .refused(format!("{}:{reason}", error.code.number()));
        if let Some(reply) = incoming.reply.filter(|reply| may_reply_to(reply)) {
            let _ = self.refusals.try_send((reply, error));
        }
    }
}

async fn send_refusals(service: Arc<Service>, mut refusals: mpsc::Receiver<(String, Error)>) {
    while let Some((reply, error)) = refusals.recv().await {
        service.send(reply, Err(error)).await;
    }
}
