//! Receiving requests, on a connection that does nothing else.
//!
//! async-nats 0.51 parses the headers of every message it receives. A lone CR in one panics its
//! connection's task; other malformed headers make it reconnect, and messages on their way are
//! lost. This cannot be turned off. So requests and service discovery come in on a small client of
//! our own that only receives (`protocol.rs`, `handshake.rs`, `connection.rs`), and replies go out
//! on the function's other connection. A request's headers are parsed when it is handled, so bad
//! ones cost that request alone.
//!
//! Requests wait in a bounded queue that their callers share fairly (`fair_queue.rs`, `queue.rs`).
//! One dispatcher (`dispatch.rs`) starts them; those that are not worth starting are refused
//! (`refuse.rs`).
//!
//! Draining loses nothing: we send UNSUB and PING, and handle everything that arrives before the
//! PONG.

mod connection;
mod dispatch;
mod fair_queue;
mod handshake;
mod protocol;
mod queue;
mod refuse;

use std::time::Instant;

use bytes::Bytes;

pub(crate) use dispatch::{Answering, Setup};
pub(crate) use fair_queue::QueueLimits;
pub(crate) use queue::RequestQueue;

/// A request as it was received: neither headers nor payload are parsed yet.
#[derive(Debug)]
pub(crate) struct RawRequest {
    /// The index of the endpoint it is for.
    pub endpoint: usize,
    /// `None` when the bytes are not UTF-8.
    pub subject: Option<String>,
    pub reply: Option<String>,
    /// The header block as received.
    pub headers: Option<Bytes>,
    pub payload: Bytes,
    /// When its bytes were read from the socket. Its deadline counts from here.
    pub arrived: Instant,
}

/// The memory that a request takes beside its own bytes.
const REQUEST_OVERHEAD: usize = 256;

impl RawRequest {
    /// The memory it takes, in bytes.
    fn bytes(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        text(&self.subject)
            + text(&self.reply)
            + self.headers.as_ref().map_or(0, Bytes::len)
            + self.payload.len()
            + REQUEST_OVERHEAD
    }
}
