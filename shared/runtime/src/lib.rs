//! Everything around a handler: configuration, connections, the service API, consuming the log,
//! errors, telemetry, shutdown. `README.md` beside this crate walks one request through it.

mod append;
mod append_again;
mod collector;
mod config;
mod consume;
mod ctx;
mod database;
mod encoding;
mod error;
mod function;
mod headers;
mod log;
mod log_filter;
mod meter;
mod nats;
mod pulls;
mod requests;
mod service;
mod spans;
mod tail;
mod telemetry;
mod told;
mod union;

pub use append::{AppendError, PublishAck, PublishError, append};
pub use append_again::{Again, append_again};
pub use config::{NatsSettings, Settings, Vars};
pub use consume::{Delivery, LongWork, Worker};
pub use ctx::Ctx;
pub use database::{Class, Database, DatabaseError, SESSION};
pub use encoding::encoding_refusal;
pub use error::{Error, Fatal, Result};
pub use function::{Function, Identity, Running};
pub use headers::{MalformedHeaders, header_block, parse_headers};
pub use log::{Limit, Log, LogError, LogMessage, RawMessage, Walked, Window, message_id};
pub use meter::Meter;
pub use nats::{ApiError, Connection, connect};
pub use service::{Reply, Request};
pub use spans::{Failing, query_span};
pub use tail::{Tail, Tails, changes, few_changes, own_changes};
pub use telemetry::{
    Telemetry, inject_trace, link, new_instance_id, remote_parent, sampled_traceparent,
};
pub use told::{EventsPosition, foreign_events, told};
pub use union::{Cutoffs, Key, Merged, Part, Rows, Side, Union, assemble};

/// This function's name, version and description, from its `Cargo.toml`.
#[macro_export]
macro_rules! this {
    () => {
        $crate::Identity {
            name: env!("CARGO_PKG_NAME"),
            version: env!("CARGO_PKG_VERSION"),
            description: env!("CARGO_PKG_DESCRIPTION"),
        }
    };
}
