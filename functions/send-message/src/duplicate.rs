//! Messages whose ids were used before: is it the same message?

use crate::append::AppendError;
use crate::outgoing::Outgoing;
use crate::pending::{Pending, Sent};
use crate::pipeline::Pipeline;
use crate::query::Stored;
use base::error::{Code, Error, Result};

const CONFLICT: &str = "this id belongs to another message of yours, with another text or in \
                        another place; take a new one";

impl Pipeline {
    /// The outcome of a message whose id is in use.
    pub async fn resolve(&self, message: &Outgoing, stored: Stored) -> Result<Sent> {
        if !message.client_supplied_id {
            // Nobody else has a generated id: an earlier attempt of ours succeeded.
            return Ok(Sent {
                seq: stored.seq,
                duplicate: false,
            });
        }
        if self.is_same(message, &stored).await? {
            return Ok(Sent {
                seq: stored.seq,
                duplicate: true,
            });
        }
        Err(Error::new(Code::Conflict, CONFLICT))
    }

    /// Replies to the sender of a message whose id is in use.
    pub async fn resolve_pending(&self, pending: Pending, stored: Stored) {
        let outcome = self.resolve(&pending.message, stored).await;
        pending.answer(outcome);
    }

    /// Replies to those whose ids JetStream remembers; returns the others.
    pub async fn resolve_remembered(&self, batch: Vec<Pending>) -> Vec<Pending> {
        let resolving = batch.into_iter().map(async |pending| {
            let found = self
                .appender
                .find_remembered(&pending.message, pending.until)
                .await;
            match found {
                Ok(Some(seq)) => {
                    self.resolve_pending(pending, Stored::at(seq)).await;
                    None
                }
                Ok(None) => Some(pending),
                Err(error) => {
                    pending.answer(Err(AppendError::into_error(error)));
                    None
                }
            }
        });
        let unresolved = futures::future::join_all(resolving).await;
        unresolved.into_iter().flatten().collect()
    }

    /// Whether the stored message is this one. A message that is stored nowhere any more was
    /// erased, and counts as the same: nobody can compare, and it must not come back.
    async fn is_same(&self, message: &Outgoing, stored: &Stored) -> Result<bool> {
        if let Some((room, text)) = &stored.content {
            return Ok(message.has_content(room, text));
        }
        if let Some(raw) = self.ctx.stream().at(stored.seq).await? {
            let parsed = timeline::message::parse(&raw.message, self.ctx.limits());
            return Ok(parsed.is_ok_and(|incoming| message.is_same(&incoming)));
        }
        let key = message.key();
        let found = self
            .dedup
            .find_in_projection(std::slice::from_ref(&key))
            .await?;
        let content = found.get(&key).and_then(|stored| stored.content.as_ref());
        Ok(content.is_none_or(|(room, text)| message.has_content(room, text)))
    }
}
