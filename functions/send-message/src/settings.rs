//! What this function reads beyond what every function reads.

service::settings! {
    /// What this function reads beyond what every function reads.
    pub struct Settings {
        /// Messages a second one user may send, per replica.
        // Nobody types faster than the default; a program that does should publish as a trusted
        // publisher. The slowest rate is one message every quarter of an hour.
        send_rate_per_second: f64 = 20.0, in 0.001..=1_000_000.0;
        /// Messages one user may send at once after a pause, per replica.
        send_burst: u32 = 100, in 1..=1_000_000;
        /// Fewer messages than these are published singly, side by side; at least 2.
        // For each batch nats-server makes a file store and removes it, which takes as long as some
        // thirty plain publishes. Where batches are staged in memory, 4 is better.
        send_min_batch: usize = 32;
    }
}
