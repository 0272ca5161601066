//! From the queue to the handlers: one dispatcher starts requests in turn, as permits allow.

use std::future::{Future, poll_fn};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures::FutureExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::RawRequest;
use super::connection::{self, Deliver, Receiving, Subscription};
use super::fair_queue::QueueLimits;
use super::protocol::Delivery;
use super::queue::RequestQueue;
use super::refuse::{Refuser, Why};
use crate::responder::{QUEUE_GROUP, Service};
use base::error::Fatal;
use nats::settings::NatsSettings;

/// How often expired requests are removed from the queue while every permit is taken.
const EXPIRE_INTERVAL: Duration = Duration::from_millis(100);
/// Requests of service discovery that may wait; more get no reply.
const DISCOVERY_CAPACITY: usize = 1_024;

/// How requests are received and started.
pub(crate) struct Setup<'a> {
    pub nats: &'a NatsSettings,
    /// How many requests are handled at the same time.
    pub permits: usize,
    pub limits: QueueLimits,
    /// From a request's arrival to its reply.
    pub deadline: Duration,
}

/// The tasks that receive, start and refuse requests. Until the function is stopped, the end of any
/// of them is a fault.
pub(crate) struct Answering {
    receiving: Receiving,
    dispatching: JoinHandle<()>,
    refusing: JoinHandle<()>,
    queue: Arc<RequestQueue>,
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
        let queue = Arc::new(RequestQueue::new(setup.limits, service.endpoints.len()));
        queue.export(service.identity.project);
        service.show_queue(queue.clone());
        let (refuser, refusing) = Refuser::start(service.clone());
        let (discovery, to_discover) = mpsc::channel(DISCOVERY_CAPACITY);
        let (subscriptions, deliver) = subscribe(&service, &queue, discovery, refuser.clone());
        let dispatcher = Dispatcher {
            service: service.clone(),
            queue: queue.clone(),
            permits: Arc::new(Semaphore::new(setup.permits)),
            deadline: setup.deadline,
            handling: TaskTracker::new(),
            refuser,
        };
        let dispatching = tokio::spawn(dispatcher.run(to_discover));
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
            queue,
            stop: stop.clone(),
        })
    }

    /// # Errors
    /// The server refused a subscription.
    pub(crate) fn check_permissions(&self) -> Result<(), Fatal> {
        self.receiving.violations.check()
    }

    /// Returns after the function was stopped and every request that had been sent to it was
    /// answered.
    ///
    /// # Errors
    /// One of the tasks ended before.
    pub(crate) async fn ended(mut self) -> Result<(), Fatal> {
        let bad = |what: &str, end: Result<(), JoinError>| {
            let why = end.map_or_else(|error| error.to_string(), |()| "it ended".to_owned());
            Fatal::new(format!(
                "the task that {what} requests is gone: {why}; leaving so that a fresh start can \
                 answer"
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
        self.queue.close();
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

/// The function's subscriptions, and what is done with the messages of each.
fn subscribe(
    service: &Arc<Service>,
    queue: &Arc<RequestQueue>,
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
    let service = service.clone();
    let queue = queue.clone();
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
            let request = RawRequest {
                endpoint,
                subject,
                reply,
                headers,
                payload,
                arrived,
            };
            for refused in queue.push(&caller, request) {
                refuser.refuse(refused, Why::Overloaded);
            }
        }
        Target::Discovery(verb) => {
            if let Some(reply) = delivery.reply {
                // Full: a caller that asks faster than we can answer has to ask again.
                let _ = discovery.try_send((verb, reply));
            }
        }
    };
    (subscriptions, Box::new(deliver))
}

/// The caller, for sharing the queue fairly: the user whose name follows `user_after` in the
/// subject, or otherwise the owner of the inbox that the reply goes to (`_INBOX.publisher`, or
/// `_R_.{account}` through a service import).
fn caller(user_after: Option<&str>, subject: Option<&str>, reply: Option<&str>) -> Arc<str> {
    let user = user_after.and_then(|prefix| subject?.strip_prefix(prefix)?.split('.').next());
    match (user.filter(|user| !user.is_empty()), reply) {
        // With "user", because a user's name may look like an inbox.
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

struct Dispatcher {
    service: Arc<Service>,
    queue: Arc<RequestQueue>,
    permits: Arc<Semaphore>,
    deadline: Duration,
    handling: TaskTracker,
    refuser: Refuser,
}

impl Dispatcher {
    /// Runs until the queue is closed and empty and the last request is answered.
    async fn run(self, mut discovery: mpsc::Receiver<(&'static str, String)>) {
        while !self.queue.is_over() {
            // A permit is acquired only when there is a request: an idle function holds none.
            tokio::select! {
                biased;
                // First, so that a flood of requests does not make us look dead. In this loop, so
                // that a reply to PING shows that the loop runs.
                Some((verb, reply)) = discovery.recv() => {
                    let service = self.service.clone();
                    begin(&self.handling, async move { service.discover(verb, reply).await }).await;
                }
                permit = self.permits.clone().acquire_owned(), if self.queue.any() => {
                    if let (Ok(permit), Some(request)) = (permit, self.queue.pop()) {
                        self.start(request, permit).await;
                    }
                }
                () = self.queue.changed() => {}
                () = tokio::time::sleep(EXPIRE_INTERVAL), if self.queue.any() => {
                    for late in self.queue.expire(self.deadline) {
                        self.refuser.refuse(late, Why::Late);
                    }
                }
            }
        }
        self.handling.close();
        self.handling.wait().await;
    }

    async fn start(&self, request: RawRequest, permit: OwnedSemaphorePermit) {
        let deadline = request.arrived + self.deadline;
        if Instant::now() >= deadline {
            self.refuser.refuse(request, Why::Late);
            return;
        }
        let service = self.service.clone();
        let work = async move {
            // A handler's panic is caught in `answer` and replied to with a 500. For a panic
            // outside of the handler there is no reply any more.
            if AssertUnwindSafe(service.answer(request, deadline))
                .catch_unwind()
                .await
                .is_err()
            {
                tracing::error!("a request gets no reply, because replying to it panicked");
            }
            drop(permit);
        };
        begin(&self.handling, work).await;
    }
}

/// Polls `work` once, here and now, and leaves the rest to a task of its own. So whatever requests
/// do before they first wait happens in the order in which they were started.
async fn begin(handling: &TaskTracker, work: impl Future<Output = ()> + Send + 'static) {
    let mut work = Box::pin(work);
    // The waker does nothing, because the new task polls the work again at once. Without tokio's
    // budget: when the dispatcher has used up its own, something that is ready would look pending.
    let first =
        poll_fn(|_| Poll::Ready(work.as_mut().poll(&mut Context::from_waker(Waker::noop()))));
    let polled = tokio::task::unconstrained(first).await;
    if polled.is_pending() {
        handling.spawn(work);
    }
}
