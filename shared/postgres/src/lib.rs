//! PostgreSQL as functions use it: a pool whose every use has a deadline that ends the query on the
//! server, a circuit breaker while the server is away, and errors classified by whose fault they are.

pub mod database;
pub mod encoding;
pub mod error;
pub mod lock;
mod presence;
pub mod settings;
pub mod span;
#[cfg(test)]
mod tests;
