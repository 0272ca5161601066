//! Many senders, one flush: messages that arrive while a batch is in flight become the next batch.
//!
//! A message for which no other has to be waited takes the fast path: it is appended at once,
//! without being passed from task to task. One sender's messages to one room stay in order on both
//! paths (`sequencer.rs`).

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::Span;

use crate::append::Appender;
use crate::dedup::Dedup;
use crate::outgoing::Outgoing;
use crate::pending::{Pending, Sent};
use crate::pipeline::Pipeline;
use crate::query::Stored;
use crate::sequencer::{Key, Sequencer};
use base::error::{Error, Result};
use service::ctx::Ctx;
use timeline::chat::Chat;

/// Takes messages and sees to it that each gets a reply.
#[derive(Debug)]
pub struct Committer {
    pipeline: Arc<Pipeline>,
    /// Messages whose ids have to be looked up.
    lookups: mpsc::UnboundedSender<Pending>,
    /// Held so that the task that appends ends with us.
    _ready: mpsc::UnboundedSender<Key>,
}

impl Committer {
    /// Starts the tasks that look ids up and append messages; they end with the last sender. Fewer
    /// than `min_batch` messages are published singly, at the same time.
    pub fn start(ctx: Ctx<Chat>, min_batch: usize) -> Committer {
        let (lookups, to_look_up) = mpsc::unbounded_channel();
        let (ready, to_append) = mpsc::unbounded_channel();
        let pipeline = Arc::new(Pipeline {
            appender: Appender::new(ctx.nats().client().clone()),
            dedup: Dedup::new(ctx.clone()),
            ctx,
            min_batch,
            sequencer: Sequencer::new(&ready),
        });
        let look_up = pipeline.clone().look_up_all(to_look_up);
        pipeline.ctx.spawn_essential("looks ids up", look_up);
        let append = pipeline.clone().append_all(to_append);
        pipeline.ctx.spawn_essential("appends messages", append);
        Committer {
            pipeline,
            lookups,
            _ready: ready,
        }
    }

    /// Appends `message`, or returns an error at `until`.
    ///
    /// Messages of one sender to one room are appended in the order in which their futures are
    /// polled first.
    ///
    /// # Errors
    /// 409, or 503.
    pub async fn commit(&self, message: Outgoing, until: Instant) -> Result<Sent> {
        let key = message.queue();
        let sequencer = &self.pipeline.sequencer;
        if let Some(_slot) = sequencer.enter_fast_path(&key) {
            // Boxed: this future is ten times as large as the rest, and every message would move
            // it.
            return Box::pin(self.pipeline.commit_fast_path(message, until)).await;
        }
        let slot = sequencer.enter(key);
        let (reply, outcome) = oneshot::channel();
        let look_up = message.client_supplied_id;
        let pending = Pending {
            message,
            until,
            span: Span::current(),
            reply,
            slot,
        };
        // Both channels are bounded by MAX_CONCURRENT_REQUESTS.
        if look_up {
            self.lookups
                .send(pending)
                .map_err(|_| Error::internal("the task that looks ids up is gone"))?;
        } else {
            sequencer.ready(&pending.slot.position(), pending);
        }
        outcome
            .await
            .map_err(|_| Error::internal("the task that appends ended badly"))?
    }

    /// Whether a message that arrived now would take the fast path.
    #[cfg(test)]
    pub fn is_idle(&self) -> bool {
        let slot = self
            .pipeline
            .sequencer
            .enter_fast_path(&"nobody nowhere".into());
        slot.is_some()
    }
}

impl Pipeline {
    async fn commit_fast_path(&self, mut message: Outgoing, until: Instant) -> Result<Sent> {
        if message.client_supplied_id {
            let key = message.key();
            match self.dedup.find(std::slice::from_ref(&key)).await {
                Ok(found) => {
                    if let Some(stored) = found.ids.get(&key) {
                        return self.resolve(&message, stored.clone()).await;
                    }
                    message.set_message_id(&found.secret);
                }
                Err(error) => {
                    let secret = self.dedup.secret().ok_or_else(|| error.clone())?;
                    message.set_message_id(&secret);
                    return match self.appender.find_remembered(&message, until).await {
                        Ok(Some(seq)) => self.resolve(&message, Stored::at(seq)).await,
                        Ok(None) => Err(error),
                        Err(append_error) => Err(append_error.into_error()),
                    };
                }
            }
        }
        self.append_one(&message, until, || true).await
    }
}
