//! Keeps secrets out of logs and errors.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Deserializer};

/// Printed in the place of a secret.
const REDACTED: &str = "…";

/// One URL, or several with commas between, that may contain a password. `Debug` and `Display` show
/// it without user, password and query; only [`SecretUrl::expose`] gives the whole text.
#[derive(Clone)]
pub struct SecretUrl(SecretString);

impl SecretUrl {
    /// The URL with everything in it, for the client that connects with it.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

impl From<&str> for SecretUrl {
    fn from(url: &str) -> SecretUrl {
        SecretUrl(url.into())
    }
}

impl From<String> for SecretUrl {
    fn from(url: String) -> SecretUrl {
        SecretUrl(url.into())
    }
}

impl<'de> Deserialize<'de> for SecretUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SecretUrl, D::Error> {
        String::deserialize(deserializer).map(SecretUrl::from)
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.expose();
        match url.split_once('?') {
            None => f.write_str(&without_userinfo(url)),
            // Two readings: a question mark in the password, or an at sign in the query. Where the
            // secret ends is not certain, so nothing but the scheme is shown.
            Some((before, query)) if query.contains('@') => {
                let scheme = before.split_once("://").map_or("", |(scheme, _)| scheme);
                write!(f, "{scheme}://{REDACTED}")
            }
            // A password may be in the query, too: `?password=…`.
            Some((before, _)) => f.write_str(&without_userinfo(before)),
        }
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// One URL, or several with commas between, without user and password. Where a password contains
/// characters that should have been escaped, more than the password is left out.
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

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn a_secret_url_shows_where_and_nothing_else() {
        for (url, shown) in [
            ("nats://a:1,tls://bob:hunter2@b", "nats://a:1,tls://b"),
            (
                "postgres://bob:hunter2@db/chat?password=hunter2",
                "postgres://db/chat",
            ),
            ("postgres://bob:hun?ter2@db/chat", "postgres://…"),
            ("postgres://db/chat?password=hun@ter2", "postgres://…"),
            ("bob:hun?ter2@db", "://…"),
        ] {
            let secret = SecretUrl::from(url);
            assert_eq!(secret.to_string(), shown);
            assert_eq!(format!("{secret:?}"), format!("\"{shown}\""));
            assert_eq!(secret.expose(), url);
        }
    }
}
