//! What this function reads beyond what every function reads.

service::settings! {
    /// What this function reads beyond what every function reads.
    pub struct Settings {
        /// Messages one statement stores, at most.
        // Beyond a thousand rows a statement gets no faster, only later.
        persist_batch: usize = 1_000, in 1..=10_000;
        /// Messages pending and nothing moving for this long ends the process, so that a fresh
        /// start can connect; not while the database is away or the consumer is paused.
        persist_stuck_after_ms: u64 = 60_000;
    }
}
