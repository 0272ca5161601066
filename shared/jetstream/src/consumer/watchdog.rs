//! Notices a consumer that does not move, which async-nats and the server do not report.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::PullConsumer;
use base::error::Fatal;

const INTERVAL: Duration = Duration::from_secs(2);

impl PullConsumer {
    /// Returns when messages are pending and nothing has moved for [`super::Options::stuck_after`],
    /// so that a supervisor can restart the process.
    pub(super) async fn watch(&self) -> Fatal {
        let mut last = (0, 0, 0);
        let mut moved = Instant::now();
        let mut paused = false;
        loop {
            tokio::time::sleep(INTERVAL).await;
            let Ok(info) = self.0.stream.consumer().await else {
                // NATS is away, or the consumer does not exist yet: nothing to judge.
                moved = Instant::now();
                continue;
            };
            self.note_ack_wait(&info);
            if info.paused != paused {
                paused = info.paused;
                log_paused(paused);
            }
            let now = (
                info.ack_floor.stream_seq,
                self.acknowledged(),
                self.0.extensions.load(Ordering::Relaxed),
            );
            let idle = info.num_ack_pending + info.num_pending == 0;
            let excused = self.0.watchdog_paused.load(Ordering::Relaxed);
            if now != last || idle || paused || excused {
                last = now;
                moved = Instant::now();
            } else if moved.elapsed() > self.0.options.stuck_after {
                return Fatal::new(format!(
                    "stuck: {} messages pending, {} unacknowledged, nothing moved for {} s; \
                     leaving so that a fresh start can",
                    info.num_pending,
                    info.num_ack_pending,
                    self.0.options.stuck_after.as_secs()
                ));
            }
        }
    }
}

fn log_paused(paused: bool) {
    if paused {
        tracing::warn!(
            "the consumer is paused: nothing is delivered until its pause ends; to end it now: \
             `nats consumer resume`"
        );
    } else {
        tracing::info!("the consumer is not paused any more; messages are delivered again");
    }
}
