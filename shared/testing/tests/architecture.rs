//! Which crate uses which: arrows go down, and `docs/ARCHITECTURE.md` shows them as they are.
//!
//! `SCROLLBACK_WRITE=1 cargo test -p testing --test architecture` draws the picture again.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// From the bottom up. A crate uses crates of the floors below its own and no others.
const FLOORS: [&[&str]; 4] = [
    &["base"],
    &["nats", "protocol", "postgres"],
    &["service", "jetstream"],
    &["timeline"],
];

/// Allowed to nobody: these know nothing of one another, and nothing of chat.
const APART: [(&str, &str); 8] = [
    ("service", "jetstream"),
    ("service", "postgres"),
    ("jetstream", "postgres"),
    ("service", "protocol"),
    ("jetstream", "protocol"),
    ("postgres", "protocol"),
    ("nats", "protocol"),
    ("postgres", "nats"),
];

const BEGIN: &str = "<!-- generated: crates -->";
const END: &str = "<!-- end: crates -->";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn libraries() -> Vec<&'static str> {
    FLOORS
        .iter()
        .flat_map(|floor| floor.iter().copied())
        .collect()
}

/// The floor a crate stands on; programs stand above all libraries.
fn floor(name: &str) -> usize {
    FLOORS
        .iter()
        .position(|floor| floor.contains(&name))
        .unwrap_or(FLOORS.len())
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "tests" {
            sources(&path, found);
        } else if name.ends_with(".rs") && name != "tests.rs" {
            found.push(path);
        }
    }
}

/// The libraries that the code in `folder` names, tests and comments aside.
fn used(folder: &Path, own: &str) -> BTreeSet<&'static str> {
    let mut files = Vec::new();
    sources(folder, &mut files);
    let mut found = BTreeSet::new();
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        for line in code
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
        {
            for name in libraries() {
                if name != own && names_crate(line, name) {
                    found.insert(name);
                }
            }
        }
    }
    found
}

/// Whether `line` has a path that begins with the crate `name`.
fn names_crate(line: &str, name: &str) -> bool {
    let path = format!("{name}::");
    line.match_indices(&path).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':')
    })
}

/// Every crate of the workspace but `testing` and the benchmarks: its group, and what it uses.
fn arrows() -> BTreeMap<String, (String, BTreeSet<&'static str>)> {
    let mut found = BTreeMap::new();
    for group in ["shared", "functions", "tools"] {
        let Ok(folders) = std::fs::read_dir(root().join(group)) else {
            continue;
        };
        for folder in folders {
            let path = folder.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if name != "testing" && path.join("Cargo.toml").exists() {
                let uses = used(&path.join("src"), &name);
                found.insert(name, (group.to_owned(), uses));
            }
        }
    }
    found
}

#[test]
fn arrows_go_down() {
    let arrows = arrows();
    assert!(
        arrows.len() > 15,
        "every crate is looked at: {:?}",
        arrows.keys()
    );
    for (name, (group, uses)) in &arrows {
        assert!(
            group != "shared" || libraries().contains(&name.as_str()),
            "{name} stands on no floor; add it to FLOORS"
        );
        for used in uses {
            assert!(
                floor(used) < floor(name),
                "{name} uses {used}, which stands no lower"
            );
            for (one, other) in APART {
                let apart = (name.as_str(), *used);
                assert!(
                    apart != (one, other) && apart != (other, one),
                    "{name} uses {used}"
                );
            }
        }
    }
}

#[test]
fn a_path_is_known_by_its_beginning() {
    assert!(names_crate("use service::ctx::Ctx;", "service"));
    assert!(names_crate("    let a = service::this!();", "service"));
    assert!(!names_crate("use crate::service::Reply;", "service"));
    assert!(!names_crate("my_service::run()", "service"));
}

/// The crates as a Mermaid graph, floor by floor from the top.
fn picture() -> String {
    let arrows = arrows();
    let of = |group: &str| {
        let names = arrows.iter().filter(|(_, (found, _))| found == group);
        names.map(|(name, _)| name.as_str()).collect::<Vec<_>>()
    };
    let shared_by = |names: &[&str]| {
        let sets = names
            .iter()
            .filter_map(|name| arrows.get(*name))
            .map(|(_, uses)| uses);
        sets.flatten().copied().collect::<BTreeSet<_>>()
    };
    let mut lines = vec!["```mermaid".to_owned(), "graph TD".to_owned()];
    for group in ["functions", "tools"] {
        let names = of(group);
        if !names.is_empty() {
            lines.push(format!("  {group}[\"{group}/<br>{}\"]", names.join("<br>")));
        }
    }
    for names in FLOORS.iter().rev() {
        lines.push(format!("  subgraph floor{}[\" \"]", floor(names[0])));
        lines.extend(names.iter().map(|name| format!("    {name}")));
        lines.push("  end".to_owned());
    }
    for group in ["functions", "tools"] {
        let uses = shared_by(&of(group));
        lines.extend(uses.iter().map(|used| format!("  {group} --> {used}")));
    }
    for name in libraries().iter().rev() {
        let uses = shared_by(&[name]);
        lines.extend(uses.iter().map(|used| format!("  {name} --> {used}")));
    }
    lines.push("```".to_owned());
    lines.join("\n")
}

#[test]
fn the_picture_in_architecture_is_the_code_s() {
    let path = root().join("docs/ARCHITECTURE.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text
        .split_once(BEGIN)
        .expect("ARCHITECTURE.md has the marker's begin");
    let (shown, after) = rest
        .split_once(END)
        .expect("ARCHITECTURE.md has the marker's end");
    let current = picture();
    if std::env::var_os("SCROLLBACK_WRITE").is_some() {
        let written = format!("{before}{BEGIN}\n{current}\n{END}{after}");
        std::fs::write(&path, written).unwrap();
        return;
    }
    assert_eq!(
        shown.trim(),
        current,
        "SCROLLBACK_WRITE=1 cargo test -p testing --test architecture draws it again"
    );
}
