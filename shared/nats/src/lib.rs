//! A connection to NATS, and what travels on it: headers, trace context, JetStream's JSON API.
//!
//! The floor that the service framework and the JetStream driver share. Nothing of chat.

pub mod connection;
pub mod headers;
pub mod settings;
pub mod trace;
