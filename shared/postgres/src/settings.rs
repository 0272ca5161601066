//! Where PostgreSQL is and how it is used.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;

use base::error::Fatal;
use base::redact::without_userinfo;

/// Where PostgreSQL is and how it is used.
#[derive(Clone, Deserialize)]
pub struct Settings {
    /// `DATABASE_URL` or `DATABASE_URL_FILE`.
    pub database_url: String,
    /// `DATABASE_CONNECTIONS`: the most connections one replica keeps.
    #[serde(default = "default_database_connections")]
    pub database_connections: u32,
    /// `DATABASE_IDLE_TIMEOUT_MS`: an unused connection is closed after this; below what a firewall, a
    /// pooler or `idle_session_timeout` allows.
    #[serde(default = "default_database_idle_timeout_ms")]
    pub database_idle_timeout_ms: u64,
    /// `DATABASE_MAX_LIFETIME_MS`: a connection as old as this is replaced.
    #[serde(default = "default_database_max_lifetime_ms")]
    pub database_max_lifetime_ms: u64,
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
/// A year.
const MAX_DATABASE_TIME_MS: u64 = 366 * 24 * 60 * 60 * 1_000;

impl Settings {
    /// The defaults, for a URL.
    pub fn new(database_url: impl Into<String>) -> Settings {
        Settings {
            database_url: database_url.into(),
            database_connections: default_database_connections(),
            database_idle_timeout_ms: default_database_idle_timeout_ms(),
            database_max_lifetime_ms: default_database_max_lifetime_ms(),
        }
    }

    /// # Errors
    /// Names the variable that is out of range.
    pub fn check(&self) -> Result<(), Fatal> {
        for (name, value, most) in [
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
        ] {
            if value == 0 {
                return Err(Fatal::new(format!(
                    "configuration: {name} must be at least 1"
                )));
            }
            if value > most {
                return Err(Fatal::new(format!(
                    "configuration: {name} must be at most {most}"
                )));
            }
        }
        Ok(())
    }

    pub(crate) fn idle_timeout(&self) -> Duration {
        Duration::from_millis(self.database_idle_timeout_ms)
    }

    pub(crate) fn max_lifetime(&self) -> Duration {
        Duration::from_millis(self.database_max_lifetime_ms)
    }
}

/// Without the password, also where it stands in the URL.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A password may stand in the query, too.
        let url = self.database_url.split('?').next().unwrap_or_default();
        f.debug_struct("Settings")
            .field("database_url", &without_userinfo(url))
            .field("database_connections", &self.database_connections)
            .field("database_idle_timeout_ms", &self.database_idle_timeout_ms)
            .field("database_max_lifetime_ms", &self.database_max_lifetime_ms)
            .finish()
    }
}
