//! What this function reads beyond what every function reads.

service::settings! {
    /// What this function reads beyond what every function reads.
    pub struct Settings {
        /// Users, separated by commas, who may delete others' messages in rooms; not in direct
        /// messages.
        delete_moderators: String = "";
    }
}
