//! What the endpoints and the jobs share.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, Notify};

use crate::Settings;
use crate::budget::Rate;
use base::error::Fatal;
use service::ctx::Ctx;
use timeline::chat::Chat;

/// What the endpoints and the jobs share.
pub struct State {
    pub chat: Chat,
    pub settings: Settings,
    pub rate: Mutex<Rate>,
    /// Wakes the expire job.
    pub expire_now: Arc<Notify>,
}

impl State {
    /// # Errors
    /// The configuration is wrong.
    pub fn open(ctx: &Ctx, settings: Settings) -> Result<State, Fatal> {
        Ok(State {
            chat: Chat::open(ctx)?,
            settings,
            rate: Mutex::default(),
            expire_now: Arc::default(),
        })
    }

    /// Between two runs of a job.
    pub fn interval(&self) -> Duration {
        Duration::from_millis(self.settings.retention_interval_ms)
    }
}
