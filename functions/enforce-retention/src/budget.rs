//! How full the log is, and how fast it fills.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::Own;
use base::error::{Error, Result};
use base::seq::Seq;
use jetstream::stream::StreamError;
use nats::connection::ApiError;
use protocol::js_api;
use protocol::retention::Budget;
use service::ctx::Ctx;

/// Of the budget, in percent: when more is used, what is stored leaves the log although it would be kept.
const PRESSED: u64 = 90;
/// Down to this.
const RELIEVED: u64 = 80;
/// The rate is that of this long.
const WINDOW: Duration = Duration::from_secs(60);
/// Looks remembered of it.
const LOOKS: usize = 64;

#[derive(Debug, Deserialize)]
struct StreamInfo {
    config: Config,
    state: State,
    /// When the server answered.
    ts: String,
}

#[derive(Debug, Deserialize)]
struct Config {
    max_bytes: i64,
}

#[derive(Debug, Deserialize)]
struct State {
    messages: u64,
    bytes: u64,
    first_seq: u64,
    last_seq: u64,
}

#[derive(Debug, Deserialize)]
struct ConsumerInfo {
    ack_floor: Position,
    #[serde(default)]
    num_ack_pending: u64,
    #[serde(default)]
    num_pending: u64,
}

#[derive(Debug, Deserialize)]
struct Position {
    stream_seq: u64,
}

/// The log at one moment.
#[derive(Debug, Clone)]
pub struct Look {
    /// The first position it holds.
    pub first: Seq,
    /// The last one it gave out.
    pub last: Seq,
    /// Messages it holds.
    pub messages: u64,
    /// What they take.
    pub bytes: u64,
    /// What they may take; `None` without a limit.
    pub max_bytes: Option<u64>,
    /// Everything up to here was stored before it was acknowledged.
    pub floor: Seq,
    /// Messages not acknowledged.
    pub unstored: u64,
    /// The server's clock, in Unix milliseconds.
    pub now_ms: i64,
    at: Instant,
}

impl Look {
    /// Looks.
    ///
    /// # Errors
    /// The log does not answer.
    pub async fn now(ctx: &Ctx<Own>) -> Result<Look> {
        // The floor first: it only grows, so whatever the log holds by then, everything up to it is stored.
        let consumer = match ctx
            .nats()
            .api::<ConsumerInfo>(js_api::CONSUMER_INFO, &json!({}))
            .await
        {
            Ok(info) => Some(info),
            Err(error) if error.is(ApiError::NO_CONSUMER) => None,
            Err(error) => return Err(StreamError::from(error).into()),
        };
        let at = Instant::now();
        let info: StreamInfo = ctx
            .nats()
            .api(js_api::STREAM_INFO, &json!({}))
            .await
            .map_err(StreamError::from)?;
        let now = OffsetDateTime::parse(&info.ts, &Rfc3339).map_err(Error::internal)?;
        let seq = |seq| Seq::new(seq).unwrap_or(Seq::MAX);
        let State {
            messages,
            bytes,
            first_seq,
            last_seq,
        } = info.state;
        Ok(Look {
            first: seq(first_seq),
            last: seq(last_seq),
            messages,
            bytes,
            max_bytes: u64::try_from(info.config.max_bytes)
                .ok()
                .filter(|max_bytes| *max_bytes > 0),
            floor: consumer
                .as_ref()
                .map_or(Seq::ZERO, |consumer| seq(consumer.ack_floor.stream_seq)),
            unstored: consumer.map_or(messages, |consumer| {
                (consumer.num_pending + consumer.num_ack_pending).min(messages)
            }),
            now_ms: i64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap_or_default(),
            at,
        })
    }

    /// A message's mean size.
    fn mean(&self) -> u64 {
        self.bytes.checked_div(self.messages).unwrap_or(0)
    }

    /// Hardly any room is left.
    pub fn is_pressed(&self) -> bool {
        self.max_bytes
            .is_some_and(|max_bytes| self.bytes > max_bytes / 100 * PRESSED)
    }

    /// How many messages have to leave for room again, about; 0 where there is room.
    pub fn surplus(&self) -> u64 {
        let enough = self.max_bytes.unwrap_or(u64::MAX) / 100 * RELIEVED;
        if self.is_pressed() {
            self.bytes
                .saturating_sub(enough)
                .div_ceil(self.mean().max(1))
        } else {
            0
        }
    }

    /// As operators are told, at this rate.
    pub fn budget(&self, messages_per_second: f64) -> Budget {
        let unstored_bytes = self.unstored * self.mean();
        let bytes_per_second = (messages_per_second * self.mean() as f64).round() as u64;
        let left = self
            .max_bytes
            .map(|max_bytes| max_bytes.saturating_sub(unstored_bytes));
        Budget {
            max_bytes: self.max_bytes,
            bytes: self.bytes,
            unstored_bytes,
            unstored_part: self
                .max_bytes
                .map(|max_bytes| (unstored_bytes as f64 / max_bytes as f64).min(1.0)),
            bytes_per_second,
            seconds_left: left.and_then(|left| left.checked_div(bytes_per_second)),
        }
    }
}

/// The positions the log gave out lately.
#[derive(Debug, Default)]
pub struct Rate(VecDeque<(Instant, Seq)>);

impl Rate {
    /// Remembers a look; messages a second since the earliest one in the window.
    pub fn note(&mut self, look: &Look) -> f64 {
        while self.0.len() >= LOOKS
            || self
                .0
                .front()
                .is_some_and(|(at, last)| at.elapsed() > WINDOW || *last > look.last)
        {
            self.0.pop_front();
        }
        self.0.push_back((look.at, look.last));
        let Some((at, last)) = self.0.front() else {
            return 0.0;
        };
        let (seconds, given) = (
            look.at.saturating_duration_since(*at).as_secs_f64(),
            look.last.get().saturating_sub(last.get()),
        );
        if seconds > 0.0 {
            given as f64 / seconds
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(bytes: u64, unstored: u64, last: u64, at: Instant) -> Look {
        let seq = |seq| Seq::new(seq).unwrap();
        Look {
            first: seq(1),
            last: seq(last),
            messages: 100,
            bytes,
            max_bytes: Some(10_000),
            floor: Seq::ZERO,
            unstored,
            now_ms: 0,
            at,
        }
    }

    #[test]
    fn what_is_not_stored_counts_against_the_budget() {
        let begun = Instant::now();
        let mut rate = Rate::default();
        let first = look(8_000, 50, 100, begun);
        let budget = first.budget(rate.note(&first));
        assert_eq!(
            (
                budget.unstored_bytes,
                budget.unstored_part,
                budget.seconds_left
            ),
            (4_000, Some(0.4), None)
        );
        let second = look(8_000, 50, 120, begun + Duration::from_secs(2));
        let budget = second.budget(rate.note(&second));
        // Ten messages of 80 bytes a second, and 6,000 bytes are left.
        assert_eq!(
            (budget.bytes_per_second, budget.seconds_left),
            (800, Some(7))
        );
    }

    #[test]
    fn a_log_is_relieved_when_it_is_nearly_full() {
        let at = Instant::now();
        assert_eq!(
            (
                look(9_000, 0, 100, at).is_pressed(),
                look(9_000, 0, 100, at).surplus()
            ),
            (false, 0)
        );
        // 91 bytes a message; 1,100 have to go.
        assert_eq!(
            (
                look(9_100, 0, 100, at).is_pressed(),
                look(9_100, 0, 100, at).surplus()
            ),
            (true, 13)
        );
    }
}
