//! The arguments of a function's program. There are few, because configuration comes from the
//! environment.

use std::process::ExitCode;

use crate::config::{Variable, help, json};
use crate::function::Identity;
use crate::health;

/// Does what the arguments ask for; `None` when they ask for nothing, and so for the function.
pub(crate) fn handle(identity: &Identity, variables: &[Variable]) -> Option<ExitCode> {
    let Identity {
        name,
        version,
        description,
        ..
    } = identity;
    Some(match std::env::args().nth(1)?.as_str() {
        "--help" | "-h" => {
            println!("{name} {version}\n{description}\n");
            println!("{HELP_SETTINGS}\n{}\n{HELP_REST}", help(variables));
            ExitCode::SUCCESS
        }
        "--variables" => {
            println!("{:#}", json(variables));
            ExitCode::SUCCESS
        }
        "--version" | "-V" => {
            println!("{name} {version}");
            ExitCode::SUCCESS
        }
        "--health" => health::exit_code(),
        other => {
            eprintln!(
                "{name}: unknown argument {other:?}; configuration comes from the environment, \
                 see --help"
            );
            ExitCode::from(2)
        }
    })
}

const HELP_SETTINGS: &str = "Configuration comes from the environment:";

const HELP_REST: &str = "\
A variable with \"Or NAME_FILE\" may be in a file that NAME_FILE names; setting both is an error.

  --health     exits 0 when the running replica is healthy: HEALTH_FILE was touched within 20 s
  --variables  prints the variables as JSON
  --version    prints the version";
