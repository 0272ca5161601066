//! What async-nats cannot do yet: a stream reader with bounded reads, a pull consumer that survives
//! malformed headers, acknowledged appends. Nothing of chat, nothing of PostgreSQL.

pub mod api;
pub mod append;
pub mod consumer;
mod pull;
pub mod stream;

/// The example of the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
