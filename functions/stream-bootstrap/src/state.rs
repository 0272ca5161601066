//! What the endpoints and the job of one replica share.

use std::sync::Arc;
use std::time::Duration;

use crate::bootstrap::Bootstrap;
use timeline::chat::Chat;

/// What the endpoints and the job of one replica share.
pub struct State {
    pub chat: Chat,
    pub bootstrap: Arc<Bootstrap>,
    /// Between two runs of the job.
    pub interval: Duration,
}
