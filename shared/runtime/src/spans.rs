//! Spans that end as errors unless their work was done.

use std::borrow::Cow;
use std::future::Future;

use tracing::{Instrument, Span};

/// Marks a span as failed when it is dropped before [`done`](Failing::done): a future that is given up at a deadline never
/// gets to say so itself. The span needs the fields `otel.status_code` and `error.type`.
#[derive(Debug)]
pub struct Failing {
    span: Span,
    error_type: Option<Cow<'static, str>>,
}

impl Failing {
    /// Until something else is known it failed for want of time.
    pub fn new(span: &Span) -> Failing {
        Failing {
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

impl Drop for Failing {
    fn drop(&mut self) {
        if let Some(error_type) = &self.error_type {
            self.span.record("otel.status_code", "ERROR");
            self.span.record("error.type", error_type.as_ref());
        }
    }
}

/// Runs a query below a span of its own, named `select messages`, that is an error unless the query succeeds: when
/// PostgreSQL answers with an error (`error.type` is its SQLSTATE), when the connection breaks, and when the query is given
/// up at a deadline, which drops the future.
///
/// # Errors
/// The query's.
pub async fn query_span<T>(
    operation: &'static str,
    table: &'static str,
    query: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    let span = tracing::info_span!(
        "query",
        otel.name = format!("{operation} {table}"),
        otel.kind = "client",
        otel.status_code = tracing::field::Empty,
        db.system.name = "postgresql",
        db.operation.name = operation,
        db.collection.name = table,
        error.r#type = tracing::field::Empty,
    );
    let failing = Failing::new(&span);
    let outcome = query.instrument(span).await;
    match &outcome {
        Ok(_) => failing.done(),
        Err(error) => failing.failed(
            match error.as_database_error().and_then(|error| error.code()) {
                Some(state) => Cow::Owned(state.into_owned()),
                None => Cow::Borrowed("connection"),
            },
        ),
    }
    outcome
}
