//! The NATS service API (ADR-32): answers requests and service discovery.
//!
//! We do not use async-nats' own implementation, because it counts `respond()` calls, handles
//! requests one after the other, leaves `metadata` out of STATS, and loses requests when it stops.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_nats::Client;
use async_nats::header::{HeaderMap, HeaderValue};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use tracing::Instrument;

use crate::function::Identity;
use crate::meter::Meter;
use crate::requests::{RawRequest, RequestQueue};
use base::discovery::{EndpointInfo, EndpointStats, Info, Ping, Stats};
use base::error::{Code, Error};
use base::header;
use base::subject::{INBOX, SERVICE_REPLY};
use nats::headers::parse_headers;
use nats::trace::remote_parent;

/// How long a replica may take to answer itself.
const PING_LIMIT: Duration = Duration::from_secs(2);

/// The queue group of every endpoint; the default of the service API.
pub(crate) const QUEUE_GROUP: &str = "q";

/// Body and headers of a reply, ready to send.
type Encoded = (Bytes, Vec<(&'static str, String)>);

/// Answers one request, given its subject and its body.
pub(crate) type Handler =
    Arc<dyn Fn(String, Bytes) -> BoxFuture<'static, Result<Encoded, Error>> + Send + Sync>;

/// One entry of INFO and STATS: an endpoint with a handler, or work without one.
pub(crate) struct Registered {
    pub info: EndpointInfo,
    pub meter: Meter,
    pub handler: Option<Handler>,
    /// The prefix in the subject that the calling user's name follows, if it names one.
    pub user_after: Option<&'static str>,
}

/// What one replica answers.
pub(crate) struct Service {
    client: Client,
    pub identity: Identity,
    id: String,
    metadata: BTreeMap<String, String>,
    started: String,
    pub endpoints: Vec<Registered>,
    queue: OnceLock<Arc<RequestQueue>>,
}

impl Service {
    pub(crate) fn new(
        client: Client,
        identity: Identity,
        id: String,
        endpoints: Vec<Registered>,
    ) -> Arc<Service> {
        let now = time::OffsetDateTime::now_utc();
        let started = now
            .format(&time::format_description::well_known::Rfc3339)
            .unwrap_or_default();
        let metadata = BTreeMap::from([("project".to_owned(), identity.project.to_owned())]);
        Arc::new(Service {
            client,
            identity,
            id,
            metadata,
            started,
            endpoints,
            queue: OnceLock::new(),
        })
    }

    /// Lets STATS show how many requests wait in `queue`.
    pub(crate) fn show_queue(&self, queue: Arc<RequestQueue>) {
        let _ = self.queue.set(queue);
    }

    /// The subjects of service discovery, each with its verb.
    pub(crate) fn discovery_subjects(&self) -> Vec<(&'static str, String)> {
        base::discovery::discovery_subjects(self.identity.name, &self.id)
    }

    /// Sends PING to this replica through the server. The reply shows that its subscriptions are
    /// served, that its requests are started, and that its replies go out.
    ///
    /// # Errors
    /// Why there is no reply.
    pub(crate) async fn ping_self(&self) -> Result<(), String> {
        let subject = base::discovery::ping_subject(self.identity.name, &self.id);
        match tokio::time::timeout(PING_LIMIT, self.client.request(subject, Bytes::new())).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no reply".to_owned()),
        }
    }

    /// Answers one request, by `deadline`.
    pub(crate) async fn answer(&self, request: RawRequest, deadline: Instant) {
        let Registered {
            info,
            meter,
            handler: Some(handler),
            ..
        } = &self.endpoints[request.endpoint]
        else {
            return;
        };
        let begun = Instant::now();
        let RawRequest {
            subject,
            reply,
            headers,
            payload,
            ..
        } = request;
        let span = tracing::info_span!(
            "request",
            otel.name = format!("{} {}", self.identity.name, info.subject),
            otel.kind = "server",
            otel.status_code = tracing::field::Empty,
            messaging.system = "nats",
            messaging.destination.name = subject.as_deref(),
            error.r#type = tracing::field::Empty,
        );
        let reply_to = reply.filter(|subject| may_reply_to(subject));
        let outcome = match check(subject, headers.as_deref(), reply_to.is_some()) {
            Ok((subject, headers)) => {
                remote_parent(&span, headers.as_ref());
                let work = AssertUnwindSafe(handler(subject, payload))
                    .catch_unwind()
                    .instrument(span.clone());
                match tokio::time::timeout_at(deadline.into(), work).await {
                    Ok(Ok(outcome)) => outcome,
                    Ok(Err(_panic)) => Err(Error::internal("the handler panicked")),
                    Err(_) => Err(Error::new(
                        Code::Unavailable,
                        "this took too long; try again",
                    )),
                }
            }
            Err(error) => Err(error),
        };
        let outcome = outcome.and_then(|reply| self.fits(reply));
        meter.handled(1, begun.elapsed());
        if let Err(error) = &outcome {
            meter.refused(format!("{}:{}", error.code.number(), error.reason));
            span.record("error.type", error.code.number());
            // Only errors of the service; one that the caller made is no error of the span.
            if matches!(error.code, Code::Internal | Code::Unavailable) {
                span.record("otel.status_code", "ERROR");
            }
            if error.code == Code::Internal {
                span.in_scope(|| tracing::error!(endpoint = info.name, %error, "a request failed"));
            } else {
                span.in_scope(
                    || tracing::debug!(endpoint = info.name, %error, "a request was refused"),
                );
            }
        }
        if let Some(reply_to) = reply_to {
            self.send(reply_to, outcome).await;
        }
    }

    fn fits(&self, reply: Encoded) -> Result<Encoded, Error> {
        if reply.0.len() + HEADER_ROOM > self.client.server_info().max_payload {
            return Err(Error::new(
                Code::TooLarge,
                "the reply is larger than the server's max_payload; ask for less",
            ));
        }
        Ok(reply)
    }

    pub(crate) async fn send(&self, reply_to: String, outcome: Result<Encoded, Error>) {
        let (body, headers) = outcome.unwrap_or_else(|error| {
            let body = serde_json::to_vec(&error.body()).unwrap_or_default();
            let headers = vec![
                (header::SERVICE_ERROR, error.reason.clone().into_owned()),
                (header::SERVICE_ERROR_CODE, error.code.number().to_string()),
            ];
            (body.into(), headers)
        });
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            // `insert` panics on a line break. A header that holds one is left out instead.
            if let Ok(value) = value.parse::<HeaderValue>() {
                map.insert(name, value);
            }
        }
        let sent = if map.is_empty() {
            self.client.publish(reply_to, body).await
        } else {
            self.client.publish_with_headers(reply_to, map, body).await
        };
        if let Err(error) = sent {
            tracing::warn!(%error, "a reply was not sent; its caller will time out");
        }
    }

    /// Answers `verb` of service discovery.
    pub(crate) async fn discover(&self, verb: &'static str, reply: String) {
        if may_reply_to(&reply) {
            let body = match verb {
                "PING" => serde_json::to_vec(&self.ping()),
                "INFO" => serde_json::to_vec(&self.info()),
                _ => serde_json::to_vec(&self.stats()),
            };
            self.send(
                reply,
                body.map(|body| (body.into(), Vec::new()))
                    .map_err(Error::internal),
            )
            .await;
        }
    }

    fn ping(&self) -> Ping {
        Ping {
            kind: "io.nats.micro.v1.ping_response".to_owned(),
            name: self.identity.name.to_owned(),
            id: self.id.clone(),
            version: self.identity.version.to_owned(),
            metadata: self.metadata.clone(),
        }
    }

    fn info(&self) -> Info {
        Info {
            kind: "io.nats.micro.v1.info_response".to_owned(),
            name: self.identity.name.to_owned(),
            id: self.id.clone(),
            version: self.identity.version.to_owned(),
            description: self.identity.description.to_owned(),
            metadata: self.metadata.clone(),
            endpoints: self
                .endpoints
                .iter()
                .map(|endpoint| endpoint.info.clone())
                .collect(),
        }
    }

    fn stats(&self) -> Stats {
        Stats {
            kind: "io.nats.micro.v1.stats_response".to_owned(),
            name: self.identity.name.to_owned(),
            id: self.id.clone(),
            version: self.identity.version.to_owned(),
            metadata: self.metadata.clone(),
            started: self.started.clone(),
            endpoints: self
                .endpoints
                .iter()
                .enumerate()
                .map(|(index, endpoint)| self.endpoint_stats(index, endpoint))
                .collect(),
        }
    }

    fn endpoint_stats(&self, index: usize, endpoint: &Registered) -> EndpointStats {
        let mut stats = endpoint.meter.stats(&endpoint.info);
        if let Some(queue) = self.queue.get().filter(|_| endpoint.handler.is_some()) {
            let waiting = queue.waiting_for(index) as u64;
            stats.data.insert("waiting".to_owned(), waiting);
        }
        stats
    }
}

/// Checks what must be right before a handler sees a request: its subject, its headers, and where
/// its reply goes.
fn check(
    subject: Option<String>,
    headers: Option<&[u8]>,
    may_reply: bool,
) -> Result<(String, Option<HeaderMap>), Error> {
    let wrong = |reason| Error::new(Code::BadRequest, reason);
    if !may_reply {
        return Err(wrong(
            "a request needs a reply subject that begins with _INBOX. or _R_.",
        ));
    }
    let subject = subject.ok_or_else(|| wrong("the subject is not UTF-8"))?;
    let headers = headers.map(parse_headers).transpose();
    let headers =
        headers.map_err(|_| wrong("malformed headers; send `Name: value` lines after NATS/1.0"))?;
    Ok((subject, headers))
}

/// The part of `max_payload` that is left for a reply's headers, in bytes.
const HEADER_ROOM: usize = 1024;

/// The server does not check reply subjects. Without this check, a request with the reply subject
/// `orders.new` or `$JS.API.STREAM.DELETE.…` would make us publish there, with our permissions.
pub(crate) fn may_reply_to(subject: &str) -> bool {
    [INBOX, SERVICE_REPLY].iter().any(|prefix| {
        subject
            .strip_prefix(prefix)
            .is_some_and(|rest| rest.starts_with('.'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_go_to_inboxes_only() {
        for good in ["_INBOX.publisher.abc", "_INBOX.abc.1", "_R_.x.y"] {
            assert!(may_reply_to(good), "{good}");
        }
        for bad in [
            "chat.general",
            "$JS.API.STREAM.DELETE.CHAT_MESSAGES",
            "_INBOXX.a",
            "_INBOX",
            "_R_",
            "",
        ] {
            assert!(!may_reply_to(bad), "{bad}");
        }
    }
}
