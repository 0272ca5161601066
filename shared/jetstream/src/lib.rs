//! JetStream, as far as async-nats does not cover it yet.
//!
//! * [`stream`]: reads of a stream that are bounded in messages, bytes and time, and get past
//!   stored messages whose headers end the connection of every client.
//! * [`consumer`]: a pull consumer that several processes share, which survives such messages.
//! * [`publish`], [`append`], [`batch`]: acknowledged publishing, one message or an atomic batch.
//! * [`info`]: what the server reports about streams and consumers.
//!
//! Knows nothing of the application whose messages these are.
//!
//! # Example
//!
//! Prints every message of the stream `ORDERS`, and acknowledges what was printed:
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use base::error::Fatal;
//! use jetstream::consumer::{Options, Outcome, PullConsumer};
//! use jetstream::stream::{Names, StreamReader};
//! use nats::connection::connect;
//! use nats::settings::NatsSettings;
//! use tokio_util::sync::CancellationToken;
//!
//! async fn print_orders(stop: CancellationToken) -> Result<(), Fatal> {
//!     let settings = NatsSettings::new("nats://127.0.0.1:4222");
//!     let nats = connect(&settings, "example", &stop).await?;
//!     let names = Names { stream: "ORDERS", consumer: "billing" };
//!     let reader = StreamReader::new(nats, settings, "example", names, stop);
//!     let consumer = PullConsumer::new(reader, Options::new(100, Duration::from_secs(60)));
//!     consumer
//!         .run(|batch| async move {
//!             for delivery in batch.iter() {
//!                 println!("{}: {:?}", delivery.message.seq, delivery.message.payload);
//!             }
//!             Outcome::Processed
//!         })
//!         .await
//! }
//! ```

pub mod api;
pub mod append;
pub mod batch;
pub mod consumer;
pub mod info;
pub mod publish;
pub mod stream;
