//! Chat on stream and tables. The stream is the truth and PostgreSQL its projection; this crate
//! reads both as one.
//!
//! A read takes these steps, in this order; [`merge`] says why:
//!
//! 1. [`frontier`]: up to where the stream is stored, and where it ends.
//! 2. [`tail`]: the messages above that, from the stream.
//! 3. [`changes`]: the deletions above that, from the stream ([`unstored`] does both).
//! 4. [`query`]: the projection, with [`dedup`], [`cursors`] and [`cutoffs`].
//! 5. [`merge`]: a pure function of what was read.

pub mod append_again;
pub mod changes;
pub mod chat;
pub mod cursors;
pub mod cutoffs;
pub mod dedup;
pub mod deletion;
pub mod frontier;
pub mod merge;
pub mod message;
pub mod published;
pub mod query;
pub mod settings;
pub mod sql;
pub mod tail;
pub mod unstored;
