//! Connections to NATS, and JetStream's JSON API spoken without anyone parsing stored headers.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event, RequestErrorKind};
use secrecy::ExposeSecret;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::settings::NatsSettings;
use base::backoff::Backoff;
use base::error::Fatal;
use base::log_once::LogOnce;
use base::subject::INBOX;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a permission violation explains why something does not work. An older one may have been
/// repaired, because permissions change while servers run.
const VIOLATION_AGE: Duration = Duration::from_secs(30);
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// A connection that is cut without a word is noticed after two of these.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Messages that a subscription may hold unread; the client drops more.
const SUBSCRIPTION_CAPACITY: usize = 1 << 16;

/// The last permission violation that the server reported, and when.
///
/// The server reports one apart from whatever caused it: subscribing and publishing succeed, and
/// requests time out.
#[derive(Debug, Clone, Default)]
pub struct PermissionViolations(Arc<Mutex<Option<(Instant, String)>>>);

impl PermissionViolations {
    /// Keeps `error` if it is a permission violation. Other errors of the server, such as a slow
    /// consumer, a stale connection or its own shutdown, pass with the connection.
    pub fn note(&self, error: &str) {
        if error.to_lowercase().contains("permissions violation") {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) =
                Some((Instant::now(), error.to_owned()));
        }
    }

    /// The last one, if it is recent enough to matter.
    pub fn recent(&self) -> Option<String> {
        let last = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        last.filter(|(at, _)| at.elapsed() < VIOLATION_AGE)
            .map(|(_, error)| error)
    }

    /// Fails after a recent violation: what this user needs will not work before somebody changes
    /// its permissions, so trying again is of no use.
    ///
    /// # Errors
    /// Names the violation.
    pub fn check(&self) -> Result<(), Fatal> {
        self.recent().map_or(Ok(()), |violation| {
            Err(Fatal::new(format!(
                "NATS refuses this user what it needs: {violation}; \
                 check the user's permissions in the server's configuration"
            )))
        })
    }
}

/// A connection, and what has happened to it.
#[derive(Debug, Clone)]
pub struct Connection {
    client: Client,
    broken: watch::Receiver<u64>,
    violations: PermissionViolations,
}

/// Connects as `name`, and keeps trying while the servers are away.
///
/// # Errors
/// The configuration is wrong (no such user, unreadable credentials, an unreadable URL), or `stop`
/// was cancelled while waiting.
pub async fn connect(
    settings: &NatsSettings,
    name: &str,
    stop: &CancellationToken,
) -> Result<Connection, Fatal> {
    let mut log = LogOnce::default();
    let mut backoff = Backoff::fixed(RETRY_PAUSE);
    loop {
        let (broken_tx, broken) = watch::channel(0);
        let violations = PermissionViolations::default();
        let options = options(settings, name, broken_tx, violations.clone())?;
        let urls: Vec<String> = settings
            .url
            .expose()
            .split(',')
            .map(|url| url.trim().to_owned())
            .collect();
        match options.connect(urls).await {
            Ok(client) => {
                return Ok(Connection {
                    client,
                    broken,
                    violations,
                });
            }
            Err(error) => match error.kind() {
                ConnectErrorKind::ServerParse => {
                    return Err(Fatal::new(format!(
                        "configuration: NATS_URL={} is not of the form nats://host:4222",
                        settings.url
                    )));
                }
                ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
                    return Err(Fatal::new(
                        "NATS refused this user: check NATS_USER and NATS_PASS (or NATS_CREDS) \
                         against the server's configuration",
                    ));
                }
                kind => {
                    if log.is_news(&kind.to_string()) {
                        tracing::warn!(url = %settings.url, %kind, "waiting for NATS");
                    }
                }
            },
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next_pause()) => {}
            () = stop.cancelled() => return Err(Fatal::new("stopped while waiting for NATS")),
        }
    }
}

fn options(
    settings: &NatsSettings,
    name: &str,
    broken: watch::Sender<u64>,
    violations: PermissionViolations,
) -> Result<ConnectOptions, Fatal> {
    let mut options = ConnectOptions::new()
        .name(name)
        .ping_interval(PING_INTERVAL)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .event_callback(move |event| {
            match &event {
                Event::Disconnected => {
                    broken.send_modify(|count| *count += 1);
                    tracing::debug!("NATS: disconnected");
                }
                Event::ServerError(error) => {
                    let text = error.to_string();
                    tracing::warn!(error = text, "the NATS server reports an error");
                    violations.note(&text);
                }
                Event::SlowConsumer(_) => tracing::warn!(
                    "a subscription is read too slowly; the client drops messages of it"
                ),
                Event::ClientError(error) => {
                    tracing::warn!(%error, "the NATS client failed; it connects again");
                }
                other => tracing::debug!(event = %other, "NATS"),
            }
            std::future::ready(())
        });
    if let Some(path) = &settings.credentials {
        let creds = std::fs::read_to_string(path).map_err(|error| {
            Fatal::new(format!(
                "configuration: NATS_CREDS={} cannot be read: {error}",
                path.display()
            ))
        })?;
        options = options.credentials(&creds).map_err(|_| {
            Fatal::new(format!(
                "configuration: NATS_CREDS={} is not a credentials file",
                path.display()
            ))
        })?;
    } else if let Some(user) = &settings.user {
        // A private inbox: with a shared `_INBOX.>` one user could read another's replies.
        let user = user.expose_secret();
        let password = settings.password.as_ref();
        let password = password.map_or("", |password| password.expose_secret());
        options = options
            .custom_inbox_prefix(format!("{INBOX}.{user}"))
            .user_and_password(user.to_owned(), password.to_owned());
    }
    Ok(options)
}

impl Connection {
    /// The client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Waits until the connection breaks. The client reconnects by itself afterwards.
    pub async fn broken(&mut self) {
        if self.broken.changed().await.is_err() {
            // The client's task is gone, so there will be no further events.
            std::future::pending::<()>().await;
        }
    }

    /// Waits until the client's own task has ended or panicked: this connection will never do
    /// anything again.
    pub async fn ended(&self) {
        let mut broken = self.broken.clone();
        while broken.changed().await.is_ok() {}
    }

    /// The last permission violation of the last half minute. See [`PermissionViolations`].
    pub fn permission_violation(&self) -> Option<String> {
        self.violations.recent()
    }

    /// Fails after a recent permission violation.
    ///
    /// # Errors
    /// As [`PermissionViolations::check`].
    pub fn check_permissions(&self) -> Result<(), Fatal> {
        self.violations.check()
    }

    /// Sends a request to JetStream's JSON API.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn api<T: DeserializeOwned>(
        &self,
        subject: &str,
        body: &impl Serialize,
    ) -> Result<T, ApiError> {
        let body =
            serde_json::to_vec(body).map_err(|error| ApiError::Unreadable(error.to_string()))?;
        let reply = self
            .client
            .request(subject.to_owned(), body.into())
            .await
            .map_err(|error| match error.kind() {
                RequestErrorKind::NoResponders => ApiError::Away("JetStream is not there"),
                RequestErrorKind::TimedOut => {
                    ApiError::Away("JetStream does not answer, or this user may not ask it")
                }
                _ => ApiError::Away("the connection to NATS is broken"),
            })?;
        let answer: Answer = serde_json::from_slice(&reply.payload)
            .map_err(|error| ApiError::Unreadable(error.to_string()))?;
        if let Some(error) = answer.error {
            return Err(ApiError::Refused {
                code: error.err_code,
                description: error.description,
            });
        }
        serde_json::from_slice(&reply.payload)
            .map_err(|error| ApiError::Unreadable(error.to_string()))
    }
}

#[derive(Deserialize)]
struct Answer {
    error: Option<AnswerError>,
}

#[derive(Deserialize)]
struct AnswerError {
    #[serde(default)]
    err_code: u64,
    #[serde(default)]
    description: String,
}

/// Why JetStream's API gave no result.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ApiError {
    /// There was no answer.
    #[error("{0}")]
    Away(&'static str),
    /// JetStream answered with an error.
    #[error("JetStream refused: {description} ({code})")]
    Refused {
        /// JetStream's `err_code`.
        code: u64,
        /// JetStream's description.
        description: String,
    },
    /// The answer is not in JetStream's format.
    #[error("JetStream's answer is unreadable: {0}")]
    Unreadable(String),
}

impl ApiError {
    /// `err_code` of a stream that is not there.
    pub const NO_STREAM: u64 = 10_059;
    /// `err_code` of a consumer that is not there.
    pub const NO_CONSUMER: u64 = 10_014;
    /// `err_code` of a message that is not there.
    pub const NO_MESSAGE: u64 = 10_037;

    /// Whether JetStream refused with this `err_code`.
    pub fn is(&self, wanted: u64) -> bool {
        matches!(self, ApiError::Refused { code, .. } if *code == wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_missing_permission_is_remembered_and_not_for_ever() {
        let violations = PermissionViolations::default();
        for passing in [
            "Slow Consumer",
            "Stale Connection",
            "Server Shutdown",
            "Maximum Payload Violation",
        ] {
            violations.note(passing);
            assert_eq!(violations.recent(), None, "{passing}");
        }
        violations.note(r#"Permissions Violation for Publish to "chat.general""#);
        violations.note("Stale Connection");
        assert!(violations.recent().unwrap().contains("chat.general"));
        let long_ago = Instant::now().checked_sub(VIOLATION_AGE).unwrap();
        violations.0.lock().unwrap().as_mut().unwrap().0 = long_ago;
        assert_eq!(violations.recent(), None);
    }
}
