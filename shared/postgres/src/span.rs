//! A span for each query.

use std::borrow::Cow;
use std::future::Future;

use tracing::Instrument;

use base::span::SpanGuard;

/// Runs a query in a span of its own, named for example `select messages`. The span is an error
/// when PostgreSQL answers with an error (`error.type` is its SQLSTATE), when the connection
/// breaks, and when the query is given up at a deadline, which drops the future.
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
    let guard = SpanGuard::new(&span);
    let outcome = query.instrument(span).await;
    match &outcome {
        Ok(_) => guard.done(),
        Err(error) => guard.failed(
            match error.as_database_error().and_then(|error| error.code()) {
                Some(state) => Cow::Owned(state.into_owned()),
                None => Cow::Borrowed("connection"),
            },
        ),
    }
    outcome
}
