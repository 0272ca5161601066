//! A connection to NATS, and what travels on it.
//!
//! Beyond what async-nats does, this crate
//!
//! * connects with a private inbox prefix, and waits for servers that are away
//!   ([`connection::connect`]);
//! * remembers permission violations, which the server reports apart from what caused them
//!   ([`connection::PermissionViolations`]);
//! * sends requests to JetStream's JSON API ([`connection::Connection::api`]), whose replies hold
//!   stored headers as data, so that malformed ones break nothing;
//! * parses header blocks without ending the connection over a bad one ([`headers`]);
//! * carries W3C trace context in headers ([`trace`]).
//!
//! ```no_run
//! use nats::connection::connect;
//! use nats::settings::NatsSettings;
//! use tokio_util::sync::CancellationToken;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let stop = CancellationToken::new();
//! let nats = connect(&NatsSettings::new("nats://localhost:4222"), "example", &stop).await?;
//! let info: serde_json::Value = nats.api("$JS.API.INFO", &serde_json::json!({})).await?;
//! println!("{} streams", info["streams"]);
//! # Ok(())
//! # }
//! ```

pub mod connection;
pub mod headers;
pub mod settings;
pub mod span;
pub mod trace;
