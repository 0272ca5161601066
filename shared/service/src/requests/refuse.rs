//! Refusing requests that will not be handled, at the lowest cost.

use std::sync::Arc;
use std::time::Duration;

use opentelemetry::metrics::Counter;
use opentelemetry::{KeyValue, global};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::RawRequest;
use crate::responder::{Service, may_reply_to};
use base::error::{Code, Error};

/// Refusals that may wait to be sent; the callers of more get no reply.
const CAPACITY: usize = 16 * 1_024;

/// Why a request is refused without being handled.
#[derive(Clone, Copy)]
pub(super) enum Why {
    Overloaded,
    Late,
}

/// Refuses requests without handling them, and counts them.
#[derive(Clone)]
pub(super) struct Refuser {
    service: Arc<Service>,
    refusals: mpsc::Sender<(String, Error)>,
    counters: Counters,
}

#[derive(Clone)]
struct Counters {
    overloaded: Counter<u64>,
    late: Counter<u64>,
}

impl Counters {
    fn new(project: &'static str) -> Counters {
        let meter = global::meter(project);
        let counter = |name, about| {
            let name = format!("{project}.{name}");
            meter.u64_counter(name).with_description(about).build()
        };
        Counters {
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
    /// The refuser, and the task that sends its replies. The task ends when every clone of the
    /// refuser has been dropped.
    pub(super) fn start(service: Arc<Service>) -> (Refuser, JoinHandle<()>) {
        let (refusals, to_send) = mpsc::channel(CAPACITY);
        let refuser = Refuser {
            service: service.clone(),
            refusals,
            counters: Counters::new(service.identity.project),
        };
        (refuser, tokio::spawn(send(service, to_send)))
    }

    /// Never waits: a reply that does not fit into the channel is not sent.
    pub(super) fn refuse(&self, request: RawRequest, why: Why) {
        let endpoint = &self.service.endpoints[request.endpoint];
        let (counter, name, reason) = match why {
            Why::Overloaded => (
                &self.counters.overloaded,
                "overloaded",
                "too many requests are waiting; try again",
            ),
            Why::Late => (
                &self.counters.late,
                "late",
                "this waited too long; try again",
            ),
        };
        let error = Error::new(Code::Unavailable, reason);
        counter.add(1, &[KeyValue::new("endpoint", endpoint.meter.endpoint())]);
        endpoint.meter.count(name, 1);
        endpoint.meter.handled(1, Duration::ZERO);
        endpoint
            .meter
            .refused(format!("{}:{reason}", error.code.number()));
        if let Some(reply) = request.reply.filter(|reply| may_reply_to(reply)) {
            let _ = self.refusals.try_send((reply, error));
        }
    }
}

async fn send(service: Arc<Service>, mut refusals: mpsc::Receiver<(String, Error)>) {
    while let Some((reply, error)) = refusals.recv().await {
        service.send(reply, Err(error)).await;
    }
}
