//! Requests as a user would type them, and their replies.

use std::time::Duration;

use async_nats::{
    HeaderMap, Message as NatsMessage, Request, RequestErrorKind, StatusCode, Subscriber,
};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::{Instant, timeout_at};
use tracing::{Instrument, Span};

use base::endpoint::Endpoint;
use base::error::Fatal;
use nats::connection::Connection;
use nats::trace::inject_trace;
use protocol::header;

/// The functions may still be starting.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const RETRY_INTERVAL: Duration = Duration::from_millis(250);
const EVENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Sends a request; while nobody listens there, waits for `who`.
pub async fn request_until_answered(
    connection: &Connection,
    subject: &str,
    body: &str,
    span: &Span,
    who: &str,
) -> Result<NatsMessage, Fatal> {
    let begun = Instant::now();
    let mut printed = false;
    loop {
        let mut headers = HeaderMap::new();
        inject_trace(span, &mut headers);
        let request = Request::new()
            .headers(headers)
            .payload(body.to_owned().into());
        let why = match connection
            .client()
            .send_request(subject.to_owned(), request)
            .instrument(span.clone())
            .await
        {
            Ok(reply) if reply.status != Some(StatusCode::NO_RESPONDERS) => return Ok(reply),
            Err(error) if error.kind() == RequestErrorKind::TimedOut => connection
                .permission_violation()
                .unwrap_or_else(|| "no reply".to_owned()),
            Err(error) if error.kind() != RequestErrorKind::NoResponders => error.to_string(),
            Ok(_) | Err(_) => "nobody listens there".to_owned(),
        };
        if begun.elapsed() > START_TIMEOUT {
            return Err(Fatal::new(format!(
                "{subject}: {why}; waited {} s for {who}",
                START_TIMEOUT.as_secs()
            )));
        }
        if !printed {
            println!("   … waiting for {who} ({why})");
            printed = true;
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

/// Sends a request, prints it and its reply as a user would see them, and parses the reply.
pub async fn request<Q, R, T: DeserializeOwned>(
    publisher: &Connection,
    endpoint: Endpoint<Q, R>,
    names: &[&str],
    body: &Value,
    who: &str,
) -> Result<T, Fatal> {
    let reply = request_printed(publisher, endpoint.subject(names), body, who).await?;
    println!("   {}", String::from_utf8_lossy(&reply.payload));
    parse(&reply, &endpoint.subject(names))
}

/// The same without printing the reply, for callers that print it in a better form.
pub async fn request_quietly<Q, R, T: DeserializeOwned>(
    publisher: &Connection,
    endpoint: Endpoint<Q, R>,
    names: &[&str],
    body: &Value,
    who: &str,
) -> Result<T, Fatal> {
    let reply = request_printed(publisher, endpoint.subject(names), body, who).await?;
    parse(&reply, &endpoint.subject(names))
}

async fn request_printed(
    publisher: &Connection,
    subject: String,
    body: &Value,
    who: &str,
) -> Result<NatsMessage, Fatal> {
    println!("   $ ./dev nats --as publisher req {subject} '{body}'");
    request_raw(publisher, &subject, body, who).await
}

/// The reply of `who`, not printed; an error reply is an error here.
pub async fn request_raw(
    publisher: &Connection,
    subject: &str,
    body: &Value,
    who: &str,
) -> Result<NatsMessage, Fatal> {
    let span = tracing::info_span!(
        "request",
        otel.name = format!("request {who}"),
        otel.kind = "client",
        messaging.system = "nats",
        messaging.destination.name = subject,
    );
    let reply = request_until_answered(publisher, subject, &body.to_string(), &span, who).await?;
    match reply
        .headers
        .as_ref()
        .and_then(|headers| headers.get(header::SERVICE_ERROR))
    {
        Some(error) => Err(Fatal::new(format!(
            "{who} replies {}: {error}",
            header_of(&reply, header::SERVICE_ERROR_CODE)
        ))),
        None => Ok(reply),
    }
}

fn parse<T: DeserializeOwned>(reply: &NatsMessage, subject: &str) -> Result<T, Fatal> {
    serde_json::from_slice(&reply.payload)
        .map_err(|_| Fatal::new(format!("the reply to {subject} is unparseable")))
}

/// Subscribes to the events of a conversation.
pub struct Events {
    subject: String,
    events: Subscriber,
}

impl Events {
    pub async fn subscribe(publisher: &Connection, subject: String) -> Result<Events, Fatal> {
        let events = publisher.client().subscribe(subject.clone()).await;
        let events = events.map_err(|error| Fatal::new(format!("{subject}: {error}")))?;
        Ok(Events { subject, events })
    }

    /// Waits for the event with this id and prints it.
    pub async fn wait_for(&mut self, id: &str) -> Result<(), Fatal> {
        println!("   $ ./dev nats --as publisher sub {}", self.subject);
        let late = || {
            Fatal::new(format!(
                "no event {id} on {} within {} s: is relay-outbox running?",
                self.subject,
                EVENT_TIMEOUT.as_secs()
            ))
        };
        let deadline = Instant::now() + EVENT_TIMEOUT;
        loop {
            let event = timeout_at(deadline, self.events.next())
                .await
                .map_err(|_| late())?
                .ok_or_else(late)?;
            if header_of(&event, "ce-id") == id {
                println!(
                    "   {} {}",
                    header_of(&event, "ce-type"),
                    String::from_utf8_lossy(&event.payload)
                );
                return Ok(());
            }
        }
    }
}

fn header_of(message: &NatsMessage, name: &str) -> String {
    message
        .headers
        .as_ref()
        .and_then(|headers| headers.get(name))
        .map(|value| value.as_str().to_owned())
        .unwrap_or_default()
}
