//! Up to where the log is told, as `CHAT_EVENTS` itself knows.

use serde_json::json;
use wire::{EVENTS, EVENTS_STREAM, Seq, jetstream};

use crate::log::GetReply;
use crate::{ApiError, Connection};

/// Up to where events are told: as the last one in the stream says. 0 where there is none, or no stream yet.
///
/// # Errors
/// JetStream does not answer; or the last event is none of ours, and nobody knows.
pub async fn told(nats: &Connection) -> Result<Seq, ApiError> {
    let last = match nats.api::<GetReply>(&jetstream::stream("MSG.GET", EVENTS_STREAM), &json!({ "last_by_subj": EVENTS })).await {
        Ok(reply) => reply.message.read()?.message,
        Err(error) if error.is(ApiError::NO_MESSAGE) || error.is(ApiError::NO_STREAM) => return Ok(Seq::ZERO),
        Err(error) => return Err(error),
    };
    let value = |name| last.headers.as_ref()?.get(name).map(|value| value.as_str());
    wire::told(value).ok_or_else(|| ApiError::Unreadable("the last event does not say which it is".to_owned()))
}
