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
use base::error::Fatal;
use base::subject::INBOX;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an objection explains why something does not work. Older, it has passed: permissions change.
const OBJECTION_AGE: Duration = Duration::from_secs(30);
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// A connection that is cut in silence is noticed after two of these.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Messages a subscription may hold unread; more and the server is told we are slow.
const SUBSCRIPTION_CAPACITY: usize = 1 << 16;

/// What the server last did not permit, and when.
#[derive(Debug, Clone, Default)]
pub struct Objection(Arc<Mutex<Option<(Instant, String)>>>);

impl Objection {
    /// Keeps `error`, if it says that this user may not do what it just did. Everything else the server says, such as a
    /// slow consumer, a stale connection or its own shutdown, passes with the connection.
    pub fn note(&self, error: &str) {
        if error.to_lowercase().contains("permissions violation") {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) =
                Some((Instant::now(), error.to_owned()));
        }
    }

    /// The last one, while it is young enough to matter.
    pub fn recent(&self) -> Option<String> {
        let last = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        last.filter(|(at, _)| at.elapsed() < OBJECTION_AGE)
            .map(|(_, error)| error)
    }
}

/// A connection and what happened to it.
#[derive(Debug, Clone)]
pub struct Connection {
    client: Client,
    broken: watch::Receiver<u64>,
    refused: Objection,
}

/// Connects as `name`, and keeps trying while the servers are not there.
///
/// # Errors
/// The configuration is wrong: no such user, unreadable credentials, an unreadable URL; or the
/// process is told to stop while waiting.
pub async fn connect(
    settings: &NatsSettings,
    name: &str,
    stop: &CancellationToken,
) -> Result<Connection, Fatal> {
    let mut told = false;
    loop {
        let (broken_tx, broken) = watch::channel(0);
        let refused = Objection::default();
        let options = options(settings, name, broken_tx, refused.clone())?;
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
                    refused,
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
                        "NATS refused this user: check NATS_USER and NATS_PASS (or NATS_CREDS) against nats/accounts.conf",
                    ));
                }
                kind => {
                    if !told {
                        tracing::warn!(url = %settings.url, %kind, "waiting for NATS");
                        told = true;
                    }
                }
            },
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_PAUSE) => {}
            () = stop.cancelled() => return Err(Fatal::new("stopped while waiting for NATS")),
        }
    }
}

fn options(
    settings: &NatsSettings,
    name: &str,
    broken: watch::Sender<u64>,
    refused: Objection,
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
                    tracing::warn!(error = text, "NATS: the server objects");
                    refused.note(&text);
                }
                Event::SlowConsumer(_) => tracing::warn!("NATS: a subscription is read too slowly"),
                Event::ClientError(error) => tracing::warn!(%error, "NATS: the client failed"),
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

    /// Waits until the connection breaks; it mends itself afterwards.
    pub async fn broken(&mut self) {
        if self.broken.changed().await.is_err() {
            // The connection task is gone: nothing will ever be told again.
            std::future::pending::<()>().await;
        }
    }

    /// Waits until the client's own task is gone, panicked or ended: this connection will never do anything again.
    pub async fn ended(&self) {
        let mut broken = self.broken.clone();
        while broken.changed().await.is_ok() {}
    }

    /// What the server did not permit in the last half minute. A permission that is missing shows nowhere else:
    /// subscribing and publishing succeed, and requests time out.
    pub fn refused(&self) -> Option<String> {
        self.refused.recent()
    }

    /// Fails after a permission violation: what the function needs will not work before somebody
    /// changes this user's permissions, so trying again is of no use.
    ///
    /// # Errors
    /// Names the violation.
    pub fn check_permissions(&self) -> Result<(), Fatal> {
        self.refused().map_or(Ok(()), |violation| {
            Err(Fatal::new(format!(
                "NATS refuses this user what it needs: {violation}; \
                 check this user's permissions in the server's configuration"
            )))
        })
    }

    /// Asks JetStream's JSON API.
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
    /// Nobody answered.
    #[error("{0}")]
    Away(&'static str),
    /// JetStream said no.
    #[error("JetStream refused: {description} ({code})")]
    Refused {
        /// JetStream's `err_code`.
        code: u64,
        /// JetStream's words.
        description: String,
    },
    /// The answer was not what JetStream answers.
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

/// Between half of `pause` and all of it, so that copies do not come back in step.
pub fn jittered(pause: Duration) -> Duration {
    let spread = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |now| now.subsec_nanos() % 1_000);
    pause.mul_f64(0.5 + f64::from(spread) / 2_000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_missing_permission_is_remembered_and_not_for_ever() {
        let objection = Objection::default();
        for passing in [
            "Slow Consumer",
            "Stale Connection",
            "Server Shutdown",
            "Maximum Payload Violation",
        ] {
            objection.note(passing);
            assert_eq!(objection.recent(), None, "{passing}");
        }
        objection.note(r#"Permissions Violation for Publish to "chat.general""#);
        objection.note("Stale Connection");
        assert!(objection.recent().unwrap().contains("chat.general"));
        let long_ago = Instant::now().checked_sub(OBJECTION_AGE).unwrap();
        objection.0.lock().unwrap().as_mut().unwrap().0 = long_ago;
        assert_eq!(objection.recent(), None);
    }
}
