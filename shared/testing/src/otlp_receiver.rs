//! A real OTLP receiver.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1 as otlp;
use prost::Message;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use crate::POLL_INTERVAL;

/// Receives what OpenTelemetry exporters send: HTTP/1.1 with protobuf on a free port of 127.0.0.1.
/// Give a function `OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf` and
/// `OTEL_EXPORTER_OTLP_ENDPOINT=<endpoint>`; [`vars`](Self::vars) has both.
pub struct OtlpReceiver {
    endpoint: String,
    received: Arc<Mutex<Received>>,
    listening: JoinHandle<()>,
}

#[derive(Default)]
struct Received {
    spans: Vec<Span>,
    metrics: Vec<Metric>,
    logs: Vec<Log>,
    bodies: Vec<Vec<u8>>,
}

/// A finished span. Ids are lower-case hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// 32 digits.
    pub trace_id: String,
    /// 16 digits.
    pub span_id: String,
    /// 16 digits; `None` for the root of a trace.
    pub parent_span_id: Option<String>,
    /// As `send chat.general`.
    pub name: String,
    /// `internal`, `server`, `client`, `producer`, `consumer`, or `unspecified`.
    pub kind: &'static str,
    /// `unset`, `ok` or `error`.
    pub status: &'static str,
    /// `service.name` of the resource, empty without one.
    pub service: String,
    /// Values of other types than text as they print: `42`, `true`, `[a, b]`.
    pub attributes: BTreeMap<String, String>,
    /// Trace id and span id of each link.
    pub links: Vec<(String, String)>,
    /// Unix nanoseconds.
    pub start_unix_ns: u64,
    /// Unix nanoseconds.
    pub end_unix_ns: u64,
}

/// A metric, once per export.
#[derive(Debug, Clone, PartialEq)]
pub struct Metric {
    /// `service.name` of the resource, empty without one.
    pub service: String,
    /// `service.instance.id` of the resource, empty without one.
    pub instance: String,
    /// As `messaging.process.duration`.
    pub name: String,
    /// As `s`, `By`, `{message}`.
    pub unit: String,
    /// The upper bounds of a histogram's buckets; empty for whatever is none.
    pub bounds: Vec<f64>,
}

/// A log record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// `service.name` of the resource, empty without one.
    pub service: String,
    /// As `INFO`.
    pub severity: String,
    /// The message.
    pub body: String,
    /// As a span's.
    pub attributes: BTreeMap<String, String>,
    /// 32 hexadecimal digits; `None` outside a trace.
    pub trace_id: Option<String>,
}

impl OtlpReceiver {
    /// Listens on a free port.
    ///
    /// # Panics
    ///
    /// Without a tokio runtime.
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1:0").await
    }

    /// Listens on an address of the test's choice: one that was known before anybody listened
    /// there.
    ///
    /// # Panics
    ///
    /// Without a tokio runtime, and when the address is taken.
    pub async fn start_at(address: &str) -> Self {
        let listener = TcpListener::bind(address)
            .await
            .expect("the address is free");
        let endpoint = format!(
            "http://{}",
            listener.local_addr().expect("a listener has an address")
        );
        let received = Arc::new(Mutex::new(Received::default()));
        let into = received.clone();
        let listening = tokio::spawn(async move {
            // An exporter that hangs up, or talks nonsense, is its own business; the test waits for
            // its spans. The connections end with the receiver, or their clients would go on
            // talking to it.
            let mut connections = JoinSet::new();
            while let Ok((connection, _)) = listener.accept().await {
                connections.spawn(serve(connection, into.clone()));
            }
        });
        Self {
            endpoint,
            received,
            listening,
        }
    }

    /// `http://127.0.0.1:<port>`.
    pub fn endpoint(&self) -> String {
        self.endpoint.clone()
    }

    /// The environment that makes a function send here, and soon: every 100 ms instead of every 5 s
    /// (spans), second (logs), minute (metrics).
    pub fn vars(&self) -> Vec<(&'static str, &str)> {
        vec![
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &self.endpoint),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_BSP_SCHEDULE_DELAY", "100"),
            ("OTEL_BLRP_SCHEDULE_DELAY", "100"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "100"),
        ]
    }

    /// All spans so far, in the order of arrival: children usually before parents.
    pub fn spans(&self) -> Vec<Span> {
        self.received().spans.clone()
    }

    /// All metrics so far, once per export.
    pub fn metrics(&self) -> Vec<Metric> {
        self.received().metrics.clone()
    }

    /// All log records so far.
    pub fn logs(&self) -> Vec<Log> {
        self.received().logs.clone()
    }

    /// Every request body so far, of all three signals, as it came. Protobuf holds texts unchanged,
    /// so that a search in these bytes finds a text that leaked anywhere.
    pub fn bodies(&self) -> Vec<Vec<u8>> {
        self.received().bodies.clone()
    }

    /// Whether `text` stands anywhere in what was received: name, attribute, body, whatever signal.
    pub fn contains(&self, text: &str) -> bool {
        self.received().bodies.iter().any(|body| {
            body.windows(text.len())
                .any(|window| window == text.as_bytes())
        })
    }

    /// Waits until `enough` says so of the spans so far, and returns them.
    ///
    /// # Panics
    ///
    /// With `what`, and the names of the spans that did come, when `within` has passed.
    pub async fn wait_for(
        &self,
        what: &str,
        within: Duration,
        enough: impl Fn(&[Span]) -> bool,
    ) -> Vec<Span> {
        let deadline = Instant::now() + within;
        loop {
            let spans = self.spans();
            if enough(&spans) {
                return spans;
            }
            let names: Vec<_> = spans
                .iter()
                .map(|span| format!("{}: {}", span.service, span.name))
                .collect();
            assert!(
                Instant::now() < deadline,
                "{what}: not within {within:?}; spans so far: {names:#?}"
            );
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    fn received(&self) -> std::sync::MutexGuard<'_, Received> {
        self.received.lock().expect("no panic under this lock")
    }
}

impl Drop for OtlpReceiver {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

async fn serve(connection: TcpStream, into: Arc<Mutex<Received>>) -> Option<()> {
    let mut connection = BufReader::new(connection);
    loop {
        let mut line = String::new();
        connection
            .read_line(&mut line)
            .await
            .ok()
            .filter(|&bytes| bytes > 0)?;
        let path = line.split(' ').nth(1)?.to_owned();
        let mut length = None;
        loop {
            line.clear();
            connection
                .read_line(&mut line)
                .await
                .ok()
                .filter(|&bytes| bytes > 0)?;
            match line.trim_end().split_once(':') {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.trim().parse().ok()
                }
                Some(_) => {}
                None => break,
            }
        }
        let Some(length) = length else {
            connection
                .write_all(b"HTTP/1.1 411 Length Required\r\nContent-Length: 0\r\n\r\n")
                .await
                .ok()?;
            return None;
        };
        let mut body = vec![0; length];
        connection.read_exact(&mut body).await.ok()?;
        // An empty body is the protobuf of "all accepted".
        let status = if take(&path, body, &into) {
            "200 OK"
        } else {
            "400 Bad Request"
        };
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n"
        );
        connection.write_all(answer.as_bytes()).await.ok()?;
    }
}

/// Whether the body could be read.
fn take(path: &str, body: Vec<u8>, into: &Mutex<Received>) -> bool {
    let mut received = into.lock().expect("no panic under this lock");
    let taken = match path {
        "/v1/traces" => ExportTraceServiceRequest::decode(&body[..])
            .map(|request| received.spans.extend(spans(request)))
            .is_ok(),
        "/v1/metrics" => ExportMetricsServiceRequest::decode(&body[..])
            .map(|request| received.metrics.extend(metrics(request)))
            .is_ok(),
        "/v1/logs" => ExportLogsServiceRequest::decode(&body[..])
            .map(|request| received.logs.extend(logs(request)))
            .is_ok(),
        _ => false,
    };
    received.bodies.push(body);
    taken
}

fn spans(request: ExportTraceServiceRequest) -> impl Iterator<Item = Span> {
    request.resource_spans.into_iter().flat_map(|resource| {
        let service = service(resource.resource);
        resource
            .scope_spans
            .into_iter()
            .flat_map(|scope| scope.spans)
            .map(move |raw| span(service.clone(), raw))
    })
}

fn span(service: String, raw: otlp::Span) -> Span {
    Span {
        trace_id: hex(&raw.trace_id),
        span_id: hex(&raw.span_id),
        parent_span_id: (!raw.parent_span_id.is_empty()).then(|| hex(&raw.parent_span_id)),
        kind: match otlp::span::SpanKind::try_from(raw.kind) {
            Ok(otlp::span::SpanKind::Internal) => "internal",
            Ok(otlp::span::SpanKind::Server) => "server",
            Ok(otlp::span::SpanKind::Client) => "client",
            Ok(otlp::span::SpanKind::Producer) => "producer",
            Ok(otlp::span::SpanKind::Consumer) => "consumer",
            Ok(otlp::span::SpanKind::Unspecified) | Err(_) => "unspecified",
        },
        status: match raw.status.as_ref().map(|status| status.code()) {
            Some(otlp::status::StatusCode::Ok) => "ok",
            Some(otlp::status::StatusCode::Error) => "error",
            Some(otlp::status::StatusCode::Unset) | None => "unset",
        },
        service,
        attributes: attributes(raw.attributes),
        links: raw
            .links
            .iter()
            .map(|link| (hex(&link.trace_id), hex(&link.span_id)))
            .collect(),
        start_unix_ns: raw.start_time_unix_nano,
        end_unix_ns: raw.end_time_unix_nano,
        name: raw.name,
    }
}

fn metrics(request: ExportMetricsServiceRequest) -> impl Iterator<Item = Metric> {
    request.resource_metrics.into_iter().flat_map(|resource| {
        let mut attributes = attributes(
            resource
                .resource
                .map(|resource| resource.attributes)
                .unwrap_or_default(),
        );
        let [service, instance] = ["service.name", "service.instance.id"]
            .map(|name| attributes.remove(name).unwrap_or_default());
        let metrics = resource
            .scope_metrics
            .into_iter()
            .flat_map(|scope| scope.metrics);
        metrics.map(move |metric| {
            let bounds = match metric.data {
                Some(Data::Histogram(histogram)) => histogram
                    .data_points
                    .first()
                    .map(|point| point.explicit_bounds.clone()),
                _ => None,
            };
            let bounds = bounds.unwrap_or_default();
            Metric {
                service: service.clone(),
                instance: instance.clone(),
                name: metric.name,
                unit: metric.unit,
                bounds,
            }
        })
    })
}

fn logs(request: ExportLogsServiceRequest) -> impl Iterator<Item = Log> {
    request.resource_logs.into_iter().flat_map(|resource| {
        let service = service(resource.resource);
        resource
            .scope_logs
            .into_iter()
            .flat_map(|scope| scope.log_records)
            .map(move |record| Log {
                service: service.clone(),
                severity: record.severity_text,
                body: record.body.map(print).unwrap_or_default(),
                attributes: attributes(record.attributes),
                trace_id: (!record.trace_id.is_empty()).then(|| hex(&record.trace_id)),
            })
    })
}

fn service(resource: Option<Resource>) -> String {
    attributes(
        resource
            .map(|resource| resource.attributes)
            .unwrap_or_default(),
    )
    .remove("service.name")
    .unwrap_or_default()
}

fn attributes(raw: Vec<KeyValue>) -> BTreeMap<String, String> {
    raw.into_iter()
        .map(|attribute| {
            (
                attribute.key,
                attribute.value.map(print).unwrap_or_default(),
            )
        })
        .collect()
}

fn print(value: AnyValue) -> String {
    match value.value {
        Some(Value::StringValue(text)) => text,
        Some(Value::BoolValue(value)) => value.to_string(),
        Some(Value::IntValue(value)) => value.to_string(),
        Some(Value::DoubleValue(value)) => value.to_string(),
        Some(Value::ArrayValue(array)) => format!(
            "[{}]",
            array
                .values
                .into_iter()
                .map(print)
                .collect::<Vec<_>>()
                .join(", ")
        ),
        Some(Value::KvlistValue(list)) => format!("{:?}", attributes(list.values)),
        Some(Value::BytesValue(bytes)) => hex(&bytes),
        other => other.map(|value| format!("{value:?}")).unwrap_or_default(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
