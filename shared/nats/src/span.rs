//! Spans of the OpenTelemetry messaging conventions.

use tracing::Span;
use tracing::field::Empty;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// A span for sending one message: `send {template}`, where `template` is the subject without what
/// differs from message to message. A child of `parent`; [`Span::none`] begins a trace.
///
/// Works with [`base::span::SpanGuard`]. The caller records `messaging.message.id`, and writes the
/// span's context into the message ([`inject_trace`](crate::trace::inject_trace)).
pub fn send_span(parent: &Span, subject: &str, template: &str) -> Span {
    tracing::info_span!(
        parent: parent,
        "send",
        otel.name = format!("send {template}"),
        otel.kind = "producer",
        otel.status_code = Empty,
        error.r#type = Empty,
        messaging.system = "nats",
        messaging.operation.name = "send",
        messaging.operation.r#type = "send",
        messaging.destination.name = subject,
        messaging.destination.template = template,
        messaging.message.id = Empty,
    )
}

/// Adds an attribute that the span does not declare as a field: one of the application's own.
pub fn set_attribute(span: &Span, name: &'static str, value: i64) {
    span.set_attribute(name, value);
}
