//! Chat on stream and tables: the tail of the stream that is not stored yet, its merge with what is
//! stored, deletions, and up to where events are published.

pub mod append_again;
pub mod chat;
pub mod message;
pub mod published;
pub mod settings;
pub mod tail;
pub mod union;
