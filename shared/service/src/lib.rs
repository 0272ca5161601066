#![doc = include_str!("../README.md")]

extern crate self as service;

mod arguments;
mod collector;
pub mod config;
pub mod ctx;
mod exporter;
pub mod function;
mod health;
pub mod job;
mod log_filter;
pub mod meter;
mod plan;
pub mod request;
mod requests;
mod responder;
mod stop;
pub mod telemetry;

/// The [`Identity`](function::Identity) of a function that is a part of `$project`: name, version
/// and description come from its `Cargo.toml`.
#[macro_export]
macro_rules! this {
    ($project:expr) => {
        $crate::function::Identity {
            project: $project,
            name: env!("CARGO_PKG_NAME"),
            version: env!("CARGO_PKG_VERSION"),
            description: env!("CARGO_PKG_DESCRIPTION"),
        }
    };
}
