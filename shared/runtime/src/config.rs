//! Configuration: environment variables, nothing else.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::Fatal;

/// Where NATS is and who we are there; all that a tool without a database reads.
#[derive(Debug, Clone, Deserialize)]
pub struct NatsSettings {
    /// `NATS_URL`: one server or several, separated by commas.
    #[serde(default = "default_nats_url")]
    pub nats_url: String,
    /// `NATS_USER`, with `NATS_PASS`.
    pub nats_user: Option<String>,
    /// `NATS_PASS` or `NATS_PASS_FILE`.
    pub nats_pass: Option<String>,
    /// `NATS_CREDS`: a credentials file, instead of user and password.
    pub nats_creds: Option<PathBuf>,
}

impl Default for NatsSettings {
    fn default() -> Self {
        NatsSettings { nats_url: default_nats_url(), nats_user: None, nats_pass: None, nats_creds: None }
    }
}

/// What every function reads. The table in `README.md` of this crate says the same in words.
#[derive(Debug, Clone, Deserialize)]
pub struct Settings {
    /// Read by itself in [`Settings::read`]: a flattened struct would turn every number here into text.
    #[serde(skip)]
    pub nats: NatsSettings,
    /// `DATABASE_URL` or `DATABASE_URL_FILE`.
    pub database_url: String,
    /// `DATABASE_CONNECTIONS`: the most connections one copy keeps.
    #[serde(default = "default_database_connections")]
    pub database_connections: u32,
    /// `MAX_CONCURRENT_REQUESTS`: handled side by side in one copy; more wait their turn.
    #[serde(default = "default_max_concurrent_requests")]
    pub max_concurrent_requests: usize,
    /// `REQUEST_DEADLINE_MS`: after this a request is answered with 503.
    #[serde(default = "default_request_deadline_ms")]
    pub request_deadline_ms: u64,
    /// `MAX_TEXT_BYTES`: the longest text; the same for every function.
    #[serde(default = "default_max_text_bytes")]
    pub max_text_bytes: usize,
    /// `EXPIRE_DAYS`: how long messages are kept, unless table `retention` says otherwise; 0 is for ever. The same for every
    /// function: it decides while PostgreSQL is away.
    #[serde(default = "default_expire_days")]
    pub expire_days: u32,
    /// `HEALTH_FILE`: touched while healthy; what `--health` looks at.
    pub health_file: Option<PathBuf>,
}

fn default_nats_url() -> String {
    "nats://127.0.0.1:4222".to_owned()
}
const fn default_database_connections() -> u32 {
    4
}
const fn default_max_concurrent_requests() -> usize {
    256
}
const fn default_request_deadline_ms() -> u64 {
    5_000
}
fn default_max_text_bytes() -> usize {
    wire::Limits::default().text_bytes
}

const fn default_expire_days() -> u32 {
    30
}
/// A century: beyond it is a mistake, and 0 says "for ever".
const MAX_EXPIRE_DAYS: u32 = 36_500;
const DAY_MS: i64 = 24 * 60 * 60 * 1_000;

impl Settings {
    /// Reads and checks.
    ///
    /// # Errors
    /// Names the variable that is missing or wrong.
    pub fn read(vars: &Vars) -> Result<Settings, Fatal> {
        let settings = Settings { nats: vars.read()?, ..vars.read()? };
        settings.check()?;
        Ok(settings)
    }

    /// [`Settings::request_deadline_ms`] as a duration.
    pub fn request_deadline(&self) -> Duration {
        Duration::from_millis(self.request_deadline_ms)
    }

    /// What a message may weigh.
    pub fn limits(&self) -> wire::Limits {
        wire::Limits { text_bytes: self.max_text_bytes }
    }

    /// What the log took at this time, in Unix milliseconds, or before has expired when it is `now`. `None` where nothing expires.
    pub(crate) fn cutoff_ms(&self, now: SystemTime) -> Option<i64> {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ms = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
        (self.expire_days > 0).then(|| now_ms.saturating_sub(i64::from(self.expire_days) * DAY_MS))
    }

    fn check(&self) -> Result<(), Fatal> {
        let positive = [
            ("DATABASE_CONNECTIONS", u64::from(self.database_connections)),
            ("MAX_CONCURRENT_REQUESTS", self.max_concurrent_requests as u64),
            ("REQUEST_DEADLINE_MS", self.request_deadline_ms),
            ("MAX_TEXT_BYTES", self.max_text_bytes as u64),
        ];
        if self.expire_days > MAX_EXPIRE_DAYS {
            return Err(Fatal::new(format!("configuration: EXPIRE_DAYS must be from 1 to {MAX_EXPIRE_DAYS}, or 0 for ever")));
        }
        match positive.into_iter().find(|(_, value)| *value == 0) {
            Some((name, _)) => Err(Fatal::new(format!("configuration: {name} must be at least 1"))),
            None => Ok(()),
        }
    }
}

/// Secrets that may stand in a file instead, named by the variable with `_FILE` behind it.
const SECRETS: [&str; 3] = ["NATS_USER", "NATS_PASS", "DATABASE_URL"];

/// The environment a function sees. Passed in, so that a test can run several in one process.
#[derive(Debug, Clone, Default)]
pub struct Vars(HashMap<String, String>);

impl Vars {
    /// The environment of this process.
    ///
    /// # Errors
    /// A `*_FILE` that cannot be read.
    pub fn from_env() -> Result<Vars, Fatal> {
        Vars::from_pairs(std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?))))
    }

    /// Any pairs, with the same rules.
    ///
    /// # Errors
    /// A `*_FILE` that cannot be read.
    pub fn from_pairs(pairs: impl IntoIterator<Item = (String, String)>) -> Result<Vars, Fatal> {
        let mut vars: HashMap<String, String> = pairs.into_iter().filter(|(_, value)| !value.is_empty()).collect();
        for secret in SECRETS {
            let Some(path) = vars.get(&format!("{secret}_FILE")) else { continue };
            let text = std::fs::read_to_string(path)
                .map_err(|error| Fatal::new(format!("configuration: {secret}_FILE={path} cannot be read: {error}")))?;
            vars.insert(secret.to_owned(), text.trim_end_matches(['\r', '\n']).to_owned());
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
                envy::Error::MissingValue(field) => format!("configuration: {} is not set", field.to_uppercase()),
                envy::Error::Custom(what) => format!("configuration: {what}"),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Result<Settings, Fatal> {
        let vars = Vars::from_pairs(pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())))?;
        Settings::read(&vars)
    }

    #[test]
    fn a_wrong_configuration_is_named_in_one_line() {
        for (pairs, named) in [
            (vec![], "DATABASE_URL is not set"),
            (vec![("DATABASE_URL", "")], "DATABASE_URL is not set"),
            (vec![("DATABASE_URL", "x"), ("DATABASE_CONNECTIONS", "many")], "DATABASE_CONNECTIONS"),
            (vec![("DATABASE_URL", "x"), ("MAX_TEXT_BYTES", "0")], "MAX_TEXT_BYTES must be at least 1"),
            (vec![("DATABASE_URL", "x"), ("EXPIRE_DAYS", "-1")], "EXPIRE_DAYS"),
            (vec![("DATABASE_URL", "x"), ("EXPIRE_DAYS", "36501")], "EXPIRE_DAYS must be from 1 to 36500"),
            (vec![("DATABASE_URL_FILE", "no/such/file")], "DATABASE_URL_FILE=no/such/file cannot be read"),
        ] {
            let line = settings(&pairs).unwrap_err().to_string();
            assert!(line.contains(named), "{line}");
            assert!(!line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn a_secret_may_stand_in_a_file() {
        let path = std::env::temp_dir().join(format!("scrollback-secret-{}", std::process::id()));
        std::fs::write(&path, "postgres://here\n").unwrap();
        let read = settings(&[("DATABASE_URL_FILE", path.to_str().unwrap())]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read.unwrap().database_url, "postgres://here");
    }
}
