//! The OTLP exporters: http/protobuf, or gRPC in a build with the feature `grpc`.
//!
//! HTTP goes through ureq, which blocks: the SDK exports on threads of its own, outside the tokio
//! runtime. An async client would bring a second HTTP stack into every binary for three requests a
//! few seconds apart.

use std::sync::Arc;
use std::time::Duration;

use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response, ResponseBodyTooLarge};
use opentelemetry_otlp::{
    ExporterBuildError, LogExporter, MetricExporter, SpanExporter, WithHttpConfig,
};
use ureq::Agent;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use base::error::Fatal;

/// What the specification gives an export when no variable says otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// A collector answers with a few bytes; more than this is not read.
const MAX_REPLY_BYTES: u64 = 64 * 1024;

/// An exporter for spans, by the standard variables.
///
/// # Errors
/// A variable that cannot be honoured.
pub(crate) fn spans() -> Result<SpanExporter, Fatal> {
    if wants_grpc("TRACES")? {
        return SpanExporter::builder().build().map_err(wrong);
    }
    let http = SpanExporter::builder().with_http();
    http.with_http_client(Client::new("TRACES"))
        .build()
        .map_err(wrong)
}

/// The same for metrics.
pub(crate) fn metrics() -> Result<MetricExporter, Fatal> {
    if wants_grpc("METRICS")? {
        return MetricExporter::builder().build().map_err(wrong);
    }
    let http = MetricExporter::builder().with_http();
    http.with_http_client(Client::new("METRICS"))
        .build()
        .map_err(wrong)
}

/// The same for log records.
pub(crate) fn logs() -> Result<LogExporter, Fatal> {
    if wants_grpc("LOGS")? {
        return LogExporter::builder().build().map_err(wrong);
    }
    let http = LogExporter::builder().with_http();
    http.with_http_client(Client::new("LOGS"))
        .build()
        .map_err(wrong)
}

fn wrong(error: ExporterBuildError) -> Fatal {
    Fatal::new(format!("configuration: OTEL_*: {error}"))
}

/// The variable of one signal, otherwise the one for all of them.
fn variable(signal: &str, name: &str) -> Option<String> {
    let of = |name: String| std::env::var(name).ok().filter(|value| !value.is_empty());
    of(format!("OTEL_EXPORTER_OTLP_{signal}_{name}"))
        .or_else(|| of(format!("OTEL_EXPORTER_OTLP_{name}")))
}

fn wants_grpc(signal: &str) -> Result<bool, Fatal> {
    let wanted = variable(signal, "PROTOCOL").is_some_and(|protocol| protocol == "grpc");
    if wanted && !cfg!(feature = "grpc") {
        return Err(Fatal::new(
            "configuration: OTEL_EXPORTER_OTLP_PROTOCOL=grpc needs a build with \
             `--features service/grpc`; this one speaks http/protobuf, usually on port 4318",
        ));
    }
    Ok(wanted)
}

/// One signal's connection to the collector.
#[derive(Debug)]
struct Client(Agent);

impl Client {
    fn new(signal: &str) -> Client {
        let timeout = variable(signal, "TIMEOUT")
            .and_then(|milliseconds| milliseconds.parse().ok())
            .map_or(DEFAULT_TIMEOUT, Duration::from_millis);
        let mut config = Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false);
        if variable(signal, "ENDPOINT").is_some_and(|endpoint| endpoint.starts_with("https:")) {
            config = config.tls_config(tls());
        }
        Client(config.build().new_agent())
    }
}

/// TLS that trusts what this machine trusts, as connections to NATS do.
fn tls() -> TlsConfig {
    let found = rustls_native_certs::load_native_certs();
    let trusted = found
        .certs
        .iter()
        .map(|certificate| Certificate::from_der(certificate).to_owned())
        .collect();
    TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(trusted)))
        .build()
}

#[async_trait::async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = request.into_parts();
        let reply = self.0.run(Request::from_parts(parts, &body[..]))?;
        let (parts, mut body) = reply.into_parts();
        let body = match body.with_config().limit(MAX_REPLY_BYTES).read_to_vec() {
            Ok(body) => body,
            Err(ureq::Error::BodyExceedsLimit(_)) => return Err(ResponseBodyTooLarge::new().into()),
            Err(error) => return Err(error.into()),
        };
        Ok(Response::from_parts(parts, body.into()))
    }
}
