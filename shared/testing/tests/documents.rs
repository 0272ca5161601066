//! The documents, held against the files they speak of.
//!
//! `SCROLLBACK_WRITE=1` renews what is made from code.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

#[path = "documents/picture.rs"]
mod picture;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The longest line of prose.
const COLUMNS: usize = 100;
const README_LINES: usize = 90;
/// What the README of every function says, in this order.
const TEMPLATE: [&str; 6] = [
    "## Does",
    "## Subjects",
    "## Variables",
    "## Guarantees",
    "## Limits",
    "## Decided",
];
/// Where a path in backticks begins.
const FOLDERS: [&str; 8] = [
    "docs/",
    "functions/",
    "shared/",
    "tools/",
    "nats/",
    "bench/",
    "migrations/",
    ".ci/",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What a folder holds, by name.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    found.sort();
    found
}

/// Every file below `folder` whose name ends in one of `endings`.
fn files(folder: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
    for path in entries(folder) {
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" {
                files(&path, endings, found);
            }
        } else if endings.iter().any(|ending| name.ends_with(ending)) {
            found.push(path);
        }
    }
}

/// A document and where it is.
struct Document {
    path: PathBuf,
    text: String,
}

impl Document {
    /// For messages of tests.
    fn name(&self) -> String {
        self.path
            .strip_prefix(root())
            .unwrap()
            .display()
            .to_string()
    }

    /// Lines that are prose, with their numbers from 1 on: no code, no table.
    fn prose(&self) -> Vec<(usize, &str)> {
        let outside = self.outside_code().into_iter();
        outside
            .filter(|(_, line)| !line.trim_start().starts_with('|'))
            .collect()
    }

    /// Lines outside of fenced code.
    fn outside_code(&self) -> Vec<(usize, &str)> {
        let mut inside = false;
        let mut kept = Vec::new();
        for (number, line) in (1..).zip(self.text.lines()) {
            if line.trim_start().starts_with("```") {
                inside = !inside;
            } else if !inside {
                kept.push((number, line));
            }
        }
        kept
    }

    /// The anchors of its headings, as GitHub makes them.
    fn anchors(&self) -> BTreeSet<String> {
        let headings = self.outside_code().into_iter();
        headings
            .filter(|(_, line)| line.starts_with('#'))
            .map(|(_, line)| anchor(line.trim_start_matches('#').trim()))
            .collect()
    }
}

fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter_map(|c| match c {
        ' ' => Some('-'),
        '-' | '_' => Some(c),
        c if c.is_alphanumeric() => Some(c.to_ascii_lowercase()),
        _ => None,
    });
    kept.collect()
}

fn documents() -> Vec<Document> {
    let mut found = Vec::new();
    files(&root(), &[".md"], &mut found);
    let documents: Vec<Document> = found
        .into_iter()
        .map(|path| Document {
            text: read(&path),
            path,
        })
        .collect();
    assert!(documents.len() > 20, "the documents are somewhere else");
    documents
}

/// What stands between `open` and `close`, each time.
fn between<'a>(line: &'a str, open: &str, close: &str) -> Vec<&'a str> {
    let mut found = Vec::new();
    let mut rest = line;
    while let Some((_, after)) = rest.split_once(open) {
        let Some((inside, behind)) = after.split_once(close) else {
            break;
        };
        found.push(inside);
        rest = behind;
    }
    found
}

#[test]
fn every_link_leads_somewhere() {
    let mut broken = Vec::new();
    for document in documents() {
        for (number, line) in document.outside_code() {
            for link in between(line, "](", ")") {
                if link.starts_with("http") {
                    continue;
                }
                let (file, heading) = link.split_once('#').unwrap_or((link, ""));
                let target = match file {
                    "" => document.path.clone(),
                    file => document.path.parent().unwrap().join(file),
                };
                let leads = target.exists() && (heading.is_empty() || has_heading(target, heading));
                if !leads {
                    broken.push(format!("{}:{number}: {link}", document.name()));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

fn has_heading(path: PathBuf, heading: &str) -> bool {
    let text = read(&path);
    Document { path, text }.anchors().contains(heading)
}

/// The code that a document is about: the README of a crate speaks of that crate.
fn code_beside(document: &Document) -> Vec<PathBuf> {
    let folder = document.path.parent().unwrap();
    let folders = if folder.join("src").exists() {
        vec![folder.to_owned()]
    } else {
        vec![
            root().join("functions"),
            root().join("shared"),
            root().join("tools"),
        ]
    };
    let mut found = Vec::new();
    for folder in folders {
        files(&folder, &[".rs", ".sql"], &mut found);
    }
    found
}

#[test]
fn every_file_that_is_named_exists() {
    let mut missing = Vec::new();
    for document in documents() {
        let sources = code_beside(&document);
        for (number, line) in document.outside_code() {
            for name in between(line, "`", "`") {
                let is_path = FOLDERS.iter().any(|folder| name.starts_with(folder));
                let is_source = name.ends_with(".rs") || name.ends_with(".sql");
                let exists = if name.contains([' ', '*', '{', '<', '…']) {
                    // A pattern.
                    true
                } else if is_path {
                    root().join(name).exists()
                } else if is_source {
                    sources.iter().any(|source| source.ends_with(name))
                } else {
                    true
                };
                if !exists {
                    missing.push(format!("{}:{number}: {name}", document.name()));
                }
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn prose_is_no_wider_than_code() {
    let mut wide = Vec::new();
    for document in documents() {
        for (number, line) in document.prose() {
            // The target of a link cannot be broken.
            let links: usize = between(line, "](", ")")
                .iter()
                .map(|link| link.chars().count())
                .sum();
            if line.chars().count() - links > COLUMNS {
                wide.push(format!("{}:{number}", document.name()));
            }
        }
    }
    assert!(wide.is_empty(), "more than {COLUMNS} columns: {wide:#?}");
}

#[test]
fn the_readme_fits_on_two_screens() {
    let lines = read(&root().join("README.md")).lines().count();
    assert!(
        lines <= README_LINES,
        "{lines} lines; what is more goes to docs/"
    );
}

#[test]
fn every_function_has_a_readme_of_the_template() {
    for function in entries(&root().join("functions")) {
        let path = function.join("README.md");
        let text = read(&path);
        let headings: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("## "))
            .collect();
        assert_eq!(headings, TEMPLATE, "{}", path.display());
    }
}

#[test]
fn every_invariant_names_its_file_and_its_test() {
    let architecture = read(&root().join("docs/ARCHITECTURE.md"));
    let (_, invariants) = architecture.split_once("\n## Invariants\n").unwrap();
    let rows = invariants
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| |"));
    let mut count = 0;
    for (expected, row) in (1..).zip(rows) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, number, _, held_by, shown_by, _] = cells[..] else {
            panic!("not a row of four: {row}");
        };
        assert_eq!(number, expected.to_string(), "{row}");
        let held = between(held_by, "`", "`");
        assert!(
            !held.is_empty() && held.iter().all(|file| root().join(file).exists()),
            "{row}"
        );
        let [file, test] = between(shown_by, "`", "`")[..] else {
            panic!("a file and a test: {row}");
        };
        let source = read(&root().join(file));
        assert!(
            source.contains(&format!("fn {test}()")),
            "{file} has no test {test}"
        );
        count = expected;
    }
    assert!(count > 30, "{count} invariants");
}

#[test]
fn what_the_glossary_keeps_exists() {
    let mut sources = Vec::new();
    for folder in ["functions", "shared", "migrations"] {
        files(&root().join(folder), &[".rs", ".sql"], &mut sources);
    }
    let code: String = sources.iter().map(|path| read(path)).collect();
    let glossary = read(&root().join("docs/GLOSSARY.md"));
    let (_, kept) = glossary
        .split_once("\n## Names that keep an older word\n")
        .unwrap();
    let rows = kept.lines().filter(|line| line.starts_with("| `"));
    for row in rows {
        let first = row.split('|').nth(1).unwrap();
        for name in between(first, "`", "`") {
            // Of a name with a pattern or a prefix, what is fixed of it.
            let fixed = name
                .rsplit("scrollback.log")
                .next()
                .unwrap()
                .trim_start_matches(['.', '_'])
                .split(['(', '<', ':', '*'])
                .next()
                .unwrap();
            let fixed = fixed.rsplit(['.']).next().unwrap();
            assert!(
                code.contains(fixed),
                "{name} ({fixed}) is nowhere in the code"
            );
        }
    }
}

/// Everything that reads, sets or explains a variable, as one text.
fn everything_but_documents() -> String {
    let mut found = vec![root().join("dev"), root().join("justfile")];
    let endings = [".rs", ".sql", ".yml", ".yaml", ".conf", ".toml", ".json"];
    files(&root(), &endings, &mut found);
    found.iter().map(|path| read(path)).collect()
}

/// A field of `service::settings!`, or the file of one that is a secret.
fn is_declared(code: &str, name: &str) -> bool {
    let field = name.strip_suffix("_FILE").unwrap_or(name).to_lowercase();
    code.contains(&format!("\n        {field}: "))
}

#[test]
fn every_variable_and_constant_that_is_named_exists() {
    let code = everything_but_documents();
    let mut missing = Vec::new();
    for document in documents() {
        for (number, line) in document.outside_code() {
            for name in between(line, "`", "`") {
                let shouts = name
                    .chars()
                    .all(|c| c.is_ascii_uppercase() || c == '_' || c.is_ascii_digit());
                // OpenTelemetry reads its own.
                let ours = name.contains('_') && !name.starts_with("OTEL_");
                if shouts && ours && !code.contains(name) && !is_declared(&code, name) {
                    missing.push(format!("{}:{number}: {name}", document.name()));
                }
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn the_ports_of_dev_and_compose_are_in_operations() {
    let operations = read(&root().join("docs/OPERATIONS.md"));
    let mut count = 0;
    for file in ["dev", "docker-compose.yml"] {
        for default in between(&read(&root().join(file)), "${SCROLLBACK_", "}") {
            let Some((name, port)) = default.split_once("_PORT:-") else {
                continue;
            };
            let row = format!("| `SCROLLBACK_{name}_PORT` | {port} |");
            assert!(
                operations.contains(&row),
                "{file} has {default}, and OPERATIONS no {row}"
            );
            count += 1;
        }
    }
    assert!(count > 4, "{count} ports");
}

#[test]
fn the_picture_is_current() {
    let functions: Vec<String> = entries(&root().join("functions"))
        .iter()
        .map(|function| function.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    let drawn = picture::draw(&functions);
    for function in &functions {
        let shown = drawn.contains(&format!(">{function}</text>"));
        assert!(shown, "{function} is not in the picture");
    }
    let path = root().join("docs/pictures/flow.svg");
    if std::env::var_os("SCROLLBACK_WRITE").is_some() {
        std::fs::write(&path, &drawn).unwrap();
    }
    assert!(
        std::fs::read_to_string(&path).is_ok_and(|committed| committed == drawn),
        "docs/pictures/flow.svg is old: SCROLLBACK_WRITE=1 cargo test -p testing --test documents"
    );
}
