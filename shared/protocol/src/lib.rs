//! The protocol: endpoints with the types they carry, subjects, payloads, names.
//!
//! There is no I/O here, no clock and no randomness: everything is a value or the parsing of one.
//! The contract in words is `docs/PROTOCOL.md`.

pub mod audit;
pub mod body;
pub mod bootstrap;
pub mod change;
pub mod conversation;
pub mod dead_letters;
pub mod delete;
pub mod endpoints;
pub mod event;
pub mod header;
pub mod history;
pub mod js_api;
pub mod message;
pub mod name;
pub mod reason;
pub mod receipt;
pub mod retention;
pub mod send;
pub mod subject;
pub mod sync;

/// The name of the project: part of every service, and the beginning of every metric.
pub const PROJECT: &str = "scrollback";
