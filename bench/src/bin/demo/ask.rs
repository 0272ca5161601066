//! Questions as a person would type them, and the answers.

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

/// Everything may still be starting.
const START_WITHIN: Duration = Duration::from_secs(60);
const RETRY_INTERVAL: Duration = Duration::from_millis(250);
const TOLD_WITHIN: Duration = Duration::from_secs(30);

/// Asks, and while nobody listens there, waits for `who`.
pub async fn ask(
    connection: &Connection,
    subject: &str,
    body: &str,
    span: &Span,
    who: &str,
) -> Result<NatsMessage, Fatal> {
    let begun = Instant::now();
    let mut told = false;
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
                .refused()
                .unwrap_or_else(|| "no answer".to_owned()),
            Err(error) if error.kind() != RequestErrorKind::NoResponders => error.to_string(),
            Ok(_) | Err(_) => "nobody listens there".to_owned(),
        };
        if begun.elapsed() > START_WITHIN {
            return Err(Fatal::new(format!(
                "{subject}: {why}; waited {} s for {who}",
                START_WITHIN.as_secs()
            )));
        }
        if !told {
            println!("   … waiting for {who} ({why})");
            told = true;
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

/// Asks, shows question and answer as a person would see them, and reads the answer.
pub async fn request<Q, R, T: DeserializeOwned>(
    publisher: &Connection,
    endpoint: Endpoint<Q, R>,
    names: &[&str],
    body: &Value,
    who: &str,
) -> Result<T, Fatal> {
    let reply = question(publisher, endpoint.subject(names), body, who).await?;
    println!("   {}", String::from_utf8_lossy(&reply.payload));
    read(&reply, &endpoint.subject(names))
}

/// The same, and does not show the answer: there are better ways to.
pub async fn request_quietly<Q, R, T: DeserializeOwned>(
    publisher: &Connection,
    endpoint: Endpoint<Q, R>,
    names: &[&str],
    body: &Value,
    who: &str,
) -> Result<T, Fatal> {
    let reply = question(publisher, endpoint.subject(names), body, who).await?;
    read(&reply, &endpoint.subject(names))
}

async fn question(
    publisher: &Connection,
    subject: String,
    body: &Value,
    who: &str,
) -> Result<NatsMessage, Fatal> {
    println!("   $ nats req {subject} '{body}'");
    answer(publisher, &subject, body, who).await
}

/// What `who` answers, shown nowhere; an error of theirs is one here.
pub async fn answer(
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
    let reply = ask(publisher, subject, &body.to_string(), &span, who).await?;
    match reply
        .headers
        .as_ref()
        .and_then(|headers| headers.get(header::SERVICE_ERROR))
    {
        Some(error) => Err(Fatal::new(format!(
            "{who} answers {}: {error}",
            of(&reply, header::SERVICE_ERROR_CODE)
        ))),
        None => Ok(reply),
    }
}

fn read<T: DeserializeOwned>(reply: &NatsMessage, subject: &str) -> Result<T, Fatal> {
    serde_json::from_slice(&reply.payload)
        .map_err(|_| Fatal::new(format!("the answer to {subject} is unreadable")))
}

/// Hears the events of a conversation from now on.
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

    /// Waits until the event of this id is told, and shows it.
    pub async fn until(&mut self, id: &str) -> Result<(), Fatal> {
        println!("   $ nats sub {}", self.subject);
        let late = || {
            Fatal::new(format!(
                "no event {id} on {} within {} s: does relay-outbox run?",
                self.subject,
                TOLD_WITHIN.as_secs()
            ))
        };
        let deadline = Instant::now() + TOLD_WITHIN;
        loop {
            let event = timeout_at(deadline, self.events.next())
                .await
                .map_err(|_| late())?
                .ok_or_else(late)?;
            if of(&event, "ce-id") == id {
                println!(
                    "   {} {}",
                    of(&event, "ce-type"),
                    String::from_utf8_lossy(&event.payload)
                );
                return Ok(());
            }
        }
    }
}

fn of(message: &NatsMessage, name: &str) -> String {
    message
        .headers
        .as_ref()
        .and_then(|headers| headers.get(name))
        .map(|value| value.as_str().to_owned())
        .unwrap_or_default()
}
