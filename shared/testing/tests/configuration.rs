//! What the functions' binaries declare as their variables, held against the documents and against
//! what a process does with a variable that is wrong.
//!
//! `SCROLLBACK_WRITE=1 cargo test -p testing --test configuration` renews the tables.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod generated;
#[expect(dead_code, reason = "endpoints are for other tests")]
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Output};

use serde_json::Value;
use testing::binary;

use generated::{hold, markdown};
use table::functions;

/// A function that ends at once with a line about `REQUEST_DEADLINE_MS`, after whatever it has to
/// say about other variables.
const ENDS_AT_ONCE: (&str, &str) = ("REQUEST_DEADLINE_MS", "0");
const NOBODY: &str = "nothing here reads it";

fn run(function: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(binary(function));
    command.args(arguments).env_clear();
    command.envs(variables.iter().copied()).output().unwrap()
}

/// What the function printed at its end: log and error.
fn printed(output: &Output) -> String {
    [&output.stdout, &output.stderr]
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .concat()
}

/// The variables a function declares, in its order.
fn variables(function: &str) -> Vec<Value> {
    let output = run(function, &["--variables"], &[]);
    assert!(output.status.success(), "{function}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn name(variable: &Value) -> &str {
    variable["name"].as_str().unwrap()
}

/// By function; those that every function has, under the empty name.
fn declared() -> BTreeMap<String, Vec<Value>> {
    let mut found: BTreeMap<String, Vec<Value>> = functions()
        .into_iter()
        .map(|function| (function.clone(), variables(&function)))
        .collect();
    let first = found.values().next().unwrap();
    let common: Vec<Value> = first
        .iter()
        .filter(|variable| found.values().all(|own| own.contains(variable)))
        .cloned()
        .collect();
    assert!(common.len() > 10, "every function reads NATS_URL and so on");
    for own in found.values_mut() {
        own.retain(|variable| !common.contains(variable));
    }
    found.insert(String::new(), common);
    found
}

/// A line of the reference.
fn row(variable: &Value) -> Vec<String> {
    let name = name(variable);
    let shown = match variable["secret"].as_bool().unwrap() {
        true => format!("`{name}` or `{name}_FILE`"),
        false => format!("`{name}`"),
    };
    let default = match variable["default"].as_str() {
        Some("") => String::new(),
        Some(default) => format!("`{default}`"),
        None if variable["required"] == true => "required".to_owned(),
        None => String::new(),
    };
    let mut meaning = variable["help"]
        .as_str()
        .unwrap()
        .trim_end_matches('.')
        .to_owned();
    if let Some(range) = variable["range"].as_str() {
        meaning = format!("{meaning}; {range}");
    }
    let kind = variable["type"].as_str().unwrap().to_owned();
    vec![shown, kind, default, meaning]
}

const HEAD: [&str; 4] = ["variable", "type", "default", "meaning"];

#[test]
fn the_configuration_reference_is_what_the_functions_declare() {
    let mut rows = Vec::new();
    for (function, variables) in declared() {
        if variables.is_empty() {
            continue;
        }
        let title = match function.as_str() {
            "" => "**every function**".to_owned(),
            function => format!("**{function}**"),
        };
        rows.push(vec![title, String::new(), String::new(), String::new()]);
        rows.extend(variables.iter().map(row));
    }
    let current = markdown(&HEAD, rows.into_iter());
    hold("docs/OPERATIONS.md", "configuration", &current);
}

#[test]
fn the_readme_of_a_function_has_its_own_variables() {
    for (function, variables) in declared() {
        if function.is_empty() {
            continue;
        }
        let document = format!("functions/{function}/README.md");
        if variables.is_empty() {
            let text = std::fs::read_to_string(table::root().join(&document)).unwrap();
            let shown = text.contains("<!-- generated: variables -->");
            assert!(!shown, "{document}: it has no variables of its own");
        } else {
            let current = markdown(&HEAD, variables.iter().map(row));
            hold(&document, "variables", &current);
        }
    }
}

/// A function warns about a variable that begins like its own and is not declared. So two functions
/// must not share a beginning, and where a variable has the same name it must be the same.
#[test]
fn a_variable_belongs_to_one_function_or_to_all() {
    let mut owners: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (function, variables) in declared() {
        for variable in &variables {
            let begin = name(variable).split('_').next().unwrap().to_owned();
            owners.entry(begin).or_default().insert(function.clone());
        }
    }
    owners.retain(|_, functions| functions.len() > 1);
    assert!(owners.is_empty(), "{owners:#?}");
}

#[test]
fn help_names_every_variable() {
    for function in functions() {
        let output = run(&function, &["--help"], &[]);
        let help = printed(&output);
        for variable in variables(&function) {
            let name = name(&variable);
            let begin = format!("  {name} ");
            assert!(
                help.lines().any(|line| line.starts_with(&begin)),
                "{function} --help has no {name}"
            );
        }
        for line in help.lines() {
            assert!(line.chars().count() <= 100, "{function} --help: {line}");
        }
    }
}

/// `./dev` and an operator's shell may hand every function the variables of all.
#[test]
fn the_variables_of_all_functions_in_one_environment_are_no_mistake() {
    let declared = declared();
    let mut all: Vec<(&str, &str)> = declared
        .values()
        .flatten()
        .filter_map(|variable| Some((name(variable), variable["default"].as_str()?)))
        .filter(|(name, _)| *name != ENDS_AT_ONCE.0)
        .collect();
    assert!(all.len() > 15, "{all:?}");
    // What else lies around where functions run.
    all.extend([
        ("NATS_USER", "bob"),
        ("DATABASE_URL", "postgres://here"),
        ("NATS_LISTEN", "127.0.0.1:4222"),
        ("NATS_MONITOR", "127.0.0.1:8222"),
        ("NATS_SERVICE_HOST", "10.0.0.1"),
        ("NATS_PORT_4222_TCP", "tcp://10.0.0.1:4222"),
        ("SEND_MESSAGE_PASSWORD", "hunter2"),
        ("MAX_JOBS", "2"),
        ENDS_AT_ONCE,
    ]);
    for function in functions() {
        let printed = printed(&run(&function, &[], &all));
        assert!(printed.contains("REQUEST_DEADLINE_MS must be"), "{printed}");
        assert!(!printed.contains(NOBODY), "{function}: {printed}");
    }
}

#[test]
fn a_misspelt_variable_is_named_at_start_without_its_value() {
    let wrong = [
        ("NATS_PASSWORD", "hunter2"),
        ("DATABSE_URL", "hunter2"),
        ("PERSIST_BACTH", "hunter2"),
        ENDS_AT_ONCE,
    ];
    let output = run("persist-message", &[], &wrong);
    let printed = printed(&output);
    for (name, meant) in [
        ("NATS_PASSWORD", "NATS_PASS"),
        ("DATABSE_URL", "DATABASE_URL"),
        ("PERSIST_BACTH", "PERSIST_BATCH"),
    ] {
        let line = format!("{name} is set, and {NOBODY}; did you mean {meant}?");
        assert_eq!(printed.matches(&line).count(), 1, "{printed}");
    }
    assert!(!printed.contains("hunter2"), "{printed}");
    // Another function's own: it does not concern this one.
    let other = [wrong[2], ENDS_AT_ONCE];
    let output = run("send-message", &[], &other);
    assert!(!self::printed(&output).contains(NOBODY));
}

#[test]
fn a_misspelt_filter_is_named_and_the_rest_holds() {
    let variables = [("RUST_LOG", "warn,sqlx=wran"), ENDS_AT_ONCE];
    let printed = printed(&run("get-history", &[], &variables));
    assert!(
        printed.contains("RUST_LOG: sqlx=wran") && printed.contains("going on with warn"),
        "{printed}"
    );
}

/// Before anything is connected: nothing listens at these addresses.
#[test]
fn a_wrong_value_ends_a_function_with_a_line_that_holds_no_secret() {
    let database = ("DATABASE_URL", "postgres://bob:hunter2@db/chat");
    let nats = ("NATS_URL", "nats://bob:hunter2@127.0.0.1:1");
    for (function, wrong, line) in [
        (
            "get-history",
            ("DATABASE_URL_FILE", "/no/such/file"),
            "both DATABASE_URL and DATABASE_URL_FILE are set; unset one of them",
        ),
        (
            "get-history",
            ("NATS_PASS_FILE", "/no/such/file"),
            "NATS_PASS_FILE=/no/such/file cannot be read: No such file or directory (os error 2)",
        ),
        (
            "get-history",
            ("EXPIRE_DAYS", "36501"),
            "EXPIRE_DAYS must be from 1 to 36500, or 0 for ever",
        ),
        (
            "persist-message",
            ("PERSIST_BATCH", "10001"),
            "PERSIST_BATCH must be at most 10000",
        ),
        (
            "send-message",
            ("SEND_RATE_PER_SECOND", "0"),
            "SEND_RATE_PER_SECOND must be at least 0.001",
        ),
        (
            "enforce-retention",
            ("CLOCK_TOLERANCE_HOURS", "8761"),
            "CLOCK_TOLERANCE_HOURS must be at most 8760",
        ),
        (
            "stream-bootstrap",
            ("BOOTSTRAP_INTERVAL_MS", "86400001"),
            "BOOTSTRAP_INTERVAL_MS must be at most 86400000, a day",
        ),
    ] {
        let output = run(function, &[], &[nats, database, wrong]);
        let printed = printed(&output);
        let expected = format!("{function}: configuration: {line}\n");
        assert_eq!(printed, expected, "{}", wrong.0);
        assert_eq!(output.status.code(), Some(1), "{}", wrong.0);
    }
    let output = run("get-history", &[], &[nats]);
    assert_eq!(
        printed(&output),
        "get-history: configuration: DATABASE_URL is not set\n"
    );
}
