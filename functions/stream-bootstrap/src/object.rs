//! A stream or a consumer: reads, creates and updates it field by field, through JetStream's JSON
//! API.

use std::fmt;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::compare::{Config, differences, overlaid};
use crate::error::Error;
use nats::connection::{ApiError, Connection};
use protocol::bootstrap::Difference;

/// Which object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A stream.
    Stream {
        /// Its name.
        name: String,
    },
    /// A durable consumer.
    Consumer {
        /// The stream it reads.
        stream: String,
        /// Its name.
        name: String,
    },
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Stream { name } => write!(f, "stream {name}"),
            Kind::Consumer { stream, name } => write!(f, "consumer {stream}/{name}"),
        }
    }
}

/// An object in its desired state.
#[derive(Debug, Clone)]
pub struct Object {
    /// Which one.
    pub kind: Kind,
    /// Its fields.
    pub config: Config,
}

/// What we read of the server's description of an object.
#[derive(Debug, Deserialize)]
struct Info {
    config: Config,
    /// Of a consumer: its deliveries are paused.
    #[serde(default)]
    paused: bool,
}

impl Object {
    /// The server's configuration of the object; `None` if it does not exist.
    ///
    /// # Errors
    /// JetStream does not answer.
    pub async fn actual(&self, nats: &Connection) -> Result<Option<Config>, ApiError> {
        Ok(self.info(nats).await?.map(|info| info.config))
    }

    async fn info(&self, nats: &Connection) -> Result<Option<Info>, ApiError> {
        let (subject, not_found) = match &self.kind {
            Kind::Stream { name } => (
                jetstream::api::stream("INFO", name),
                vec![ApiError::NO_STREAM],
            ),
            Kind::Consumer { stream, name } => (
                jetstream::api::consumer("INFO", stream, name),
                vec![ApiError::NO_CONSUMER, ApiError::NO_STREAM],
            ),
        };
        match nats.api::<Info>(&subject, &json!({})).await {
            Ok(info) => Ok(Some(info)),
            Err(error) if not_found.iter().any(|code| error.is(*code)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What differs; a single difference `(missing)` if the object does not exist.
    ///
    /// # Errors
    /// JetStream does not answer.
    pub async fn check(&self, nats: &Connection) -> Result<Vec<Difference>, ApiError> {
        Ok(match self.info(nats).await? {
            Some(Info { config, paused }) => {
                let mut found = differences(&self.kind.to_string(), &self.config, &config);
                if paused {
                    found.push(self.pause(&config));
                }
                found
            }
            None => vec![Difference {
                object: self.kind.to_string(),
                field: "(missing)".to_owned(),
                wanted: Value::Object(self.config.clone()),
                actual: Value::Null,
            }],
        })
    }

    /// A paused consumer stores nothing until then. This is reported but not changed, because the
    /// pause ends by itself, and the sequence guard and a replay need it.
    fn pause(&self, config: &Config) -> Difference {
        Difference {
            object: self.kind.to_string(),
            field: "pause_until".to_owned(),
            wanted: Value::Null,
            actual: config.get("pause_until").cloned().unwrap_or_default(),
        }
    }

    /// Creates the object, or updates what differs; returns what was done.
    ///
    /// # Errors
    /// [`Error::Refused`] names the fields that the server refuses, with the server's message.
    pub async fn apply(&self, nats: &Connection) -> Result<Vec<String>, Error> {
        let Some(actual) = self.actual(nats).await? else {
            self.create(nats).await?;
            return Ok(vec![format!("{} was created", self.kind)]);
        };
        let found = differences(&self.kind.to_string(), &self.config, &actual);
        if found.is_empty() {
            return Ok(Vec::new());
        }
        let changed = |one: &Difference| {
            format!(
                "{}: {} changed from {} to {}",
                self.kind, one.field, one.actual, one.wanted
            )
        };
        let done = found.iter().map(changed).collect();
        match self
            .update(nats, &overlaid(&actual, &self.config))
            .await
            .map_err(Error::from)
        {
            Ok(updated) => self.verify(&updated)?,
            Err(error) if error.is_transient() => return Err(error),
            Err(Error::Nats(ApiError::Refused { description, .. })) => {
                self.apply_one_by_one(nats, actual, found, &description)
                    .await?;
            }
            Err(error) => return Err(error),
        }
        Ok(done)
    }

    /// Creates the object.
    ///
    /// # Errors
    /// [`Error::Refused`] with the server's message.
    pub async fn create(&self, nats: &Connection) -> Result<(), Error> {
        let (subject, body) = match &self.kind {
            Kind::Stream { name } => (
                jetstream::api::stream("CREATE", name),
                Value::Object(without_null(&self.config)),
            ),
            Kind::Consumer { .. } => self.consumer_request(&self.config),
        };
        match nats.api::<Info>(&subject, &body).await {
            Ok(info) => self.verify(&info.config),
            Err(error) if Error::from(error.clone()).is_transient() => Err(error.into()),
            Err(error) => Err(Error::Refused(format!(
                "{} cannot be created: {error}",
                self.kind
            ))),
        }
    }

    /// The server refused the whole update, so we try its fields one by one: those it accepts are
    /// applied, the others are named.
    async fn apply_one_by_one(
        &self,
        nats: &Connection,
        mut actual: Config,
        found: Vec<Difference>,
        whole: &str,
    ) -> Result<(), Error> {
        let mut refused = Vec::new();
        for Difference {
            field,
            wanted,
            actual: was,
            ..
        } in found
        {
            let single = Config::from_iter([(field.clone(), wanted.clone())]);
            match self.update(nats, &overlaid(&actual, &single)).await {
                Ok(updated) => actual = updated,
                Err(ApiError::Refused { description, .. }) => {
                    refused.push(format!(
                        "{field} (wanted {wanted}, is {was}; the server says: {description})"
                    ));
                }
                Err(error) => return Err(error.into()),
            }
        }
        match (refused.is_empty(), self.verify(&actual)) {
            (true, verified) => verified,
            (false, _) => Err(Error::Refused(format!(
                "{}: the server refuses to change {}; change the desired value, or delete and \
                 recreate the object ({whole})",
                self.kind,
                refused.join(", ")
            ))),
        }
    }

    /// Updates the object; returns the configuration the server has afterwards.
    async fn update(&self, nats: &Connection, config: &Config) -> Result<Config, ApiError> {
        let (subject, body) = match &self.kind {
            Kind::Stream { name } => (
                jetstream::api::stream("UPDATE", name),
                Value::Object(without_null(config)),
            ),
            Kind::Consumer { .. } => self.consumer_request(config),
        };
        Ok(nats.api::<Info>(&subject, &body).await?.config)
    }

    fn consumer_request(&self, config: &Config) -> (String, Value) {
        let Kind::Consumer { stream, name } = &self.kind else {
            return Default::default();
        };
        (
            jetstream::api::consumer("DURABLE.CREATE", stream, name),
            json!({ "stream_name": stream, "config": config }),
        )
    }

    /// A server may accept a request and ignore a field that it does not know.
    fn verify(&self, actual: &Config) -> Result<(), Error> {
        match differences(&self.kind.to_string(), &self.config, actual).first() {
            None => Ok(()),
            Some(Difference {
                field,
                wanted,
                actual,
                ..
            }) => Err(Error::Refused(format!(
                "{}: the server took the change and still has {field} {actual} instead of \
                 {wanted}; is it an older version, or a limit of the account?",
                self.kind
            ))),
        }
    }
}

/// Without the fields that should be unset: for most fields the server does not accept `null`.
fn without_null(config: &Config) -> Config {
    config
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(field, value)| (field.clone(), value.clone()))
        .collect()
}
