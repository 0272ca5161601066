//! Configuration: environment variables, nothing else.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::Fatal;

/// Where NATS is and who we are there; all that a tool without a database reads.
#[derive(Clone, Deserialize)]
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
        NatsSettings {
            nats_url: default_nats_url(),
            nats_user: None,
            nats_pass: None,
            nats_creds: None,
        }
    }
}

impl NatsSettings {
    /// `NATS_URL` as it may be printed.
    pub fn printable_url(&self) -> String {
        without_userinfo(&self.nats_url)
    }
}

/// Without the password, also where it stands in the URL.
impl fmt::Debug for NatsSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsSettings")
            .field("nats_url", &self.printable_url())
            .field("nats_user", &self.nats_user)
            .field("nats_pass", &self.nats_pass.as_ref().map(|_| REDACTED))
            .field("nats_creds", &self.nats_creds)
            .finish()
    }
}

const REDACTED: &str = "…";

/// One URL or several with commas between, as it may be printed: without user and password. Where a password holds
/// characters that should have been escaped, rather too much is left out.
fn without_userinfo(urls: &str) -> String {
    let mut shown = String::new();
    let mut rest = urls;
    while let Some(at) = rest.find('@') {
        let before = &rest[..at];
        let begin = before
            .rfind("://")
            .map(|scheme| scheme + 3)
            .or_else(|| before.rfind(',').map(|comma| comma + 1));
        shown.push_str(&before[..begin.unwrap_or(0)]);
        rest = &rest[at + 1..];
    }
    shown + rest
}

/// What every function reads. The table in `README.md` of this crate says the same in words.
#[derive(Clone, Deserialize)]
pub struct Settings {
    /// Read by itself in [`Settings::read`]: a flattened struct would turn every number here into text.
    #[serde(skip)]
    pub nats: NatsSettings,
    /// `DATABASE_URL` or `DATABASE_URL_FILE`.
    pub database_url: String,
    /// `DATABASE_CONNECTIONS`: the most connections one copy keeps.
    #[serde(default = "default_database_connections")]
    pub database_connections: u32,
    /// `DATABASE_IDLE_TIMEOUT_MS`: a connection that nobody used for so long is closed; below what a firewall, a pooler or
    /// `idle_session_timeout` allows.
    #[serde(default = "default_database_idle_timeout_ms")]
    pub database_idle_timeout_ms: u64,
    /// `DATABASE_MAX_LIFETIME_MS`: a connection as old as this is replaced.
    #[serde(default = "default_database_max_lifetime_ms")]
    pub database_max_lifetime_ms: u64,
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
const fn default_database_idle_timeout_ms() -> u64 {
    5 * 60 * 1_000
}
const fn default_database_max_lifetime_ms() -> u64 {
    30 * 60 * 1_000
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
fn default_max_text_bytes() -> usize {
    wire::Limits::default().text_bytes
}

const fn default_expire_days() -> u32 {
    30
}
/// A year.
const MAX_DATABASE_TIME_MS: u64 = 366 * 24 * 60 * 60 * 1_000;
/// A century: beyond it is a mistake, and 0 says "for ever".
const MAX_EXPIRE_DAYS: u32 = 36_500;
const DAY_MS: i64 = 24 * 60 * 60 * 1_000;

/// Without the passwords, also where they stand in URLs.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A password may stand in the query, too.
        let database = without_userinfo(self.database_url.split('?').next().unwrap_or_default());
        f.debug_struct("Settings")
            .field("nats", &self.nats)
            .field("database_url", &database)
            .field("database_connections", &self.database_connections)
            .field("max_concurrent_requests", &self.max_concurrent_requests)
            .field("max_waiting_requests", &self.max_waiting_requests)
            .field("max_waiting_bytes", &self.max_waiting_bytes)
            .field("request_deadline_ms", &self.request_deadline_ms)
            .field("max_text_bytes", &self.max_text_bytes)
            .field("expire_days", &self.expire_days)
            .field("health_file", &self.health_file)
            .finish()
    }
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

    pub(crate) fn database_idle_timeout(&self) -> Duration {
        Duration::from_millis(self.database_idle_timeout_ms)
    }

    pub(crate) fn database_max_lifetime(&self) -> Duration {
        Duration::from_millis(self.database_max_lifetime_ms)
    }

    /// What a message may weigh.
    pub fn limits(&self) -> wire::Limits {
        wire::Limits {
            text_bytes: self.max_text_bytes,
        }
    }

    /// What the log took at this time, in Unix milliseconds, or before has expired when it is `now`. `None` where nothing expires.
    pub(crate) fn cutoff_ms(&self, now: SystemTime) -> Option<i64> {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ms = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
        (self.expire_days > 0).then(|| now_ms.saturating_sub(i64::from(self.expire_days) * DAY_MS))
    }

    fn check(&self) -> Result<(), Fatal> {
        // The upper ends are far beyond what makes sense, and below what a semaphore, a pool or a moment can hold.
        let ranges = [
            (
                "DATABASE_CONNECTIONS",
                u64::from(self.database_connections),
                10_000,
            ),
            (
                "DATABASE_IDLE_TIMEOUT_MS",
                self.database_idle_timeout_ms,
                MAX_DATABASE_TIME_MS,
            ),
            (
                "DATABASE_MAX_LIFETIME_MS",
                self.database_max_lifetime_ms,
                MAX_DATABASE_TIME_MS,
            ),
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
            ("MAX_TEXT_BYTES", self.max_text_bytes as u64, 1 << 30),
        ];
        if self.max_waiting_bytes < MIN_WAITING_BYTES {
            return Err(Fatal::new(format!(
                "configuration: MAX_WAITING_BYTES must be at least {MIN_WAITING_BYTES}"
            )));
        }
        if self.expire_days > MAX_EXPIRE_DAYS {
            return Err(Fatal::new(format!(
                "configuration: EXPIRE_DAYS must be from 1 to {MAX_EXPIRE_DAYS}, or 0 for ever"
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

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Result<Settings, Fatal> {
        let vars = Vars::from_pairs(
            pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned())),
        )?;
        Settings::read(&vars)
    }

    #[test]
    fn a_wrong_configuration_is_named_in_one_line() {
        for (pairs, named) in [
            (vec![], "DATABASE_URL is not set"),
            (vec![("DATABASE_URL", "")], "DATABASE_URL is not set"),
            (
                vec![("DATABASE_URL", "x"), ("DATABASE_CONNECTIONS", "many")],
                "DATABASE_CONNECTIONS",
            ),
            (
                vec![("DATABASE_URL", "x"), ("DATABASE_IDLE_TIMEOUT_MS", "0")],
                "DATABASE_IDLE_TIMEOUT_MS must be at least 1",
            ),
            (
                vec![("DATABASE_URL", "x"), ("DATABASE_MAX_LIFETIME_MS", "30m")],
                "DATABASE_MAX_LIFETIME_MS",
            ),
            (
                vec![("DATABASE_URL", "x"), ("MAX_TEXT_BYTES", "0")],
                "MAX_TEXT_BYTES must be at least 1",
            ),
            (
                vec![
                    ("DATABASE_URL", "x"),
                    ("MAX_CONCURRENT_REQUESTS", "18446744073709551615"),
                ],
                "MAX_CONCURRENT_REQUESTS must be at most",
            ),
            (
                vec![
                    ("DATABASE_URL", "x"),
                    ("DATABASE_CONNECTIONS", "4294967295"),
                ],
                "DATABASE_CONNECTIONS must be at most 10000",
            ),
            (
                vec![
                    ("DATABASE_URL", "x"),
                    ("REQUEST_DEADLINE_MS", "18446744073709551615"),
                ],
                "REQUEST_DEADLINE_MS must be at most 3600000",
            ),
            (
                vec![("DATABASE_URL", "x"), ("EXPIRE_DAYS", "-1")],
                "EXPIRE_DAYS",
            ),
            (
                vec![("DATABASE_URL", "x"), ("EXPIRE_DAYS", "36501")],
                "EXPIRE_DAYS must be from 1 to 36500",
            ),
            (
                vec![("DATABASE_URL", "x"), ("MAX_WAITING_REQUESTS", "0")],
                "MAX_WAITING_REQUESTS must be at least 1",
            ),
            (
                vec![("DATABASE_URL", "x"), ("MAX_WAITING_BYTES", "1")],
                "MAX_WAITING_BYTES must be at least 2097152",
            ),
            (
                vec![("DATABASE_URL_FILE", "no/such/file")],
                "DATABASE_URL_FILE=no/such/file cannot be read",
            ),
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

    #[test]
    fn no_secret_is_ever_printed() {
        let pairs = [
            ("NATS_URL", "nats://bob:hunter2@a:1,tls://eve:hunter2@b"),
            ("NATS_PASS", "hunter2"),
            (
                "DATABASE_URL",
                "postgres://x:hunter2@db:5432/chat?password=hunter2",
            ),
        ];
        let vars =
            Vars::from_pairs(pairs.map(|(key, value)| (key.to_owned(), value.to_owned()))).unwrap();
        let printed = format!("{vars:?} {:?}", Settings::read(&vars).unwrap());
        assert!(
            !printed.contains("hunter2") && !printed.contains("bob"),
            "{printed}"
        );
        assert!(
            printed.contains("nats://a:1,tls://b") && printed.contains("postgres://db:5432/chat"),
            "{printed}"
        );
    }

    #[test]
    fn urls_are_printed_without_user_and_password() {
        for (url, shown) in [
            ("nats://here:4222", "nats://here:4222"),
            ("nats://u:p@here:4222", "nats://here:4222"),
            ("u:p@here", "here"),
            ("nats://a,u:p@b", "nats://b"),
            ("a,u:p@b", "a,b"),
            (
                "nats://a:1,nats://u:p@b:2,nats://t@c",
                "nats://a:1,nats://b:2,nats://c",
            ),
        ] {
            assert_eq!(without_userinfo(url), shown);
        }
        let unescaped = without_userinfo("nats://bob:hun,@ter://@two@here/x");
        assert!(
            !unescaped.contains("bob") && !unescaped.contains("hun"),
            "{unescaped}"
        );
    }
}
