//! JetStream, as far as async-nats does not cover it yet.
//!
//! * [`stream`]: reads of a stream that are bounded in messages, bytes and time, and get past stored
//!   messages whose headers end the connection of every client.
//! * [`consumer`]: a pull consumer that several processes share, which survives such messages.
//! * [`publish`], [`append`], [`batch`]: acknowledged publishing, one message or an atomic batch.
//! * [`info`]: what the server reports about streams and consumers.
//!
//! Knows nothing of the application whose messages these are.

pub mod api;
pub mod append;
pub mod batch;
pub mod consumer;
pub mod info;
pub mod publish;
pub mod stream;
