//! `RUST_LOG`, with a warning about typos: a log that is silent because of one is noticed when it
//! is needed most.

use tracing_subscriber::filter::{Directive, EnvFilter};

use crate::config::distance;

/// Libraries log at `info` what operators of a function do not need.
pub(crate) const DEFAULT_FILTER: &str = "info,async_nats=warn,sqlx=warn";
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// The filter in `RUST_LOG`. Directives that cannot be meant are reported on standard error and
/// left out.
pub(crate) fn log_filter() -> EnvFilter {
    let value = std::env::var("RUST_LOG").unwrap_or_default();
    let (filter, complaints) = read(&value);
    for complaint in complaints {
        eprintln!("{complaint}");
    }
    filter
}

fn read(value: &str) -> (EnvFilter, Vec<String>) {
    if value.trim().is_empty() {
        return (EnvFilter::new(DEFAULT_FILTER), Vec::new());
    }
    let mut wrong = Vec::new();
    let mut right = Vec::new();
    for directive in value
        .split(',')
        .map(str::trim)
        .filter(|directive| !directive.is_empty())
    {
        if directive.parse::<Directive>().is_err() || is_misspelt_level(directive) {
            wrong.push(directive);
        } else {
            right.push(directive);
        }
    }
    if wrong.is_empty() {
        return (EnvFilter::new(value), Vec::new());
    }
    let rest = if right.is_empty() {
        DEFAULT_FILTER.to_owned()
    } else {
        right.join(",")
    };
    let named = wrong.join(", ");
    let levels = LEVELS.join(", ");
    let line = format!(
        "configuration: RUST_LOG: {named}: neither LEVEL nor TARGET=LEVEL ({levels}); \
         going on with {rest}"
    );
    (EnvFilter::new(rest), vec![line])
}

/// The filter takes a single word that is not a level for the name of a target, and silences
/// everything else: `inof`.
fn is_misspelt_level(directive: &str) -> bool {
    let word = directive.to_lowercase();
    word.bytes().all(|byte| byte.is_ascii_alphabetic())
        && !LEVELS.contains(&word.as_str())
        && LEVELS
            .iter()
            .any(|level| distance(&word, level) <= 2 && word.len() + 1 >= level.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_is_named_and_the_rest_holds() {
        for (value, named, holds) in [
            ("inof", "inof", "info,async_nats=warn,sqlx=warn"),
            ("debug,async_nats=wran", "async_nats=wran", "debug"),
            (
                "warn,runtime=debgu,sqlx=warn",
                "runtime=debgu",
                "warn,sqlx=warn",
            ),
        ] {
            let (filter, complaints) = read(value);
            assert_eq!(complaints.len(), 1, "{value}");
            assert!(
                complaints[0].contains(named) && !complaints[0].contains('\n'),
                "{complaints:?}"
            );
            assert_eq!(
                filter.to_string(),
                EnvFilter::new(holds).to_string(),
                "{value}"
            );
        }
    }

    #[test]
    fn what_is_right_passes_without_a_word() {
        for value in [
            "",
            "info",
            "WARN",
            "off",
            "runtime",
            "send_message=debug",
            "info,async_nats=warn,sqlx=warn",
            "bench=0",
            "runtime[request]=info",
        ] {
            assert_eq!(read(value).1, [""; 0], "{value}");
        }
    }
}
