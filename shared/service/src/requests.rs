//! Receiving requests, on a connection of our own.
//!
//! async-nats 0.51 parses the headers of whatever it receives: a lone CR in one panics its connection's task, other
//! malformed headers make it connect again, and what was on its way is lost. It cannot be told not to. So requests,
//! and the questions of service discovery, come in on a small client that only receives (`protocol.rs`,
//! `handshake.rs`, `connection.rs`), and replies go out on the function's other connection. Headers are parsed when
//! their request is handled. Requests wait in a bounded queue (`queue.rs`) that their callers share fairly, and one
//! dispatcher (`dispatch.rs`) starts them.
//!
//! Draining loses nothing: UNSUB, PING, and everything that comes before the PONG is delivered.

mod connection;
mod dispatch;
mod handshake;
mod protocol;
mod queue;

use std::time::Instant;

use bytes::Bytes;

pub(crate) use dispatch::{Answering, Setup, Waiting};
pub(crate) use queue::QueueLimits;

/// A request that nobody has looked into.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// Which of the function's endpoints it asks.
    pub endpoint: usize,
    /// `None` when the bytes are not UTF-8.
    pub subject: Option<String>,
    pub reply: Option<String>,
    /// The header block as it came.
    pub headers: Option<Bytes>,
    pub payload: Bytes,
    /// When its bytes were read from the socket: what its deadline counts from.
    pub arrived: Instant,
}

/// What a request takes in memory beside its own bytes.
const INCOMING_OVERHEAD: usize = 256;

impl Incoming {
    fn bytes(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        text(&self.subject)
            + text(&self.reply)
            + self.headers.as_ref().map_or(0, Bytes::len)
            + self.payload.len()
            + INCOMING_OVERHEAD
    }
}
