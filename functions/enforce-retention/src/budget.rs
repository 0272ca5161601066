//! How full the stream is, and how fast it fills.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::state::State;
use base::error::{Error, Result};
use base::seq::Seq;
use jetstream::info::{ConsumerInfo, StreamInfo, StreamState};
use jetstream::stream::StreamError;
use nats::connection::ApiError;
use protocol::retention::Budget;
use protocol::subject::{STREAM, WORKER};
use service::ctx::Ctx;

/// Percent of `max_bytes`. Above it, stored messages are trimmed although the settings would keep
/// them.
const HIGH_WATERMARK: u64 = 90;
/// Percent of `max_bytes` down to which they are trimmed then.
const LOW_WATERMARK: u64 = 80;
/// The rate is the mean over this long.
const RATE_WINDOW: Duration = Duration::from_secs(60);
/// The most measurements that the window holds.
const MAX_MEASUREMENTS: usize = 64;

/// The stream and its consumer at one moment.
#[derive(Debug, Clone)]
pub struct StreamStatus {
    /// The first sequence it holds.
    pub first: Seq,
    /// The last sequence it assigned.
    pub last: Seq,
    /// Messages it holds.
    pub messages: u64,
    /// What they take on disk.
    pub bytes: u64,
    /// The most it may take; `None` without a limit.
    pub max_bytes: Option<u64>,
    /// Everything up to here was stored in PostgreSQL before it was acknowledged.
    pub stored_through: Seq,
    /// Messages that are not acknowledged.
    pub unstored: u64,
    /// The server's clock, in Unix milliseconds.
    pub now_ms: i64,
    /// When we read this.
    at: Instant,
}

impl StreamStatus {
    /// Reads it.
    ///
    /// # Errors
    /// JetStream does not answer.
    pub async fn read(ctx: &Ctx<State>) -> Result<StreamStatus> {
        // The consumer first. Its ack floor only increases, so everything up to it is stored,
        // whatever the stream holds when it is read.
        let consumer = match ConsumerInfo::fetch(ctx.nats(), STREAM, WORKER).await {
            Ok(info) => Some(info),
            Err(error) if error.is(ApiError::NO_CONSUMER) => None,
            Err(error) => return Err(StreamError::from(error).into()),
        };
        let at = Instant::now();
        let info = StreamInfo::fetch(ctx.nats(), STREAM)
            .await
            .map_err(StreamError::from)?;
        let StreamState {
            messages, bytes, ..
        } = info.state;
        Ok(StreamStatus {
            first: info.state.first(),
            last: info.state.last(),
            messages,
            bytes,
            max_bytes: u64::try_from(info.config.max_bytes)
                .ok()
                .filter(|max_bytes| *max_bytes > 0),
            stored_through: consumer
                .as_ref()
                .map_or(Seq::ZERO, ConsumerInfo::acknowledged_through),
            unstored: consumer.map_or(messages, |consumer| {
                (consumer.num_pending + consumer.num_ack_pending).min(messages)
            }),
            now_ms: info.answered_ms().map_err(Error::internal)?,
            at,
        })
    }

    fn mean_message_bytes(&self) -> u64 {
        self.bytes.checked_div(self.messages).unwrap_or(0)
    }

    /// Whether the stream is nearly full.
    pub fn is_above_watermark(&self) -> bool {
        self.max_bytes
            .is_some_and(|max_bytes| self.bytes > max_bytes / 100 * HIGH_WATERMARK)
    }

    /// About how many messages have to be removed to get below the low watermark; 0 while the
    /// stream is not above the high one.
    pub fn surplus(&self) -> u64 {
        if !self.is_above_watermark() {
            return 0;
        }
        let low_watermark = self.max_bytes.unwrap_or(u64::MAX) / 100 * LOW_WATERMARK;
        self.bytes
            .saturating_sub(low_watermark)
            .div_ceil(self.mean_message_bytes().max(1))
    }

    /// The budget for operators, at this rate of new messages.
    pub fn budget(&self, messages_per_second: f64) -> Budget {
        let unstored_bytes = self.unstored * self.mean_message_bytes();
        let bytes_per_second =
            (messages_per_second * self.mean_message_bytes() as f64).round() as u64;
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

/// The rate at which the stream assigns sequences: recent measurements of its last one.
#[derive(Debug, Default)]
pub struct Rate(VecDeque<(Instant, Seq)>);

impl Rate {
    /// Adds a measurement; returns the messages per second since the oldest one in the window.
    pub fn add(&mut self, status: &StreamStatus) -> f64 {
        while self.0.len() >= MAX_MEASUREMENTS
            || self
                .0
                .front()
                .is_some_and(|(at, last)| at.elapsed() > RATE_WINDOW || *last > status.last)
        {
            self.0.pop_front();
        }
        self.0.push_back((status.at, status.last));
        let Some((at, last)) = self.0.front() else {
            return 0.0;
        };
        let seconds = status.at.saturating_duration_since(*at).as_secs_f64();
        let assigned = status.last.get().saturating_sub(last.get());
        if seconds > 0.0 {
            assigned as f64 / seconds
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(bytes: u64, unstored: u64, last: u64, at: Instant) -> StreamStatus {
        let seq = |seq| Seq::new(seq).unwrap();
        StreamStatus {
            first: seq(1),
            last: seq(last),
            messages: 100,
            bytes,
            max_bytes: Some(10_000),
            stored_through: Seq::ZERO,
            unstored,
            now_ms: 0,
            at,
        }
    }

    #[test]
    fn what_is_not_stored_counts_against_the_budget() {
        let started = Instant::now();
        let mut rate = Rate::default();
        let first = status(8_000, 50, 100, started);
        let budget = first.budget(rate.add(&first));
        assert_eq!(budget.unstored_bytes, 4_000);
        assert_eq!(budget.unstored_part, Some(0.4));
        assert_eq!(budget.seconds_left, None);
        let second = status(8_000, 50, 120, started + Duration::from_secs(2));
        let budget = second.budget(rate.add(&second));
        // Ten messages of 80 bytes a second, and 6,000 bytes are left.
        assert_eq!(budget.bytes_per_second, 800);
        assert_eq!(budget.seconds_left, Some(7));
    }

    #[test]
    fn a_surplus_exists_only_above_the_high_watermark() {
        let at = Instant::now();
        let below = status(9_000, 0, 100, at);
        assert_eq!((below.is_above_watermark(), below.surplus()), (false, 0));
        // 91 bytes a message; 1,100 bytes have to go.
        let above = status(9_100, 0, 100, at);
        assert_eq!((above.is_above_watermark(), above.surplus()), (true, 13));
    }
}
