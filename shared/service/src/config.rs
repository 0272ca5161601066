//! Configuration: environment variables, nothing else.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use base::error::Fatal;
use nats::settings::NatsSettings;

/// What every function reads. `docs/OPERATIONS.md` has the table.
#[derive(Debug, Clone, Deserialize)]
pub struct Settings {
    /// Read by itself in [`Settings::read`]: a flattened struct would turn every number here into text.
    #[serde(skip)]
    pub nats: NatsSettings,
    /// `MAX_CONCURRENT_REQUESTS`: handled side by side in one copy; more wait their turn.
    #[serde(default = "default_max_concurrent_requests")]
    pub max_concurrent_requests: usize,
    /// `MAX_WAITING_REQUESTS`: requests of all callers together that wait for their turn; what does not fit is
    /// answered with 503.
    #[serde(default = "default_max_waiting_requests")]
    pub max_waiting_requests: usize,
    /// `MAX_WAITING_BYTES`: what these may take of memory.
    #[serde(default = "default_max_waiting_bytes")]
    pub max_waiting_bytes: usize,
    /// `REQUEST_DEADLINE_MS`: this long after its arrival a request is answered with 503.
    #[serde(default = "default_request_deadline_ms")]
    pub request_deadline_ms: u64,
    /// `HEALTH_FILE`: touched while healthy; what `--health` looks at.
    pub health_file: Option<PathBuf>,
}

const fn default_max_concurrent_requests() -> usize {
    256
}
/// Three seconds of work where a page takes 0.7 ms: more would wait longer than its deadline anyway.
const fn default_max_waiting_requests() -> usize {
    4_096
}
const fn default_max_waiting_bytes() -> usize {
    32 * 1024 * 1024
}
/// Room for the largest request that the server lets through, twice: one caller's must not shut out everybody's.
const MIN_WAITING_BYTES: usize = 2 * 1024 * 1024;
const fn default_request_deadline_ms() -> u64 {
    5_000
}
impl Settings {
    /// Reads and checks.
    ///
    /// # Errors
    /// Names the variable that is missing or wrong.
    pub fn read(vars: &Vars) -> Result<Settings, Fatal> {
        let settings = Settings {
            nats: vars.read()?,
            ..vars.read()?
        };
        settings.check()?;
        Ok(settings)
    }

    /// [`Settings::request_deadline_ms`] as a duration.
    pub fn request_deadline(&self) -> Duration {
        Duration::from_millis(self.request_deadline_ms)
    }

    fn check(&self) -> Result<(), Fatal> {
        // The upper ends are far beyond what makes sense, and below what a semaphore, a pool or a moment can hold.
        let ranges = [
            (
                "MAX_CONCURRENT_REQUESTS",
                self.max_concurrent_requests as u64,
                1_000_000,
            ),
            (
                "MAX_WAITING_REQUESTS",
                self.max_waiting_requests as u64,
                100_000_000,
            ),
            (
                "REQUEST_DEADLINE_MS",
                self.request_deadline_ms,
                60 * 60 * 1_000,
            ),
        ];
        if self.max_waiting_bytes < MIN_WAITING_BYTES {
            return Err(Fatal::new(format!(
                "configuration: MAX_WAITING_BYTES must be at least {MIN_WAITING_BYTES}"
            )));
        }
        match ranges
            .into_iter()
            .find(|(_, value, most)| *value == 0 || value > most)
        {
            Some((name, 0, _)) => Err(Fatal::new(format!(
                "configuration: {name} must be at least 1"
            ))),
            Some((name, _, most)) => Err(Fatal::new(format!(
                "configuration: {name} must be at most {most}"
            ))),
            None => Ok(()),
        }
    }
}

/// Secrets that may stand in a file instead, named by the variable with `_FILE` behind it.
const SECRETS: [&str; 3] = ["NATS_USER", "NATS_PASS", "DATABASE_URL"];

/// The environment a function sees. Passed in, so that a test can run several in one process.
#[derive(Clone, Default)]
pub struct Vars(HashMap<String, String>);

/// The names alone: any value may be a secret.
impl fmt::Debug for Vars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Vars {
    /// The environment of this process.
    ///
    /// # Errors
    /// A `*_FILE` that cannot be read.
    pub fn from_env() -> Result<Vars, Fatal> {
        Vars::from_pairs(
            std::env::vars_os().filter_map(|(key, value)| {
                Some((key.into_string().ok()?, value.into_string().ok()?))
            }),
        )
    }

    /// Any pairs, with the same rules.
    ///
    /// # Errors
    /// A `*_FILE` that cannot be read.
    pub fn from_pairs(pairs: impl IntoIterator<Item = (String, String)>) -> Result<Vars, Fatal> {
        let mut vars: HashMap<String, String> = pairs
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .collect();
        for secret in SECRETS {
            let Some(path) = vars.get(&format!("{secret}_FILE")) else {
                continue;
            };
            let text = std::fs::read_to_string(path).map_err(|error| {
                Fatal::new(format!(
                    "configuration: {secret}_FILE={path} cannot be read: {error}"
                ))
            })?;
            vars.insert(
                secret.to_owned(),
                text.trim_end_matches(['\r', '\n']).to_owned(),
            );
        }
        Ok(Vars(vars))
    }

    /// Reads a flat struct: field `nats_url` from `NATS_URL`.
    ///
    /// # Errors
    /// Names the variable that is missing or wrong.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, Fatal> {
        envy::from_iter(self.0.clone()).map_err(|error| {
            Fatal::new(match error {
                envy::Error::MissingValue(field) => {
                    format!("configuration: {} is not set", field.to_uppercase())
                }
                envy::Error::Custom(what) => format!("configuration: {what}"),
            })
        })
    }
}
