//! Traces, metrics and logs over OTLP, configured by the standard `OTEL_*` variables; and always a
//! plain log on standard error.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use opentelemetry::metrics::{Counter, Gauge, Histogram};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry::{Key, KeyValue, global};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::logs::SdkLoggerProvider;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SdkTracerProvider};
use tracing::{Level, Metadata};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::collector::{Collector, Observed, Signal};
use crate::exporter;
use crate::function::Identity;
use crate::log_filter::log_filter;
use crate::stop::{Deadline, Step};
use base::error::Fatal;

/// The span of a batch links to each of its messages; the SDK's default is 128 links.
const MAX_LINKS: u32 = 1_024;
/// How long the last export may take if the one before failed: one attempt, in case the collector
/// is back.
const EXPORT_AWAY: Duration = Duration::from_millis(200);
/// Buckets of `{project}.duration`, in seconds. The SDK's default buckets are made for milliseconds
/// and would put everything below five seconds into one. These are those of the semantic
/// conventions, and finer ones below 5 ms for replies from memory.
const DURATIONS: [f64; 17] = [
    0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
    7.5, 10.0,
];
const INSTANCE_ID: Key = Key::from_static_str("service.instance.id");

/// What has to be exported before the process ends.
#[derive(Debug, Default)]
pub struct Telemetry {
    traces: Option<SdkTracerProvider>,
    metrics: Option<SdkMeterProvider>,
    logs: Option<SdkLoggerProvider>,
    collector: Collector,
}

impl Telemetry {
    /// Sets up the log of the process, and an exporter for each signal that the environment asks
    /// for; `instance` identifies this process in what they export. Call it once, inside the tokio
    /// runtime.
    ///
    /// # Errors
    /// An `OTEL_*` variable is wrong.
    pub fn start(identity: &Identity, instance: &str) -> Result<Telemetry, Fatal> {
        let resource = resource(identity, instance);
        let mut telemetry = Telemetry::default();
        let collector = &telemetry.collector;
        if exports("TRACES") {
            let exporter = exporter::spans()?;
            let provider = SdkTracerProvider::builder()
                .with_batch_exporter(Observed::new(exporter, Signal::Traces, collector))
                .with_max_links_per_span(MAX_LINKS)
                .with_resource(resource.clone())
                .build();
            global::set_text_map_propagator(TraceContextPropagator::new());
            telemetry.traces = Some(provider);
        }
        if exports("METRICS") {
            let exporter = exporter::metrics()?;
            let reader =
                PeriodicReader::builder(Observed::new(exporter, Signal::Metrics, collector))
                    .build();
            let provider = SdkMeterProvider::builder()
                .with_reader(reader)
                .with_resource(resource.clone())
                .build();
            global::set_meter_provider(provider.clone());
            telemetry.metrics = Some(provider);
        }
        if exports("LOGS") {
            let exporter = exporter::logs()?;
            let exporter = Observed::new(exporter, Signal::Logs, collector);
            telemetry.logs = Some(
                SdkLoggerProvider::builder()
                    .with_batch_exporter(exporter)
                    .with_resource(resource)
                    .build(),
            );
        }
        let plain = tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .with_filter(log_filter())
            // Spans are for traces. In the plain log they would cost time for every request.
            .with_filter(filter_fn(|metadata| metadata.is_event()))
            .with_filter(filter_fn(is_not_an_exporters));
        let spans = telemetry.traces.as_ref().map(|provider| {
            tracing_opentelemetry::layer()
                .with_tracer(provider.tracer(identity.project))
                .with_location(false)
                .with_threads(false)
                .with_filter(filter_fn(is_ours))
        });
        let records = telemetry.logs.as_ref().map(|provider| {
            OpenTelemetryTracingBridge::new(provider).with_filter(filter_fn(is_ours))
        });
        tracing_subscriber::registry()
            .with(plain)
            .with(spans)
            .with(records)
            .try_init()
            .map_err(|_| Fatal::new("the log was set up twice"))?;
        Ok(telemetry)
    }

    /// Sends what is left, for at most two seconds. Blocks; call it outside the runtime's tasks.
    pub fn stop(self) {
        self.stop_before(Deadline::start());
    }

    /// The same within a deadline that other steps of stopping share.
    pub(crate) fn stop_before(self, deadline: Deadline) {
        let Telemetry {
            traces,
            metrics,
            logs,
            collector,
        } = self;
        let mut limit = deadline.left_for(Step::Export);
        if collector.is_away() {
            limit = limit.min(EXPORT_AWAY);
        }
        // Side by side, because each may take all of the time. On threads that are left behind
        // when it is up, because the SDK gives the last metrics five seconds whatever limit it
        // gets. Errors are ignored: a collector that is away was logged before.
        let (done, all_done) = mpsc::channel::<()>();
        let spawn = |flush: Box<dyn FnOnce() + Send>| {
            let done = done.clone();
            std::thread::spawn(move || {
                flush();
                drop(done);
            });
        };
        spawn(Box::new(move || {
            _ = traces.map(|traces| traces.shutdown_with_timeout(limit))
        }));
        spawn(Box::new(move || {
            _ = metrics.map(|metrics| metrics.shutdown_with_timeout(limit))
        }));
        spawn(Box::new(move || {
            _ = logs.map(|logs| logs.shutdown_with_timeout(limit))
        }));
        drop(done);
        // Nothing is ever sent: this returns when the last thread has dropped its sender.
        let _ = all_done.recv_timeout(limit);
    }
}

/// A new id for this process, for the service API and for OpenTelemetry: 32 random hexadecimal
/// digits.
pub fn new_instance_id() -> String {
    RandomIdGenerator::default().new_trace_id().to_string()
}

/// What the exported data is about. Two replicas differ in nothing but the instance; without it,
/// their counters would be one series that jumps back and forth.
fn resource(identity: &Identity, instance: &str) -> Resource {
    let configured = Resource::builder().build();
    let mut resource = Resource::builder()
        .with_service_name(service_name(identity))
        .with_attribute(KeyValue::new("service.version", identity.version));
    if configured.get(&INSTANCE_ID).is_none() {
        resource = resource.with_attribute(KeyValue::new(INSTANCE_ID, instance.to_owned()));
    }
    resource.build()
}

fn service_name(identity: &Identity) -> String {
    variable("OTEL_SERVICE_NAME").unwrap_or_else(|| identity.name.to_owned())
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether the environment asks for this signal. The SDK itself ignores `OTEL_SDK_DISABLED` and
/// `OTEL_*_EXPORTER`, and would export to localhost when nothing is set.
fn exports(signal: &str) -> bool {
    if variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return false;
    }
    match variable(&format!("OTEL_{signal}_EXPORTER")).as_deref() {
        Some("otlp") => true,
        Some(_) => false,
        None => variable("OTEL_EXPORTER_OTLP_ENDPOINT")
            .or_else(|| variable(&format!("OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")))
            .is_some(),
    }
}

/// Spans and log records of functions, not those of the exporters: exporting these would cause new
/// ones.
fn is_ours(metadata: &Metadata<'_>) -> bool {
    const FOREIGN: [&str; 7] = [
        "opentelemetry",
        "h2",
        "hyper",
        "tonic",
        "tower",
        "ureq",
        "rustls",
    ];
    *metadata.level() <= Level::INFO
        && !FOREIGN
            .iter()
            .any(|name| metadata.target().starts_with(name))
}

/// Leaves out the exporters' event for each failed batch, because [`Collector`] logs once that the
/// collector is away. The SDK's event for a full queue stays; it comes once.
fn is_not_an_exporters(metadata: &Metadata<'_>) -> bool {
    !metadata.target().starts_with("opentelemetry") || metadata.name().ends_with("DroppingStarted")
}

/// The instruments behind one [`crate::meter::Meter`].
#[derive(Debug)]
pub(crate) struct Instruments {
    project: &'static str,
    handled: Counter<u64>,
    refused: Counter<u64>,
    duration: Histogram<f64>,
    gauges: Mutex<HashMap<&'static str, Gauge<u64>>>,
}

impl Instruments {
    pub(crate) fn new(project: &'static str) -> Instruments {
        let meter = global::meter(project);
        Instruments {
            project,
            handled: meter
                .u64_counter(format!("{project}.handled"))
                .with_description("Requests answered or messages handled")
                .build(),
            refused: meter
                .u64_counter(format!("{project}.refused"))
                .with_description("Requests refused or messages rejected")
                .build(),
            duration: meter
                .f64_histogram(format!("{project}.duration"))
                .with_unit("s")
                .with_description("Time spent on one call")
                .with_boundaries(DURATIONS.to_vec())
                .build(),
            gauges: Mutex::default(),
        }
    }

    pub(crate) fn handled(&self, endpoint: &'static str, requests: u64, took: Duration) {
        let attributes = [KeyValue::new("endpoint", endpoint)];
        self.handled.add(requests, &attributes);
        self.duration.record(took.as_secs_f64(), &attributes);
    }

    pub(crate) fn gauge(&self, name: &'static str, value: u64) {
        let project = self.project;
        let new = || {
            global::meter(project)
                .u64_gauge(format!("{project}.{name}"))
                .build()
        };
        let mut gauges = self.gauges.lock().unwrap_or_else(PoisonError::into_inner);
        gauges.entry(name).or_insert_with(new).record(value, &[]);
    }

    pub(crate) fn refused(&self, endpoint: &'static str) {
        self.refused.add(1, &[KeyValue::new("endpoint", endpoint)]);
    }
}
