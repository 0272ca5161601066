//! Exporters that log once when the collector is away, and once when it is back.
//!
//! The SDK logs every failed batch. Those events are left out of the log (see `telemetry.rs`),
//! because a filter must be pure and so cannot count. What an operator needs to know is logged
//! here, where every outcome passes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::logs::{LogBatch, LogExporter};
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};

/// What an exporter exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    Traces,
    Metrics,
    Logs,
}

impl Signal {
    const fn name(self) -> &'static str {
        match self {
            Signal::Traces => "traces",
            Signal::Metrics => "metrics",
            Signal::Logs => "logs",
        }
    }
}

/// Whether the collector accepts what we send, shared by the exporters of one process.
#[derive(Debug, Clone, Default)]
pub(crate) struct Collector(Arc<Mutex<[State; 3]>>);

#[derive(Debug, Clone, Copy, Default)]
struct State {
    failing: bool,
    /// Its failure was logged, so its recovery will be.
    logged: bool,
    /// It was accepted since the last line about a failure, so another failure is news.
    accepted: bool,
}

/// A change that is worth a line.
#[derive(Debug, PartialEq, Eq)]
enum News {
    Away,
    Back,
}

impl Collector {
    /// Whether the last export of any signal failed.
    pub(crate) fn is_away(&self) -> bool {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .any(|state| state.failing)
    }

    fn observe(&self, signal: Signal, outcome: &OTelSdkResult) {
        // After a shutdown nothing is sent, so this is not about the collector.
        if matches!(outcome, Err(OTelSdkError::AlreadyShutdown)) {
            return;
        }
        let signal_name = signal.name();
        match (self.change(signal, outcome.is_ok()), outcome) {
            (Some(News::Away), Err(error)) => tracing::warn!(
                signal = signal_name,
                %error,
                "the OpenTelemetry collector is away: what cannot be sent is dropped, and requests \
                 are served as before; check OTEL_EXPORTER_OTLP_ENDPOINT if this stays"
            ),
            (Some(News::Back), _) => {
                tracing::info!(signal = signal_name, "the OpenTelemetry collector is back");
            }
            _ => {}
        }
    }

    /// When the collector is away, all three signals fail, and that is one line. When it accepts
    /// traces and refuses metrics, as Jaeger does, that is one line as well, and not one for each
    /// accepted trace.
    fn change(&self, signal: Signal, accepted: bool) -> Option<News> {
        let mut states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let others_fail = states.iter().any(|state| state.failing);
        let state = &mut states[signal as usize];
        if accepted {
            state.accepted = true;
            let recovered = std::mem::replace(&mut state.failing, false);
            // The line may have named another signal, which has nothing to send for hours. This one
            // failed at the same time, so its recovery counts.
            let logged = state.logged || recovered && states.iter().any(|state| state.logged);
            if !logged {
                return None;
            }
            // The next failure of any signal is news.
            for state in states.iter_mut() {
                (state.failing, state.logged) = (false, false);
            }
            return Some(News::Back);
        }
        if std::mem::replace(&mut state.failing, true) || (others_fail && !state.accepted) {
            return None;
        }
        state.logged = true;
        for state in states.iter_mut() {
            state.accepted = false;
        }
        Some(News::Away)
    }
}

/// An exporter whose outcomes the [`Collector`] observes.
#[derive(Debug)]
pub(crate) struct Observed<E> {
    exporter: E,
    signal: Signal,
    collector: Collector,
}

impl<E> Observed<E> {
    pub(crate) fn new(exporter: E, signal: Signal, collector: &Collector) -> Observed<E> {
        Observed {
            exporter,
            signal,
            collector: collector.clone(),
        }
    }

    fn observe(&self, outcome: OTelSdkResult) -> OTelSdkResult {
        self.collector.observe(self.signal, &outcome);
        outcome
    }
}

impl<E: SpanExporter> SpanExporter for Observed<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.observe(self.exporter.export(batch).await)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl<E: PushMetricExporter> PushMetricExporter for Observed<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        self.observe(self.exporter.export(metrics).await)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.exporter.temporality()
    }
}

impl<E: LogExporter> LogExporter for Observed<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        self.observe(self.exporter.export(batch).await)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_that_is_away_is_one_line_and_one_when_it_is_back() {
        let collector = Collector::default();
        for signal in [Signal::Traces, Signal::Metrics, Signal::Logs] {
            assert_eq!(collector.change(signal, true), None);
        }
        assert_eq!(collector.change(Signal::Logs, false), Some(News::Away));
        for signal in [
            Signal::Traces,
            Signal::Metrics,
            Signal::Logs,
            Signal::Traces,
        ] {
            assert_eq!(collector.change(signal, false), None);
        }
        assert!(collector.is_away());
        // A quiet function has no log records to send; any signal shows that the collector is back.
        assert_eq!(collector.change(Signal::Traces, true), Some(News::Back));
        assert_eq!(collector.change(Signal::Logs, true), None);
        assert_eq!(collector.change(Signal::Metrics, true), None);
        assert!(!collector.is_away());
        assert_eq!(
            collector.change(Signal::Metrics, false),
            Some(News::Away),
            "a second time"
        );
    }

    #[test]
    fn a_signal_the_collector_never_accepts_hides_no_outage() {
        let collector = Collector::default();
        assert_eq!(collector.change(Signal::Metrics, false), Some(News::Away));
        for _ in 0..3 {
            assert_eq!(collector.change(Signal::Traces, true), None);
            assert_eq!(collector.change(Signal::Metrics, false), None);
        }
        assert_eq!(collector.change(Signal::Traces, false), Some(News::Away));
        assert_eq!(collector.change(Signal::Traces, false), None);
        assert_eq!(collector.change(Signal::Traces, true), Some(News::Back));
    }
}
