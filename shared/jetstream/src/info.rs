//! What JetStream reports about streams and consumers, as far as programs here read it.

use serde::Deserialize;
use serde_json::json;

use crate::api;
use base::seq::Seq;
use base::time::parse_rfc3339_ms;
use nats::connection::{ApiError, Connection};

/// The reply to `STREAM.INFO`. Only the stream's leader answers it.
#[derive(Debug, Clone, Deserialize)]
pub struct StreamInfo {
    /// When the stream was created, as the server writes it. A recreated stream has another time.
    #[serde(default)]
    pub created: String,
    /// Its configuration.
    #[serde(default)]
    pub config: StreamConfig,
    /// What it holds.
    pub state: StreamState,
    /// When the server answered, RFC 3339; see [`StreamInfo::answered_ms`].
    #[serde(default)]
    pub ts: String,
}

/// Part of a stream's configuration.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub struct StreamConfig {
    /// The most bytes it may hold; 0 or less: no limit.
    #[serde(default)]
    pub max_bytes: i64,
    /// For how long it remembers `Nats-Msg-Id`s, in nanoseconds.
    #[serde(default)]
    pub duplicate_window: u64,
}

/// What a stream holds.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub struct StreamState {
    /// Messages in the stream.
    #[serde(default)]
    pub messages: u64,
    /// What they take on disk.
    #[serde(default)]
    pub bytes: u64,
    /// See [`StreamState::first`].
    pub first_seq: u64,
    /// See [`StreamState::last`].
    pub last_seq: u64,
}

impl StreamInfo {
    /// Asks for the state of `stream`.
    ///
    /// # Errors
    /// JetStream does not answer, or has no such stream ([`ApiError::NO_STREAM`]).
    pub async fn fetch(nats: &Connection, stream: &str) -> Result<StreamInfo, ApiError> {
        nats.api(&api::stream("INFO", stream), &json!({})).await
    }

    /// When the server answered, by its own clock, in Unix milliseconds.
    ///
    /// # Errors
    /// The server did not say so.
    pub fn answered_ms(&self) -> Result<i64, ApiError> {
        parse_rfc3339_ms(&self.ts)
            .ok_or_else(|| ApiError::Unreadable(format!("no time: {:?}", self.ts)))
    }
}

impl StreamState {
    /// The first sequence the stream still holds, or, when it is empty, the one that comes next.
    pub fn first(&self) -> Seq {
        Seq::saturating(self.first_seq)
    }

    /// The last sequence the stream assigned.
    pub fn last(&self) -> Seq {
        Seq::saturating(self.last_seq)
    }
}

/// The reply to `CONSUMER.INFO`. Only the consumer's leader answers it.
#[derive(Debug, Clone, Deserialize)]
pub struct ConsumerInfo {
    /// Everything up to here is acknowledged; see [`ConsumerInfo::acknowledged_through`].
    pub ack_floor: Position,
    /// The highest sequence that was delivered.
    #[serde(default)]
    pub delivered: Position,
    /// Messages delivered and not yet acknowledged.
    #[serde(default)]
    pub num_ack_pending: u64,
    /// Messages not yet delivered.
    #[serde(default)]
    pub num_pending: u64,
    /// An operator paused the consumer: it delivers nothing, and nothing is wrong.
    #[serde(default)]
    pub paused: bool,
    /// Its configuration.
    #[serde(default)]
    pub config: ConsumerConfig,
}

/// Part of a consumer's configuration.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub struct ConsumerConfig {
    /// A message that is not acknowledged for so long is delivered again; in nanoseconds.
    #[serde(default)]
    pub ack_wait: u64,
}

/// A consumer's position.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub struct Position {
    /// In the stream's sequence.
    pub stream_seq: u64,
}

impl ConsumerInfo {
    /// Asks for the state of `consumer` of `stream`.
    ///
    /// # Errors
    /// JetStream does not answer, or has no such stream or consumer ([`ApiError::NO_CONSUMER`]).
    pub async fn fetch(
        nats: &Connection,
        stream: &str,
        consumer: &str,
    ) -> Result<ConsumerInfo, ApiError> {
        nats.api(&api::consumer("INFO", stream, consumer), &json!({}))
            .await
    }

    /// Everything up to this sequence is acknowledged.
    pub fn acknowledged_through(&self) -> Seq {
        Seq::saturating(self.ack_floor.stream_seq)
    }

    /// The highest sequence that was delivered to anybody.
    pub fn delivered_through(&self) -> Seq {
        Seq::saturating(self.delivered.stream_seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_reports_its_state_and_the_servers_time() {
        let info: StreamInfo = serde_json::from_str(
            r#"{"created": "2026-11-27T00:00:00Z", "config": {"max_bytes": -1, "name": "S"},
                "state": {"messages": 2, "bytes": 90, "first_seq": 3, "last_seq": 4},
                "ts": "1970-01-01T00:00:01.5Z"}"#,
        )
        .unwrap();
        assert_eq!(info.state.first().get(), 3);
        assert_eq!(info.state.last().get(), 4);
        assert_eq!(info.answered_ms().unwrap(), 1_500);
        let silent = StreamInfo {
            ts: String::new(),
            ..info
        };
        assert!(silent.answered_ms().is_err());
    }
}
