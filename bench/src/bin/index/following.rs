//! Waiting for a replay: the ack floor, as it rises.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::json;

use crate::show;
use base::error::Fatal;
use nats::connection::Connection;
use protocol::audit::Replayed;
use protocol::js_api;

const LOOK_AGAIN: Duration = Duration::from_millis(200);

#[derive(Deserialize)]
struct Consumer {
    ack_floor: Floor,
    #[serde(default)]
    num_pending: u64,
    #[serde(default)]
    num_ack_pending: u64,
}

#[derive(Deserialize)]
struct Floor {
    stream_seq: u64,
}

/// Returns when everything up to `replayed.through` is stored again.
///
/// # Errors
/// Nothing moved for `stuck_after`; JetStream does not answer.
pub async fn until_stored(
    operator: &Connection,
    replayed: &Replayed,
    stuck_after: Duration,
) -> Result<(), Fatal> {
    let before = replayed.from.previous().get();
    let total = replayed.through.get().saturating_sub(before);
    let bar = ProgressBar::with_draw_target(Some(total), show::target());
    if let Ok(style) = ProgressStyle::with_template(
        "{bar:40} {percent:>3} %  {pos} of {len} stored again, {eta} left",
    ) {
        bar.set_style(style);
    }
    let (begun, mut moved, mut last) = (Instant::now(), Instant::now(), 0);
    loop {
        let consumer: Consumer = operator
            .api(js_api::CONSUMER_INFO, &json!({}))
            .await
            .map_err(|error| {
                Fatal::new(format!(
                    "the worker's state is not to be had: {error}; the replay goes on all the same"
                ))
            })?;
        let floor = consumer.ack_floor.stream_seq;
        bar.set_position(floor.saturating_sub(before).min(total));
        // The last messages may have been erased: then the floor ends below them.
        if floor >= replayed.through.get() || consumer.num_pending + consumer.num_ack_pending == 0 {
            bar.finish_and_clear();
            println!("stored again in {:.1} s", begun.elapsed().as_secs_f64());
            return Ok(());
        }
        if floor + consumer.num_ack_pending != last {
            (last, moved) = (floor + consumer.num_ack_pending, Instant::now());
        }
        if moved.elapsed() > stuck_after {
            bar.abandon();
            return Err(Fatal::new(format!(
                "nothing was stored for {} s, at sequence {floor} of {}: are persist-message and PostgreSQL running? The replay goes on \
                 by itself when they are; an audit tells what is waiting",
                stuck_after.as_secs(),
                replayed.through
            )));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
