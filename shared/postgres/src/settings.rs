//! Where PostgreSQL is and how it is used.

use std::time::Duration;

use base::redact::SecretUrl;

/// Where PostgreSQL is and how it is used.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `postgres://user:password@host:5432/database`.
    pub url: SecretUrl,
    /// The most connections of the pool.
    pub connections: u32,
    /// A connection that nobody used for this long is closed.
    pub idle_timeout: Duration,
    /// A connection this old is replaced.
    pub max_lifetime: Duration,
}
