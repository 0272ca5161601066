//! Configuration: environment variables, nothing else. A crate declares what it reads with
//! [`settings!`](crate::settings); `envy` reads it.

mod declare;
mod reference;
mod typo;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use base::error::Fatal;
use base::redact::SecretUrl;
use nats::settings::NatsSettings;
use secrecy::SecretString;

pub(crate) use declare::Declarations;
pub use declare::{Declared, OutOfRange, Setting, Variable, in_range, range_in_words};
#[doc(hidden)]
pub use serde;

pub(crate) use reference::{help, json};
pub(crate) use typo::distance;
pub use typo::unknown;

crate::settings! {
    /// Where NATS is and who we are there; all that a tool without a database reads.
    pub struct NatsVariables {
        /// One server, or several separated by commas.
        nats_url: SecretUrl = "nats://127.0.0.1:4222";
        /// The user, together with `NATS_PASS`.
        nats_user: Option<SecretString>;
        /// The password of `NATS_USER`.
        nats_pass: Option<SecretString>;
        /// A credentials file, instead of user and password.
        nats_creds: Option<PathBuf>;
    }
}

impl From<NatsVariables> for NatsSettings {
    fn from(read: NatsVariables) -> NatsSettings {
        NatsSettings {
            url: read.nats_url,
            user: read.nats_user,
            password: read.nats_pass,
            credentials: read.nats_creds,
        }
    }
}

// The upper ends are far beyond what makes sense, and below what a semaphore or a deadline can
// hold.
crate::settings! {
    /// How requests are received, and where health is shown.
    pub struct RequestVariables {
        /// Requests handled side by side in one replica; more wait their turn.
        max_concurrent_requests: usize = 256, in 1..=1_000_000;
        /// Requests of all callers together that may wait; beyond it, the caller with the most
        /// waiting loses its newest, with 503.
        // Three seconds of work where a page takes 0.7 ms: more would wait beyond its deadline.
        max_waiting_requests: usize = 4_096, in 1..=100_000_000;
        /// Memory that waiting requests may take.
        // Room for two of the largest requests that the server accepts: one caller's must not shut
        // out everybody's.
        max_waiting_bytes: usize = 32 * 1024 * 1024, in 2 * 1024 * 1024..;
        /// A request this old is answered with 503.
        request_deadline_ms: u64 = 5_000, in 1..=3_600_000;
        /// A file touched while the replica is healthy; `NAME --health` looks at its age.
        health_file: Option<PathBuf>;
    }
}

/// What every function reads.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where NATS is.
    pub nats: NatsSettings,
    /// How requests are received.
    pub requests: RequestVariables,
}

impl Settings {
    /// # Errors
    /// Names the variable that is missing or wrong.
    pub fn read(vars: &Vars) -> Result<Settings, Fatal> {
        Ok(Settings {
            nats: vars.read::<NatsVariables>()?.into(),
            requests: vars.read()?,
        })
    }

    /// How long a request may take, from its arrival.
    pub fn request_deadline(&self) -> Duration {
        Duration::from_millis(self.requests.request_deadline_ms)
    }
}

/// Read before anything else, by the log and by OpenTelemetry's own libraries: not through
/// [`settings!`](crate::settings), but in the reference like all others.
pub(crate) const STANDARD: [Variable; 2] = [
    Variable {
        field: "rust_log",
        help: "Which log lines are written; a directive that cannot be meant is named at start.",
        kind: "text",
        secret: false,
        optional: true,
        default: Some(|| crate::log_filter::DEFAULT_FILTER.to_owned()),
        range: None,
    },
    Variable {
        field: "otel_*",
        help: "The standard variables of OpenTelemetry; nothing is exported when none is set.",
        kind: "text",
        secret: false,
        optional: true,
        default: None,
        range: None,
    },
];

/// The environment a function sees. Passed in, so that a test can run several in one process.
#[derive(Clone, Default)]
pub struct Vars {
    set: BTreeMap<String, String>,
    /// Variables whose value is not UTF-8.
    unreadable: BTreeSet<String>,
}

/// The names alone: any value may be a secret.
impl fmt::Debug for Vars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.set.keys()).finish()
    }
}

impl Vars {
    /// The environment of this process.
    pub fn from_env() -> Vars {
        let mut vars = Vars::default();
        for (name, value) in std::env::vars_os() {
            vars.insert(name, value);
        }
        vars
    }

    /// Any pairs, with the same rules.
    pub fn from_pairs(pairs: impl IntoIterator<Item = (String, String)>) -> Vars {
        let mut vars = Vars::default();
        for (name, value) in pairs {
            vars.insert(name.into(), value.into());
        }
        vars
    }

    /// An empty variable counts as not set: `docker compose` passes those that have no value so.
    fn insert(&mut self, name: OsString, value: OsString) {
        let Ok(name) = name.into_string() else {
            return;
        };
        match value.into_string() {
            Ok(value) if value.is_empty() => {}
            Ok(value) => {
                self.set.insert(name, value);
            }
            Err(_) => {
                self.unreadable.insert(name);
            }
        }
    }

    /// Reads and checks what `T` declares.
    ///
    /// # Errors
    /// Names the variable that is missing or wrong.
    pub fn read<T: Declared>(&self) -> Result<T, Fatal> {
        let mut pairs = Vec::new();
        for variable in T::VARIABLES {
            let given = self.given(variable)?;
            if let Some(value) = given.or_else(|| variable.default.map(|default| default())) {
                pairs.push((variable.name(), value));
            }
        }
        let settings: T = envy::from_iter(pairs).map_err(|error| {
            Fatal::new(match error {
                envy::Error::MissingValue(field) => {
                    format!("configuration: {} is not set", field.to_uppercase())
                }
                envy::Error::Custom(what) => format!("configuration: {what}"),
            })
        })?;
        settings.check()?;
        Ok(settings)
    }

    /// The value from the environment or, for a secret, from the file that `NAME_FILE` names.
    fn given(&self, variable: &Variable) -> Result<Option<String>, Fatal> {
        let name = variable.name();
        let file = format!("{name}_FILE");
        if let Some(unreadable) = [&name, &file]
            .into_iter()
            .find(|name| self.unreadable.contains(*name))
        {
            return Err(Fatal::new(format!(
                "configuration: {unreadable} is not UTF-8"
            )));
        }
        let value = self.set.get(&name).cloned();
        let Some(path) = self.set.get(&file).filter(|_| variable.secret) else {
            return Ok(value);
        };
        if value.is_some() {
            return Err(Fatal::new(format!(
                "configuration: both {name} and {file} are set; unset one of them"
            )));
        }
        let text = std::fs::read_to_string(path).map_err(|error| {
            Fatal::new(format!(
                "configuration: {file}={path} cannot be read: {error}"
            ))
        })?;
        match text.trim_end_matches(['\r', '\n']) {
            "" => Err(Fatal::new(format!("configuration: {file}={path} is empty"))),
            secret => Ok(Some(secret.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests;
