//! Questions to stream-bootstrap, and what to mend when there is no answer.

use std::time::{Duration, Instant};

use async_nats::{Request, RequestErrorKind, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::Value;

use base::endpoint::Endpoint;
use base::error::{ErrorBody, Fatal};
use nats::connection::Connection;

/// Longer than stream-bootstrap takes for a reply, by default.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// A server that is away may come back; then the same question is asked again, which harms nothing.
const RETRY_FOR: Duration = Duration::from_secs(30);
const LOOK_FOR_OBJECTIONS: Duration = Duration::from_millis(50);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// Asks stream-bootstrap, again while it says that this may help.
pub async fn ask<Q, R: DeserializeOwned>(
    operator: &Connection,
    endpoint: Endpoint<Q, R>,
    body: &Value,
) -> Result<R, Fatal> {
    let subject = endpoint.subject(&[]);
    let begun = Instant::now();
    loop {
        let request = Request::new()
            .payload(body.to_string().into())
            .timeout(Some(ANSWER_WITHIN));
        let answer = tokio::select! {
            answer = operator.client().send_request(subject.clone(), request) => answer,
            objection = refused(operator) => return Err(Fatal::new(format!(
                "NATS refuses this user {subject} ({objection}): ask as the operator of nats/accounts.conf"
            ))),
        };
        let reply = match answer {
            Ok(reply) if reply.status != Some(StatusCode::NO_RESPONDERS) => reply,
            Err(error) if error.kind() == RequestErrorKind::TimedOut => {
                let within = ANSWER_WITHIN.as_secs();
                return Err(Fatal::new(format!(
                    "{subject}: no answer within {within} s; stream-bootstrap's log may say why"
                )));
            }
            Err(error) if error.kind() != RequestErrorKind::NoResponders => {
                return Err(Fatal::new(format!("{subject}: {error}")));
            }
            Ok(_) | Err(_) => {
                return Err(Fatal::new(format!(
                    "nobody answers {subject}: is stream-bootstrap running?"
                )));
            }
        };
        let Ok(ErrorBody { error }) = serde_json::from_slice(&reply.payload) else {
            let other = |_| {
                Fatal::new(format!(
                    "the answer to {subject} is another version's: start the stream-bootstrap of this one"
                ))
            };
            return serde_json::from_slice(&reply.payload).map_err(other);
        };
        if !error.retryable || begun.elapsed() > RETRY_FOR {
            return Err(Fatal::new(format!("{subject}: {}", error.reason)));
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

/// Ends when the server objects: it tells so beside its answers, and the question stays without one.
async fn refused(operator: &Connection) -> String {
    loop {
        if let Some(objection) = operator.refused() {
            return objection;
        }
        tokio::time::sleep(LOOK_FOR_OBJECTIONS).await;
    }
}
