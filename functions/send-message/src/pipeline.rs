//! What the stages of a message share: lookup (`lookup.rs`), append (`batch.rs`), and comparing a
//! duplicate with what is stored (`duplicate.rs`).

use std::sync::Arc;

use crate::append::Appender;
use crate::dedup::Dedup;
use crate::pending::Pending;
use crate::sequencer::Sequencer;
use service::ctx::Ctx;
use timeline::chat::Chat;

/// What the stages share.
#[derive(Debug)]
pub struct Pipeline {
    pub ctx: Ctx<Chat>,
    pub appender: Appender,
    pub dedup: Dedup,
    /// Fewer messages than these are published singly, at the same time.
    pub min_batch: usize,
    pub sequencer: Arc<Sequencer<Pending>>,
}
