//! PostgreSQL as functions use it. A pool whose every use has a deadline that ends the query on the
//! server, a circuit breaker while the server is away, errors classified by what caused them, and
//! advisory locks.

mod circuit_breaker;
pub mod database;
pub mod encoding;
pub mod error;
pub mod lock;
pub mod settings;
pub mod span;
#[cfg(test)]
mod tests;
