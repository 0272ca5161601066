//! What every crate shares: no I/O, and nothing of chat.

pub mod backoff;
pub mod discovery;
pub mod endpoint;
pub mod error;
pub mod header;
pub mod log_once;
pub mod redact;
pub mod seq;
pub mod span;
pub mod subject;
pub mod time;
