//! The stage that looks client-supplied ids up.

use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc};
use tracing::{Instrument, Span};

use crate::pending::{Pending, in_time};
use crate::pipeline::Pipeline;
use crate::query::{Key, Stored};
use base::error::Error;
use jetstream::batch::MAX_MESSAGES;

/// Lookups in flight at once; further ids are looked up together.
const MAX_LOOKUPS: usize = 2;

impl Pipeline {
    /// Passes on the messages whose ids are new. Lookups may end in any order, because a message
    /// that is ready waits for those before it in its queue.
    pub async fn look_up_all(self: Arc<Self>, mut waiting: mpsc::UnboundedReceiver<Pending>) {
        let permits = Arc::new(Semaphore::new(MAX_LOOKUPS));
        while let Ok(permit) = permits.clone().acquire_owned().await
            && let Some(batch) = gather(&mut waiting).await
        {
            let pipeline = self.clone();
            tokio::spawn(async move {
                // The lookup appears in the trace of the first message.
                let first = batch.first();
                let span = first.map_or_else(Span::none, |first| first.span.clone());
                let used = pipeline.pass_on_new(in_time(batch)).instrument(span).await;
                drop(permit);
                // Reading the stored messages may take long; no other lookup waits for that.
                let resolving = used
                    .into_iter()
                    .map(|(pending, stored)| pipeline.resolve_pending(pending, stored));
                futures::future::join_all(resolving).await;
            });
        }
    }

    /// Makes the messages ready whose ids are new; returns those whose ids were used before.
    async fn pass_on_new(&self, batch: Vec<Pending>) -> Vec<(Pending, Stored)> {
        let keys: Vec<Key> = batch.iter().map(|pending| pending.message.key()).collect();
        let found = match self.dedup.find(&keys).await {
            Ok(found) => found,
            Err(error) => {
                self.refuse_unless_remembered(batch, &error).await;
                return Vec::new();
            }
        };
        let mut used = Vec::new();
        for mut pending in batch {
            match found.ids.get(&pending.message.key()) {
                Some(stored) => used.push((pending, stored.clone())),
                None => {
                    pending.message.set_message_id(&found.secret);
                    self.sequencer.ready(&pending.slot.position(), pending);
                }
            }
        }
        used
    }

    /// While nobody knows whether an id is new, we ask JetStream: an id that it remembers is
    /// certainly a resend. One that it does not remember may be an older resend, so its message is
    /// refused rather than appended twice.
    async fn refuse_unless_remembered(&self, mut batch: Vec<Pending>, error: &Error) {
        if let Some(secret) = self.dedup.secret() {
            for pending in &mut batch {
                pending.message.set_message_id(&secret);
            }
            batch = self.resolve_remembered(batch).await;
        }
        for pending in batch {
            pending.answer(Err(error.clone()));
        }
    }
}

/// Everything that waits for a lookup, up to one batch. `None` when no sender is left.
async fn gather(waiting: &mut mpsc::UnboundedReceiver<Pending>) -> Option<Vec<Pending>> {
    let mut batch = Vec::new();
    (waiting.recv_many(&mut batch, MAX_MESSAGES).await > 0).then_some(batch)
}
