//! Trace context in the headers of messages (W3C `traceparent`).

use async_nats::header::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::global;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

struct Carrier<'a>(&'a HeaderMap);

impl Extractor for Carrier<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(HeaderValue::as_str)
    }

    fn keys(&self) -> Vec<&str> {
        self.0.iter().map(|(name, _)| name.as_ref()).collect()
    }
}

struct CarrierMut<'a>(&'a mut HeaderMap);

impl Injector for CarrierMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (key.parse::<HeaderName>(), value.parse::<HeaderValue>()) {
            self.0.insert(name, value);
        }
    }
}

fn remote_context(headers: Option<&HeaderMap>) -> Option<opentelemetry::Context> {
    let headers = headers?;
    headers.get("traceparent")?;
    let context = TraceContextPropagator::new().extract(&Carrier(headers));
    context.span().span_context().is_valid().then_some(context)
}

/// Makes `span` a child of the span whose `traceparent` the headers carry, if any.
pub fn remote_parent(span: &Span, headers: Option<&HeaderMap>) {
    if !span.is_disabled()
        && let Some(context) = remote_context(headers)
    {
        // Fails only where no exporter is set up, and then there is no trace to continue.
        let _ = span.set_parent(context);
    }
}

/// Links `span` to the sampled span whose `traceparent` the headers carry. Returns whether there
/// was one.
pub fn link(span: &Span, headers: Option<&HeaderMap>) -> bool {
    let Some(context) = remote_context(headers) else {
        return false;
    };
    let remote = context.span().span_context().clone();
    let sampled = remote.is_sampled();
    if sampled {
        span.add_link(remote);
    }
    sampled
}

/// The `traceparent` in the headers if its span was sampled, for continuing the trace later.
pub fn sampled_traceparent(headers: Option<&HeaderMap>) -> Option<String> {
    let sampled = remote_context(headers)?.span().span_context().is_sampled();
    sampled
        .then(|| {
            headers?
                .get("traceparent")
                .map(|value| value.as_str().to_owned())
        })
        .flatten()
}

/// Writes the `traceparent` of `span` into `headers`.
pub fn inject_trace(span: &Span, headers: &mut HeaderMap) {
    global::get_text_map_propagator(|propagator| {
        propagator.inject_context(&span.context(), &mut CarrierMut(headers))
    });
}
