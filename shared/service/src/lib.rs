//! A framework for functions behind the NATS service API: configuration, connection, endpoints, work,
//! telemetry, health, shutdown. `README.md` beside this crate walks one request through it.

extern crate self as service;

mod collector;
pub mod config;
pub mod ctx;
mod exporter;
pub mod function;
pub mod job;
mod log_filter;
pub mod meter;
pub mod request;
mod requests;
mod responder;
pub mod telemetry;

/// This function's name, version and description, from its `Cargo.toml`.
#[macro_export]
macro_rules! this {
    () => {
        $crate::function::Identity {
            name: env!("CARGO_PKG_NAME"),
            version: env!("CARGO_PKG_VERSION"),
            description: env!("CARGO_PKG_DESCRIPTION"),
        }
    };
}

/// The example of the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
