//! What every function that opens the chat reads beyond [`service::config::Settings`].

use std::time::Duration;

use base::redact::SecretUrl;
use protocol::message::Limits;

/// Below what a pool or a point in time can hold, and far beyond what makes sense.
const YEAR_MS: u64 = 366 * 24 * 60 * 60 * 1_000;

service::settings! {
    /// Where PostgreSQL is, and what all functions must agree on.
    pub struct ChatSettings {
        /// Where PostgreSQL is: `postgres://user:password@host:5432/database`.
        database_url: SecretUrl;
        /// Connections one replica keeps, at most.
        database_connections: u32 = 4, in 1..=10_000;
        /// A connection that nobody used for this long is closed; set it below what a firewall, a
        /// load balancer or `idle_session_timeout` allows.
        database_idle_timeout_ms: u64 = 300_000, in 1..=YEAR_MS;
        /// A connection this old is replaced.
        database_max_lifetime_ms: u64 = 1_800_000, in 1..=YEAR_MS;
        /// The longest text; the same for every function.
        max_text_bytes: usize = Limits::default().text_bytes, in 1..=1 << 30;
        /// Days messages are kept unless table `retention` says otherwise; the same for every
        /// function, because it decides while PostgreSQL is away.
        // Beyond a century is a mistake.
        expire_days: u32 = 30, in 0..=36_500 => "from 1 to 36500, or 0 for ever";
    }
}

impl ChatSettings {
    /// For the pool.
    pub(crate) fn database(&self) -> postgres::settings::Settings {
        postgres::settings::Settings {
            url: self.database_url.clone(),
            connections: self.database_connections,
            idle_timeout: Duration::from_millis(self.database_idle_timeout_ms),
            max_lifetime: Duration::from_millis(self.database_max_lifetime_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::error::Fatal;
    use service::config::Vars;

    fn settings(pairs: &[(&str, &str)]) -> Result<ChatSettings, Fatal> {
        let pairs = pairs.iter();
        let vars =
            Vars::from_pairs(pairs.map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        service::config::Settings::read(&vars)?;
        vars.read()
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
        assert_eq!(read.unwrap().database_url.expose(), "postgres://here");
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
        let vars = Vars::from_pairs(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let chat = vars.read::<ChatSettings>().unwrap();
        let printed = format!(
            "{vars:?} {:?} {chat:?} {:?}",
            service::config::Settings::read(&vars).unwrap(),
            chat.database()
        );
        assert!(
            !printed.contains("hunter2") && !printed.contains("bob"),
            "{printed}"
        );
        assert!(
            printed.contains("nats://a:1,tls://b") && printed.contains("postgres://db:5432/chat"),
            "{printed}"
        );
    }
}
