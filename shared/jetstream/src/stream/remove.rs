//! Removing single messages.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{StreamError, StreamMessage, StreamReader};
use base::seq::Seq;
use nats::connection::ApiError;

impl StreamReader {
    /// Overwrites and removes the message at `seq` if `is` recognises it; whether it did. The
    /// message is read first, because a recreated stream may have another one under this sequence.
    ///
    /// # Errors
    /// The stream does not answer.
    pub async fn erase(
        &self,
        seq: Seq,
        is: impl FnOnce(&StreamMessage) -> bool,
    ) -> Result<bool, StreamError> {
        match self.at(seq).await? {
            Some(raw) if !raw.malformed && is(&raw.message) => {
                self.remove(json!({ "seq": seq })).await?;
                Ok(true)
            }
            Some(_) | None => Ok(false),
        }
    }

    /// Removes the message at `seq` without overwriting it.
    pub(crate) async fn delete(&self, seq: Seq) -> Result<(), StreamError> {
        self.remove(json!({"seq": seq, "no_erase": true})).await
    }

    async fn remove(&self, request: Value) -> Result<(), StreamError> {
        #[derive(Deserialize)]
        struct Deleted {}
        let subject = self.names.stream("MSG.DELETE");
        match self.control.api::<Deleted>(&subject, &request).await {
            Ok(Deleted {}) => Ok(()),
            // Another process may have been faster.
            Err(error @ ApiError::Refused { .. })
                if self
                    .get_json(json!({ "seq": request["seq"] }))
                    .await?
                    .is_none() =>
            {
                tracing::debug!(%error, "the message is already removed");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}
