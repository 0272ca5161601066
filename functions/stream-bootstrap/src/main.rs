//! Keeps the streams, their consumers and the database schema in the desired state, and the
//! stream's sequences higher than every stored one.
//!
//! It does so at start, at an interval, and for `bootstrap.check` and `bootstrap.apply`. It also
//! answers `bootstrap.audit` and `bootstrap.replay`.

mod audit;
mod bootstrap;
mod compare;
mod deletions;
mod desired;
mod error;
mod foreign_events;
mod handler;
mod object;
mod reappend;
mod reconcile;
mod replay;
mod salvage;
mod schema;
mod sequence_guard;
mod stored;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use handler::State;
use protocol::endpoints::{BOOTSTRAP_APPLY, BOOTSTRAP_AUDIT, BOOTSTRAP_CHECK, BOOTSTRAP_REPLAY};
use reconcile::Reconcile;
use service::function::Function;
use service::this;

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<State> {
    Function::with(this!(), reconcile::apply_at_start)
        .settings(
            "
  BOOTSTRAP_CONFIG         a directory with streams/ and consumers/, instead of what is shipped
  BOOTSTRAP_INTERVAL_MS    how often everything is looked at (30000)
  BOOTSTRAP_ALLOW_REPLICAS true: num_replicas above 1 are taken, although reads may then miss what was acknowledged (false)",
        )
        .answer(BOOTSTRAP_CHECK, handler::check)
        .answer(BOOTSTRAP_APPLY, handler::apply)
        .answer(BOOTSTRAP_AUDIT, handler::audit)
        .answer(BOOTSTRAP_REPLAY, handler::replay)
        .job::<Reconcile>()
}
