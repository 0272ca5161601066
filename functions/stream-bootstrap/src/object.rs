//! A stream or a consumer: looked at, made, and changed field by field, through JetStream's JSON API.

use std::fmt;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::compare::{Config, differences, overlaid};
use crate::trouble::Trouble;
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

/// An object as it is to be.
#[derive(Debug, Clone)]
pub struct Object {
    /// Which.
    pub kind: Kind,
    /// Its fields.
    pub config: Config,
}

/// What the server says about an object, as far as we read it.
#[derive(Debug, Deserialize)]
struct Told {
    config: Config,
    /// Of a consumer: nothing is delivered now.
    #[serde(default)]
    paused: bool,
}

impl Object {
    /// As the server has it; `None` when it is not there.
    ///
    /// # Errors
    /// JetStream does not answer.
    pub async fn actual(&self, nats: &Connection) -> Result<Option<Config>, ApiError> {
        Ok(self.look(nats).await?.map(|told| told.config))
    }

    async fn look(&self, nats: &Connection) -> Result<Option<Told>, ApiError> {
        let (subject, missing) = match &self.kind {
            Kind::Stream { name } => (
                jetstream::api::stream("INFO", name),
                vec![ApiError::NO_STREAM],
            ),
            Kind::Consumer { stream, name } => (
                jetstream::api::consumer("INFO", stream, name),
                vec![ApiError::NO_CONSUMER, ApiError::NO_STREAM],
            ),
        };
        match nats.api::<Told>(&subject, &json!({})).await {
            Ok(told) => Ok(Some(told)),
            Err(error) if missing.iter().any(|code| error.is(*code)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What differs; one difference `(missing)` when the object is not there.
    ///
    /// # Errors
    /// JetStream does not answer.
    pub async fn check(&self, nats: &Connection) -> Result<Vec<Difference>, ApiError> {
        Ok(match self.look(nats).await? {
            Some(Told { config, paused }) => {
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

    /// Whoever held the deliveries back, nothing is stored until then. Not mended: it ends by itself, and a fence or a
    /// replay needs it.
    fn pause(&self, config: &Config) -> Difference {
        Difference {
            object: self.kind.to_string(),
            field: "pause_until".to_owned(),
            wanted: Value::Null,
            actual: config.get("pause_until").cloned().unwrap_or_default(),
        }
    }

    /// Makes it or changes what differs; says what was done.
    ///
    /// # Errors
    /// [`Trouble::Refused`] names the fields the server refuses, with its words.
    pub async fn apply(&self, nats: &Connection) -> Result<Vec<String>, Trouble> {
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
            .map_err(Trouble::from)
        {
            Ok(told) => self.settled(&told)?,
            Err(trouble) if trouble.passes() => return Err(trouble),
            Err(Trouble::Nats(ApiError::Refused { description, .. })) => {
                self.apply_one_by_one(nats, actual, found, &description)
                    .await?;
            }
            Err(trouble) => return Err(trouble),
        }
        Ok(done)
    }

    /// Makes it as it is to be.
    ///
    /// # Errors
    /// [`Trouble::Refused`] with the server's words.
    pub async fn create(&self, nats: &Connection) -> Result<(), Trouble> {
        let (subject, body) = match &self.kind {
            Kind::Stream { name } => (
                jetstream::api::stream("CREATE", name),
                Value::Object(said(&self.config)),
            ),
            Kind::Consumer { .. } => self.consumer_request(&self.config),
        };
        match nats.api::<Told>(&subject, &body).await {
            Ok(told) => self.settled(&told.config),
            Err(error) if Trouble::from(error.clone()).passes() => Err(error.into()),
            Err(error) => Err(Trouble::Refused(format!(
                "{} cannot be created: {error}",
                self.kind
            ))),
        }
    }

    /// The whole update was refused. Which field? Those that stand alone are applied, the others named.
    async fn apply_one_by_one(
        &self,
        nats: &Connection,
        mut actual: Config,
        found: Vec<Difference>,
        whole: &str,
    ) -> Result<(), Trouble> {
        let mut refused = Vec::new();
        for Difference {
            field,
            wanted,
            actual: was,
            ..
        } in found
        {
            let alone = Config::from_iter([(field.clone(), wanted.clone())]);
            match self.update(nats, &overlaid(&actual, &alone)).await {
                Ok(told) => actual = told,
                Err(ApiError::Refused { description, .. }) => {
                    refused.push(format!(
                        "{field} (wanted {wanted}, is {was}; the server says: {description})"
                    ));
                }
                Err(error) => return Err(error.into()),
            }
        }
        match (refused.is_empty(), self.settled(&actual)) {
            (true, settled) => settled,
            (false, _) => Err(Trouble::Refused(format!(
                "{}: the server refuses to change {}; change the shipped value, or make the object anew ({whole})",
                self.kind,
                refused.join(", ")
            ))),
        }
    }

    /// The configuration the server has after the update.
    async fn update(&self, nats: &Connection, config: &Config) -> Result<Config, ApiError> {
        let (subject, body) = match &self.kind {
            Kind::Stream { name } => (
                jetstream::api::stream("UPDATE", name),
                Value::Object(said(config)),
            ),
            Kind::Consumer { .. } => self.consumer_request(config),
        };
        Ok(nats.api::<Told>(&subject, &body).await?.config)
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

    /// A server may take a request and leave out a field it does not know.
    fn settled(&self, told: &Config) -> Result<(), Trouble> {
        match differences(&self.kind.to_string(), &self.config, told).first() {
            None => Ok(()),
            Some(Difference {
                field,
                wanted,
                actual,
                ..
            }) => Err(Trouble::Refused(format!(
                "{}: the server took the change and still has {field} {actual} instead of {wanted}; is it an older version, or a limit of the account?",
                self.kind
            ))),
        }
    }
}

/// Without what is not to be there: `null` is no value of most fields.
fn said(config: &Config) -> Config {
    config
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(field, value)| (field.clone(), value.clone()))
        .collect()
}
