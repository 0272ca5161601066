//! SQL expressions that more than one function needs, as macros, so that `concat!` can join them.

/// The highest stream sequence PostgreSQL knows, 0 if it knows none. What has expired is remembered
/// in `swept`.
#[macro_export]
macro_rules! highest_known_seq {
    () => {
        "greatest((select max(seq) from messages), (select max(seq) from dead_letters),
                  (select max(seq) from changes), (select max(seq) from duplicates),
                  (select seq from swept), 0)"
    };
}
