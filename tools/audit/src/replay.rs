//! Waits until a replay is stored, by watching the consumer's ack floor rise.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::json;

use crate::report;
use base::error::Fatal;
use nats::connection::Connection;
use protocol::audit::Replayed;
use protocol::js_api;

const POLL_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Deserialize)]
struct Consumer {
    ack_floor: AckFloor,
    #[serde(default)]
    num_pending: u64,
    #[serde(default)]
    num_ack_pending: u64,
}

#[derive(Deserialize)]
struct AckFloor {
    stream_seq: u64,
}

/// Returns when everything up to `replayed.through` is stored again.
///
/// # Errors
/// The replay did not advance for `stuck_after`, or JetStream does not answer.
pub async fn wait_until_stored(
    operator: &Connection,
    replayed: &Replayed,
    stuck_after: Duration,
) -> Result<(), Fatal> {
    let before = replayed.from.previous().get();
    let total = replayed.through.get().saturating_sub(before);
    let bar = progress_bar(total);
    let begun = Instant::now();
    let mut advanced = Instant::now();
    let mut last = 0;
    loop {
        let consumer = consumer(operator).await?;
        let floor = consumer.ack_floor.stream_seq;
        bar.set_position(floor.saturating_sub(before).min(total));
        // The last messages may have been erased: then the ack floor ends below them.
        if floor >= replayed.through.get() || consumer.num_pending + consumer.num_ack_pending == 0 {
            bar.finish_and_clear();
            println!("stored again in {:.1} s", begun.elapsed().as_secs_f64());
            return Ok(());
        }
        if floor + consumer.num_ack_pending != last {
            last = floor + consumer.num_ack_pending;
            advanced = Instant::now();
        }
        if advanced.elapsed() > stuck_after {
            bar.abandon();
            return Err(Fatal::new(format!(
                "nothing was stored for {} s, at sequence {floor} of {}: are persist-message and \
                 PostgreSQL running? The replay continues by itself when they are; an audit shows \
                 what still waits",
                stuck_after.as_secs(),
                replayed.through
            )));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

fn progress_bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), report::target());
    let template = "{bar:40} {percent:>3} %  {pos} of {len} stored again, {eta} left";
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

async fn consumer(operator: &Connection) -> Result<Consumer, Fatal> {
    let info = operator.api(js_api::CONSUMER_INFO, &json!({})).await;
    info.map_err(|error| {
        Fatal::new(format!(
            "the state of the consumer persist-message is not known: {error}; the replay continues \
             all the same"
        ))
    })
}
