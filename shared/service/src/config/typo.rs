//! Variables that nobody reads, although their names look like ours.

use super::{Variable, Vars};

/// A name this close to a declared one is a misspelling of it.
const NEAR: usize = 2;
/// Variables of many programs begin like this; only a misspelling of ours is worth a line.
const GENERIC: &str = "MAX";

/// Variables of the environment that are not in `declared` but begin like one of them, or differ
/// from one by a character or two: a line for each. Never a value: it may be a secret.
///
/// A function answers for its own prefixes only. `PERSIST_BACTH` is named by `persist-message`, and
/// `SEND_BURST` is no mistake where all functions run in one environment.
pub fn unknown(vars: &Vars, declared: &[Variable]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for variable in declared {
        names.push(variable.name());
        if variable.secret {
            names.push(format!("{}_FILE", variable.name()));
        }
    }
    let set = vars.set.keys().chain(&vars.unreadable);
    set.filter(|name| !names.contains(name) && !is_set_by_others(name))
        .filter_map(|name| complaint(name, &names))
        .collect()
}

fn complaint(name: &str, declared: &[String]) -> Option<String> {
    if let Some(value) = name.strip_suffix("_FILE")
        && declared.iter().any(|other| other == value)
    {
        return Some(format!(
            "{name} is set, and nothing here reads it: only secrets are read from files; set \
             {value}"
        ));
    }
    let nearest = declared.iter().min_by_key(|other| distance(name, other))?;
    let near = distance(name, nearest) <= NEAR;
    let ours = first_word(name) != Some(GENERIC)
        && declared
            .iter()
            .any(|other| first_word(other) == first_word(name));
    match (near, ours) {
        (false, false) => None,
        (false, true) if 2 * distance(name, nearest) > name.len() => Some(format!(
            "{name} is set, and nothing here reads it; --help lists the variables"
        )),
        _ => Some(format!(
            "{name} is set, and nothing here reads it; did you mean {nearest}?"
        )),
    }
}

/// `PERSIST` of `PERSIST_BATCH`.
fn first_word(name: &str) -> Option<&str> {
    name.split_once('_').map(|(word, _)| word)
}

/// What nats-server's configuration reads, such as `NATS_LISTEN` and `SEND_MESSAGE_PASSWORD`, and
/// what Kubernetes puts into every container about a service called `nats`.
fn is_set_by_others(name: &str) -> bool {
    const NATS_SERVER: [&str; 4] = [
        "NATS_LISTEN",
        "NATS_MONITOR",
        "NATS_WEBSOCKET",
        "NATS_STORE_DIR",
    ];
    NATS_SERVER.contains(&name)
        || (name.ends_with("_PASSWORD") && name.matches('_').count() > 1)
        || name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT")
        || name.contains("_PORT_")
}

/// How many letters must be added, left out or changed.
pub(crate) fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (above, left) in one.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = above + 1;
        for (index, right) in other.bytes().enumerate() {
            let changed = diagonal + usize::from(left != right);
            diagonal = row[index + 1];
            row[index + 1] = changed.min(diagonal + 1).min(row[index] + 1);
        }
    }
    row[other.len()]
}
