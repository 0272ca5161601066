//! Real servers for tests: a nats-server with the configuration and the users of `nats/`, a
//! PostgreSQL with an empty database, the functions' real binaries, and nothing of it left when the
//! test process is gone.
//!
//! ```no_run
//! # async fn test() {
//! // stream, consumer and schema are in place
//! let world = testing::World::start().await;
//! // a real process, registered in the service API
//! let worker = world.spawn("persist-message").await;
//! let publisher = world.client("publisher").await;        // with exactly the rights of that user
//! publisher.publish("chat.general", r#"{"user":"alice","text":"hello"}"#.into()).await.unwrap();
//! worker.kill().await;                                    // SIGKILL
//! # }
//! ```
//!
//! Everything here panics rather than returns an error: a test has nothing to do without its
//! servers, and the panic carries the end of their logs. Linux only, for `/proc`.

#![expect(
    clippy::expect_used,
    reason = "a test has nothing to do without its servers"
)]

mod binaries;
mod child;
mod nats_server;
mod otlp_receiver;
mod plans;
mod ports;
mod postgres;
mod raw_client;
mod world;

use std::time::{Duration, Instant};

pub use binaries::binary;
pub use child::Process;
pub use nats_server::NatsServer;
pub use otlp_receiver::{Log, Metric, OtlpReceiver, Span};
pub use plans::at_every_size;
pub use postgres::Postgres;
pub use raw_client::{RawClient, RawMessage};
pub use world::{World, WorldBuilder};

/// How long to wait for what comes at once: only what never comes takes so long, on however busy a
/// machine.
pub const SOON: Duration = Duration::from_secs(60);

/// How often a condition is looked at again. Short beside what tests wait for, long beside what
/// looking costs.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Asks `probe` again and again until it gives `Some`, and returns what it gave.
///
/// Instead of sleeping: a test waits for the event, never for a time in which it has probably
/// happened.
///
/// # Panics
///
/// With `what` when `within` has passed and `probe` still gives `None`. `probe` is asked at least
/// once, and is not interrupted: bound what it does by itself.
pub async fn eventually<T>(
    what: &str,
    within: Duration,
    mut probe: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = probe().await {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}: not within {within:?}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
