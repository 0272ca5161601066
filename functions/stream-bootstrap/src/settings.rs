//! What this function reads beyond what every function reads.

use std::path::PathBuf;

service::settings! {
    /// What this function reads beyond what every function reads.
    pub struct Settings {
        /// A directory with `streams/` and `consumers/` like those of `nats/`, instead of these.
        bootstrap_config: Option<PathBuf>;
        /// How often the servers are compared with the desired state.
        bootstrap_interval_ms: u64 = 30_000, in 1..=86_400_000;
        /// Accept `num_replicas` above 1 in `BOOTSTRAP_CONFIG`, although reads may then miss what
        /// was just acknowledged.
        bootstrap_allow_replicas: bool = false;
    }
}
