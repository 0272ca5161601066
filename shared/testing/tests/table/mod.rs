//! What several tests take from the table of endpoints and from the folder `functions/`.

use std::path::{Path, PathBuf};

use protocol::endpoints::{ENDPOINTS, Row};

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Every function, by name.
pub fn functions() -> Vec<String> {
    let folders = std::fs::read_dir(root().join("functions")).unwrap();
    let mut found: Vec<String> = folders
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert!(found.len() > 5, "functions/ is somewhere else");
    found
}

/// A valid subject of the endpoint.
pub fn example(row: &Row) -> String {
    let names: Vec<&str> = row
        .template
        .names()
        .into_iter()
        .map(|name| match name {
            "user" => "alice",
            "peer" => "bob",
            "room" => "general",
            other => panic!("no example for {{{other}}}; add one here"),
        })
        .collect();
    row.template.subject(&names)
}

/// The endpoints that a NATS user may call.
pub fn callable_by(user: &str) -> impl Iterator<Item = &'static Row> {
    let may = move |row: &&Row| row.roles.iter().any(|role| role.nats_user() == user);
    ENDPOINTS.iter().filter(may)
}
