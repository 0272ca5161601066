//! Where NATS is and who we are there.

use std::path::PathBuf;

use base::redact::SecretUrl;
use secrecy::SecretString;

/// Where NATS is and who we are there.
#[derive(Debug, Clone)]
pub struct NatsSettings {
    /// One server, or several separated by commas.
    pub url: SecretUrl,
    /// With [`NatsSettings::password`].
    pub user: Option<SecretString>,
    /// Of the user.
    pub password: Option<SecretString>,
    /// A credentials file, instead of user and password.
    pub credentials: Option<PathBuf>,
}

impl NatsSettings {
    /// A server that asks for no user, or for one that the URL contains.
    pub fn new(url: impl Into<SecretUrl>) -> NatsSettings {
        NatsSettings {
            url: url.into(),
            user: None,
            password: None,
            credentials: None,
        }
    }
}
