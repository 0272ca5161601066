//! Tables in documents that follow from the table of endpoints.
//!
//! `SCROLLBACK_WRITE=1 cargo test -p testing --test tables` renews them.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod generated;
#[expect(dead_code, reason = "the examples are for other tests")]
mod table;

use protocol::endpoints::{ENDPOINTS, Row};

use generated::{hold, markdown};
use table::{functions, root};

fn subject(row: &Row) -> String {
    format!("`{}`", row.template.text)
}

fn roles(row: &Row) -> String {
    let names: Vec<&str> = row.roles.iter().map(|role| role.as_str()).collect();
    names.join(", ")
}

fn endpoints_of(function: &str) -> Vec<&'static Row> {
    let rows = ENDPOINTS.iter();
    rows.filter(|row| row.function == function).collect()
}

/// What a function does, as its `Cargo.toml` and the service API describe it.
fn description(function: &str) -> String {
    let manifest = format!("functions/{function}/Cargo.toml");
    let text = std::fs::read_to_string(root().join(&manifest)).unwrap();
    let mut lines = text.lines();
    let line = lines.find_map(|line| line.strip_prefix("description = \""));
    let line = line.unwrap_or_else(|| panic!("{manifest} has no description"));
    line.trim_end_matches('"').trim_end_matches('.').to_owned()
}

/// Functions in the order of the table, then those that answer no requests.
fn in_order() -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let serving = ENDPOINTS.iter().map(|row| row.function.to_owned());
    for function in serving.chain(functions()) {
        if !found.contains(&function) {
            found.push(function);
        }
    }
    found
}

#[test]
fn the_readme_lists_every_function() {
    let rows = in_order().into_iter().map(|function| {
        let mut answers: Vec<String> = endpoints_of(&function)
            .iter()
            .map(|row| format!("`{}`", row.permission()))
            .collect();
        answers.dedup();
        vec![
            format!("[{function}](functions/{function})"),
            answers.join(", "),
            description(&function),
        ]
    });
    let table = markdown(&["function", "answers", "does"], rows);
    hold("README.md", "functions", &table);
}

#[test]
fn the_contract_lists_every_endpoint() {
    let rows = ENDPOINTS.iter().map(|row| {
        vec![
            subject(row),
            row.function.to_owned(),
            roles(row),
            row.description.to_owned(),
        ]
    });
    let table = markdown(&["subject", "function", "role", "does"], rows);
    hold("docs/PROTOCOL.md", "endpoints", &table);
}

#[test]
fn every_function_lists_its_subjects() {
    for function in functions() {
        let rows = endpoints_of(&function);
        if rows.is_empty() {
            continue;
        }
        let rows = rows
            .into_iter()
            .map(|row| vec![subject(row), roles(row), row.description.to_owned()]);
        let table = markdown(&["subject", "role", "does"], rows);
        hold(
            &format!("functions/{function}/README.md"),
            "subjects",
            &table,
        );
    }
}

#[test]
fn every_endpoint_is_served_by_a_function_that_exists() {
    let functions = functions();
    for row in ENDPOINTS {
        assert!(
            functions.iter().any(|function| function == row.function),
            "{} is served by {}, which is no folder of functions/",
            row.constant,
            row.function
        );
    }
}
