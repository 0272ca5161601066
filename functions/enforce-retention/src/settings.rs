//! What this function reads beyond what every function reads.

service::settings! {
    /// What this function reads beyond what every function reads.
    pub struct Settings {
        /// So many of the newest messages stay in the stream.
        trim_keep_messages: u64 = 10_000;
        /// And those of so many days; a message goes when it is beyond both.
        trim_keep_days: u32 = 7;
        /// How often the stream is trimmed and expired messages are deleted.
        retention_interval_ms: u64 = 60_000, in 1..;
        /// Nothing expires while the clocks of PostgreSQL and NATS are further apart.
        // More than a year would guard against nothing.
        clock_tolerance_hours: u32 = 6, in 1..=8_760;
    }
}
