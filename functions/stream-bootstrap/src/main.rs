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
mod settings;
mod state;
mod stored;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use protocol::endpoints::{BOOTSTRAP_APPLY, BOOTSTRAP_AUDIT, BOOTSTRAP_CHECK, BOOTSTRAP_REPLAY};
use reconcile::Reconcile;
use service::function::Function;
use service::this;
use settings::Settings;
use state::State;
use timeline::settings::ChatSettings;

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<State> {
    Function::with(this!(protocol::PROJECT), reconcile::apply_at_start)
        .settings::<ChatSettings>()
        .settings::<Settings>()
        .answer(BOOTSTRAP_CHECK, handler::check)
        .answer(BOOTSTRAP_APPLY, handler::apply)
        .answer(BOOTSTRAP_AUDIT, handler::audit)
        .answer(BOOTSTRAP_REPLAY, handler::replay)
        .job::<Reconcile>()
}
