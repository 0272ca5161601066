//! The worker as its publishers and operators see it, on real servers.

mod bad;
mod changes;
mod conflict;
mod consumer;
mod dead_letters;
mod duplicates;
mod erase;
mod last_seen;
mod plans;
mod refused;
mod reused;
mod stored;

use std::time::Duration;

use async_nats::Client;
use async_nats::header::HeaderMap;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::function;
use service::config::Vars;
use service::function::Running;
use testing::{RawClient, SOON, World, eventually};

/// What the promise of one bad message among a hundred good ones allows.
const WITHIN: Duration = Duration::from_secs(5);

async fn worker(world: &World) -> Running {
    function()
        .start(Vars::from_pairs(world.vars("persist-message")))
        .await
        .unwrap()
}

/// Publishes with JetStream's acknowledgement; the sequence, and whether JetStream knew the id.
async fn publish(client: &Client, subject: &str, id: Option<&str>, body: &str) -> (u64, bool) {
    let mut headers = HeaderMap::new();
    if let Some(id) = id {
        headers.insert(protocol::header::MESSAGE_ID, id);
    }
    let ack = client
        .request_with_headers(subject.to_owned(), headers, body.to_owned().into())
        .await
        .unwrap();
    let ack: Value = serde_json::from_slice(&ack.payload).unwrap();
    assert!(ack.get("error").is_none(), "{ack}");
    (
        ack["seq"].as_u64().unwrap(),
        ack["duplicate"].as_bool().unwrap_or(false),
    )
}

async fn count(database: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(database).await.unwrap()
}

async fn stored(database: &PgPool, wanted: i64, within: Duration) {
    eventually(&format!("{wanted} messages stored"), within, async || {
        (count(database, "select count(*) from messages").await == wanted).then_some(())
    })
    .await;
}

/// Deliveries that another replica has, and does nothing with.
async fn taken(world: &World, messages: usize) -> (RawClient, Vec<testing::RawMessage>) {
    let mut other = RawClient::connect(world.nats(), "persist-message").await;
    let inbox = other.inbox();
    other.subscribe(&inbox).await;
    other
        .publish_raw(
            protocol::js_api::CONSUMER_NEXT,
            Some(&inbox),
            None,
            messages.to_string().as_bytes(),
        )
        .await;
    let mut held = Vec::new();
    while held.len() < messages {
        held.push(other.next(SOON).await.unwrap());
    }
    (other, held)
}

async fn nak(client: &mut RawClient, message: &testing::RawMessage) {
    client
        .publish_raw(message.reply.as_deref().unwrap(), None, None, b"-NAK")
        .await;
}

/// Somebody waits for a lock, in a statement that holds `part`.
async fn blocked(database: &PgPool, part: &'static str) {
    eventually("a statement waits for a lock", SOON, async || {
        let waiting: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
              where datname = current_database() and wait_event_type = 'Lock' and position($1 in
                query) > 0",
        )
        .bind(part)
        .fetch_one(database)
        .await
        .unwrap();
        (waiting > 0).then_some(())
    })
    .await;
}

/// Everything acknowledged: the consumer has nothing left to do.
async fn settled(world: &World) -> Value {
    let operator = world.client("operator").await;
    eventually("everything acknowledged", SOON, async || {
        let info = operator
            .request(protocol::js_api::CONSUMER_INFO, "".into())
            .await
            .ok()?;
        let info: Value = serde_json::from_slice(&info.payload).ok()?;
        (info["num_pending"] == 0 && info["num_ack_pending"] == 0).then_some(info)
    })
    .await
}

/// Waits until the stream has `messages`: while nats-server flushes what was published it delivers
/// nothing.
async fn logged(client: &Client, messages: usize) {
    eventually("the stream has them", 3 * SOON, async || {
        let state = client
            .request(protocol::js_api::STREAM_INFO, "".into())
            .await
            .unwrap();
        let state: Value = serde_json::from_slice(&state.payload).unwrap();
        (state["state"]["last_seq"] == messages).then_some(())
    })
    .await;
}
