//! Spans that end as errors unless their work succeeds.

use std::borrow::Cow;

use tracing::Span;

/// Marks a span as failed when dropped before [`done`](SpanGuard::done). A future that is dropped
/// at its deadline cannot do so itself. The span needs the fields `otel.status_code` and
/// `error.type`.
#[derive(Debug)]
pub struct SpanGuard {
    span: Span,
    error_type: Option<Cow<'static, str>>,
}

impl SpanGuard {
    /// Until [`done`](Self::done) or [`failed`](Self::failed) is called, the error is a timeout.
    pub fn new(span: &Span) -> SpanGuard {
        SpanGuard {
            span: span.clone(),
            error_type: Some(Cow::Borrowed("timeout")),
        }
    }

    /// The work succeeded.
    pub fn done(mut self) {
        self.error_type = None;
    }

    /// The work failed. `error_type` is a code, never an error's text, because that may contain the
    /// text of a message.
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
