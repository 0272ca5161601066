//! Where NATS is and who we are there.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;

use base::redact::{REDACTED, without_userinfo};

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

fn default_nats_url() -> String {
    "nats://127.0.0.1:4222".to_owned()
}
