//! The words of the house, and its width: the field's words stand everywhere, except for the names
//! that `docs/GLOSSARY.md` keeps because clients, operators or scripts hold them.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::path::{Path, PathBuf};

/// The longest line of code, SQL or comment.
const COLUMNS: usize = 100;

/// A word of our own, and the field's word for it.
const WORDS: &[(&str, &str)] = &[
    ("told", "published, logged, reported"),
    ("tell", "publish, log, report"),
    ("tells", "publishes, logs, reports"),
    ("letter", "dead letter"),
    ("letters", "dead letters"),
    ("fate", "outcome"),
    ("set aside", "dead-lettered"),
    ("grave", "tombstone"),
    ("bury", "apply a deletion"),
    ("buried", "deleted"),
    ("lane", "slot, permit"),
    ("lanes", "slots, permits"),
    ("rescue", "recover"),
    ("rescued", "recovered"),
    ("detour", "fallback"),
    ("doubt", "probe"),
    ("give back", "nak"),
    ("gives back", "naks"),
    ("given back", "nak'ed"),
    ("fence", "sequence guard"),
    ("sweep", "expiry"),
    ("sweeps", "expires"),
    ("swept", "expired"),
    ("shipped", "desired state"),
    ("mend", "reconcile, repair"),
    ("mends", "reconciles, repairs"),
    ("mended", "reconciled, repaired"),
    ("made anew", "recreated"),
    ("pressed", "above the watermark"),
    ("relieved", "below the watermark"),
    ("stretch", "range"),
    ("contradicted", "mismatched"),
    ("unfit", "unparseable"),
    ("stranger", "collision"),
    ("strangers", "collisions"),
    ("trouble", "error, transient error"),
    ("troubles", "errors"),
    ("copies", "replicas, duplicates"),
    ("sentence", "message"),
    ("sentences", "messages"),
    ("people", "users, participants"),
    ("person", "user, participant"),
    ("whoever", "the subject, plainly"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Every file of the repository that is written by hand, but for those that cannot change
/// (migrations) or that speak of the old words (GLOSSARY, this file).
fn files() -> Vec<(String, String)> {
    let listed = std::process::Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .unwrap();
    let names = String::from_utf8(listed.stdout).unwrap();
    let kept = |name: &&str| {
        let written = [
            ".rs", ".md", ".sql", ".conf", ".yml", ".yaml", "dev", "justfile",
        ];
        written.iter().any(|end| name.ends_with(end))
            && !name.starts_with("migrations/")
            && !name.ends_with("GLOSSARY.md")
            && !name.ends_with("tests/words.rs")
    };
    let read = |name: &str| std::fs::read_to_string(root().join(name)).ok();
    let found = names.lines().filter(kept);
    found
        .filter_map(|name| Some((name.to_owned(), read(name)?)))
        .collect()
}

/// The names in the glossary's table of names that keep an older word.
fn kept_names() -> Vec<String> {
    let text = std::fs::read_to_string(root().join("docs/GLOSSARY.md")).unwrap();
    let (_, table) = text.split_once("## Names that keep an older word").unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    let first_cells = rows.filter_map(|row| row.trim_start_matches("| ").split(" | ").next());
    let quoted = first_cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    quoted.map(str::to_owned).collect()
}

/// `line` in lower case, its words apart by one space each; underscores and punctuation part words.
fn normalized(line: &str) -> String {
    let words = line.split(|c: char| !c.is_alphanumeric());
    let words = words.filter(|word| !word.is_empty()).map(str::to_lowercase);
    format!(" {} ", words.collect::<Vec<_>>().join(" "))
}

/// The words of our own in `line`.
fn found_in(line: &str, kept: &[String]) -> Vec<&'static str> {
    let without_kept = kept
        .iter()
        .fold(line.to_owned(), |line, name| line.replace(name, " "));
    let line = normalized(&without_kept).replace(" dead letter", " ");
    let is_in = |word: &str| line.contains(&format!(" {word} "));
    WORDS
        .iter()
        .map(|(word, _)| *word)
        .filter(|word| is_in(word))
        .collect()
}

#[test]
fn the_field_s_words_are_used() {
    let kept = kept_names();
    assert!(kept.len() > 20, "{kept:?}");
    let mut found = Vec::new();
    for (name, text) in files() {
        let mut before = "";
        for (number, line) in (1..).zip(text.lines()) {
            // A dead letter may be broken over two lines.
            let continued = before.trim_end().to_lowercase().ends_with("dead");
            before = line;
            for word in found_in(line, &kept) {
                if continued && word.starts_with("letter") {
                    continue;
                }
                let (_, instead) = WORDS.iter().find(|(own, _)| *own == word).unwrap();
                found.push(format!(
                    "{name}:{number}: {word} (instead: {instead}): {}",
                    line.trim()
                ));
            }
        }
    }
    assert!(
        found.is_empty(),
        "{} lines:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn no_line_is_wider_than_the_house() {
    let mut found = Vec::new();
    for (name, text) in files() {
        let is_code = name.ends_with(".rs") || name.ends_with(".sql");
        // Documents have a test of their own; of the others, comments are prose.
        let is_measured = |line: &str| is_code || line.trim_start().starts_with("# ");
        for (number, line) in (1..).zip(text.lines()) {
            if !name.ends_with(".md") && is_measured(line) && line.chars().count() > COLUMNS {
                found.push(format!("{name}:{number}: {}", line.trim()));
            }
        }
    }
    assert!(
        found.is_empty(),
        "{} lines:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn a_word_is_found_in_prose_and_in_names_and_not_in_what_is_kept() {
    let kept = ["Scrollback-Told".to_owned(), "below_fence".to_owned()];
    assert_eq!(found_in("let tell_once = 1;", &kept), ["tell"]);
    assert_eq!(
        found_in("/// It is Told, and set  aside.", &kept),
        ["told", "set aside"]
    );
    assert_eq!(found_in("dead_letters and a dead letter", &kept), [""; 0]);
    assert_eq!(found_in("letters that wait", &kept), ["letters"]);
    assert_eq!(found_in("`Scrollback-Told`, below_fence", &kept), [""; 0]);
}
