//! Requests to stream-bootstrap, and errors that say what to do when it does not reply.

use std::time::{Duration, Instant};

use async_nats::{Message, Request, RequestErrorKind, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::Value;

use base::endpoint::Endpoint;
use base::error::{ErrorBody, Fatal};
use nats::connection::Connection;

/// Longer than stream-bootstrap takes for a reply, by default.
const REPLY_TIMEOUT: Duration = Duration::from_secs(15);
/// An error that says "retry" is retried for this long; the requests of this program may be
/// repeated.
const RETRY_FOR: Duration = Duration::from_secs(30);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
const POLL_PERMISSIONS: Duration = Duration::from_millis(50);

/// Sends a request to stream-bootstrap and parses its reply; retries while the reply says that this
/// may help.
///
/// # Errors
/// One line that says what is wrong and what to do.
pub async fn send<Q, R: DeserializeOwned>(
    operator: &Connection,
    endpoint: Endpoint<Q, R>,
    body: &Value,
) -> Result<R, Fatal> {
    let subject = endpoint.subject(&[]);
    let begun = Instant::now();
    loop {
        let reply = send_once(operator, &subject, body).await?;
        let Ok(ErrorBody { error }) = serde_json::from_slice(&reply.payload) else {
            return serde_json::from_slice(&reply.payload).map_err(|_| {
                Fatal::new(format!(
                    "the reply to {subject} is another version's: start the stream-bootstrap of \
                     this one"
                ))
            });
        };
        if !error.retryable || begun.elapsed() > RETRY_FOR {
            return Err(Fatal::new(format!("{subject}: {}", error.reason)));
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

async fn send_once(operator: &Connection, subject: &str, body: &Value) -> Result<Message, Fatal> {
    let request = Request::new()
        .payload(body.to_string().into())
        .timeout(Some(REPLY_TIMEOUT));
    let reply = tokio::select! {
        reply = operator.client().send_request(subject.to_owned(), request) => reply,
        violation = permission_violation(operator) => return Err(Fatal::new(format!(
            "NATS refuses this user {subject} ({violation}): ask as the operator of \
             nats/accounts.conf"
        ))),
    };
    match reply {
        Ok(reply) if reply.status != Some(StatusCode::NO_RESPONDERS) => Ok(reply),
        Err(error) if error.kind() == RequestErrorKind::TimedOut => Err(Fatal::new(format!(
            "{subject}: no reply within {} s; stream-bootstrap's log may say why",
            REPLY_TIMEOUT.as_secs()
        ))),
        Err(error) if error.kind() != RequestErrorKind::NoResponders => {
            Err(Fatal::new(format!("{subject}: {error}")))
        }
        Ok(_) | Err(_) => Err(Fatal::new(format!(
            "nobody answers {subject}: is stream-bootstrap running?"
        ))),
    }
}

/// Returns when the server reports that this user lacks a permission. The request itself would only
/// time out.
async fn permission_violation(operator: &Connection) -> String {
    loop {
        if let Some(violation) = operator.permission_violation() {
            return violation;
        }
        tokio::time::sleep(POLL_PERMISSIONS).await;
    }
}
