//! Parts of documents that are made from code.

use std::path::Path;

/// Holds what stands between two markers of a document against `current`, or renews it.
pub fn hold(document: &str, name: &str, current: &str) {
    let begin = format!("<!-- generated: {name} -->");
    let end = format!("<!-- end: {name} -->");
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(document);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{document}: {error}"));
    let between = text
        .split_once(&begin)
        .and_then(|(before, rest)| Some((before, rest.split_once(&end)?)));
    let Some((before, (shown, after))) = between else {
        panic!("{document} has no {begin} … {end}; add both where the table belongs");
    };
    if std::env::var_os("SCROLLBACK_WRITE").is_some() {
        let renewed = format!("{before}{begin}\n{current}{end}{after}");
        std::fs::write(&path, renewed).unwrap();
        return;
    }
    assert!(
        shown.trim() == current.trim(),
        "{document} is old: SCROLLBACK_WRITE=1 cargo test -p testing"
    );
}

/// A table.
pub fn markdown(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let rule = format!("|{}\n", "---|".repeat(head.len()));
    let rows: String = rows.map(|cells| line(&cells)).collect();
    line(&head) + &rule + &rows
}
