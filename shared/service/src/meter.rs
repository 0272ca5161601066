//! Counts what endpoints, jobs and other work do, for STATS and for metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::telemetry::Instruments;
use base::discovery::{EndpointInfo, EndpointStats};

/// Counts what an endpoint or a job did, for STATS and for metrics.
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
    instruments: Instruments,
}

impl Meter {
    pub(crate) fn new(project: &'static str, endpoint: &'static str) -> Meter {
        Meter(Arc::new(Counters {
            endpoint,
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            nanos: AtomicU64::new(0),
            last_error: Mutex::default(),
            data: Mutex::default(),
            instruments: Instruments::new(project),
        }))
    }

    /// `requests` were handled; all of them together took `took`.
    pub fn handled(&self, requests: u64, took: Duration) {
        self.0.requests.fetch_add(requests, Ordering::Relaxed);
        self.0.nanos.fetch_add(
            u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
        self.0.instruments.handled(self.0.endpoint, requests, took);
    }

    /// One request was refused. `what` is shown to operators: `code:reason`.
    pub fn refused(&self, what: String) {
        self.0.errors.fetch_add(1, Ordering::Relaxed);
        self.0.instruments.refused(self.0.endpoint);
        *self
            .0
            .last_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = what;
    }

    /// Adds to a counter with this name, which STATS shows under `data`.
    pub fn count(&self, name: &str, more: u64) {
        if more > 0 {
            let mut data = self.0.data.lock().unwrap_or_else(PoisonError::into_inner);
            *data.entry(name.to_owned()).or_default() += more;
        }
    }

    /// Sets a gauge, which STATS shows under `data` and metrics export as `{project}.{name}`.
    pub fn gauge(&self, name: &'static str, value: u64) {
        self.0
            .data
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name.to_owned(), value);
        self.0.instruments.gauge(name, value);
    }

    pub(crate) fn endpoint(&self) -> &'static str {
        self.0.endpoint
    }

    pub(crate) fn stats(&self, endpoint: &EndpointInfo) -> EndpointStats {
        let requests = self.0.requests.load(Ordering::Relaxed);
        let nanos = self.0.nanos.load(Ordering::Relaxed);
        EndpointStats {
            name: endpoint.name.clone(),
            subject: endpoint.subject.clone(),
            queue_group: endpoint.queue_group.clone(),
            num_requests: requests,
            num_errors: self.0.errors.load(Ordering::Relaxed),
            last_error: self
                .0
                .last_error
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            processing_time: nanos,
            average_processing_time: nanos.checked_div(requests).unwrap_or(0),
            data: self
                .0
                .data
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        }
    }
}
