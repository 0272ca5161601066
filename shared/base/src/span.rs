//! Spans that end as errors unless their work was done.

use std::borrow::Cow;

use tracing::Span;

/// Marks a span as failed when it is dropped before [`done`](SpanGuard::done): a future that is given up at a deadline never
/// gets to say so itself. The span needs the fields `otel.status_code` and `error.type`.
#[derive(Debug)]
pub struct SpanGuard {
    span: Span,
    error_type: Option<Cow<'static, str>>,
}

impl SpanGuard {
    /// Until something else is known it failed for want of time.
    pub fn new(span: &Span) -> SpanGuard {
        SpanGuard {
            span: span.clone(),
            error_type: Some(Cow::Borrowed("timeout")),
        }
    }

    /// It is no failure.
    pub fn done(mut self) {
        self.error_type = None;
    }

    /// It failed of something else: a code, never an error's text, which may hold a message.
    pub fn failed(mut self, error_type: impl Into<Cow<'static, str>>) {
        self.error_type = Some(error_type.into());
    }
}

impl Drop for SpanGuard {
    fn drop(&mut self) {
        if let Some(error_type) = &self.error_type {
            self.span.record("otel.status_code", "ERROR");
            self.span.record("error.type", error_type.as_ref());
        }
    }
}
