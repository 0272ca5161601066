//! The audit's result, for a terminal.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget};

use base::seq::Seq;
use protocol::audit::{AuditCounts, Offender};

const TICK: Duration = Duration::from_millis(200);

/// Progress is drawn on a terminal and nowhere else.
pub fn target() -> ProgressDrawTarget {
    if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    }
}

/// For work whose end is not known.
pub fn spinner() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, target());
    bar.enable_steady_tick(TICK);
    bar
}

/// What became of the messages from `from` to `through`.
pub fn print_counts(from: Seq, through: Seq, counts: &AuditCounts) {
    println!(
        "{} messages in the stream, sequences {from} to {through}:",
        counts.total()
    );
    for (what, count) in rows(counts) {
        println!("  {count:>10}  {what}");
    }
}

fn rows(counts: &AuditCounts) -> Vec<(String, u64)> {
    let AuditCounts {
        stored,
        deleted,
        changes,
        duplicates,
        dead_letters,
        expired,
        waiting,
        missing,
    } = counts;
    let mut rows = vec![
        ("stored".to_owned(), *stored),
        ("deleted: a tombstone is stored".to_owned(), *deleted),
        ("deletions".to_owned(), *changes),
        (
            "stored under another sequence, by the same sender and id".to_owned(),
            *duplicates,
        ),
    ];
    rows.extend(
        dead_letters
            .iter()
            .map(|(reason, count)| (format!("dead letters: {reason}"), *count)),
    );
    rows.push(("expired".to_owned(), *expired));
    rows.extend([
        ("waiting to be stored".to_owned(), *waiting),
        ("MISSING".to_owned(), *missing),
    ]);
    rows
}

/// One line each.
pub fn print_offenders(offenders: &[Offender]) {
    for Offender { seq, subject, what } in offenders {
        // A publisher chooses the subject, so it may hold control characters for the terminal.
        let subject: String = subject
            .chars()
            .map(|c| {
                if c.is_control() {
                    char::REPLACEMENT_CHARACTER
                } else {
                    c
                }
            })
            .collect();
        println!("sequence {seq}, {subject}: {what}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_count_has_a_row() {
        let dead_letters = [("not_json".to_owned(), 16), ("too_deep".to_owned(), 32)].into();
        let counts = AuditCounts {
            stored: 1,
            deleted: 2,
            changes: 4,
            duplicates: 8,
            dead_letters,
            expired: 256,
            waiting: 64,
            missing: 128,
        };
        let shown: u64 = rows(&counts).iter().map(|(_, count)| count).sum();
        assert_eq!(shown, counts.total());
    }
}
