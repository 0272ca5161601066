//! The queue of requests that wait for a permit, shared between threads.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use opentelemetry::global;
use tokio::sync::Notify;

use super::RawRequest;
use super::fair_queue::{FairQueue, QueueLimits};

/// Requests that wait for a permit. Shared by the connection, which pushes, and the dispatcher,
/// which pops.
#[derive(Debug)]
pub(crate) struct RequestQueue {
    state: Mutex<State>,
    /// Something was pushed, or the queue was closed.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    queue: FairQueue<RawRequest>,
    by_endpoint: Vec<usize>,
    closed: bool,
}

impl RequestQueue {
    pub(super) fn new(limits: QueueLimits, endpoints: usize) -> RequestQueue {
        let state = State {
            queue: FairQueue::new(limits),
            by_endpoint: vec![0; endpoints],
            closed: false,
        };
        RequestQueue {
            state: Mutex::new(state),
            changed: Notify::new(),
        }
    }

    /// How many requests wait for this endpoint.
    pub(crate) fn waiting_for(&self, endpoint: usize) -> usize {
        self.with(|state| state.by_endpoint.get(endpoint).copied().unwrap_or(0))
    }

    /// The gauge `{project}.waiting`, read whenever metrics are exported.
    pub(super) fn export(self: &Arc<Self>, project: &'static str) {
        let queue: Weak<RequestQueue> = Arc::downgrade(self);
        let count = move || {
            let queue = queue.upgrade()?;
            Some(queue.with(|state| state.queue.len() as u64))
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

    /// Adds a request of `caller`; returns those that do not fit.
    pub(super) fn push(&self, caller: &Arc<str>, request: RawRequest) -> Vec<RawRequest> {
        let refused = self.with(|state| {
            state.by_endpoint[request.endpoint] += 1;
            let refused = state.queue.push(caller, request.bytes(), request);
            state.forget(&refused);
            refused
        });
        self.changed.notify_one();
        refused
    }

    /// The request whose turn it is.
    pub(super) fn pop(&self) -> Option<RawRequest> {
        self.with(|state| {
            let next = state.queue.pop();
            state.forget(next.as_slice());
            next
        })
    }

    /// Removes requests that have waited longer than `deadline`.
    pub(super) fn expire(&self, deadline: Duration) -> Vec<RawRequest> {
        self.with(|state| {
            let late = state
                .queue
                .expire(|request| request.arrived.elapsed() > deadline);
            state.forget(&late);
            late
        })
    }

    /// Whether a request waits.
    pub(super) fn any(&self) -> bool {
        self.with(|state| !state.queue.is_empty())
    }

    /// No more requests will be pushed.
    pub(super) fn close(&self) {
        self.with(|state| state.closed = true);
        self.changed.notify_one();
    }

    /// Waits until something is pushed or the queue is closed.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Whether it is closed and empty.
    pub(super) fn is_over(&self) -> bool {
        self.with(|state| state.closed && state.queue.is_empty())
    }
}

impl State {
    /// Counts down the requests that left the queue.
    fn forget(&mut self, gone: &[RawRequest]) {
        for request in gone {
            self.by_endpoint[request.endpoint] -= 1;
        }
    }
}
