//! What is deleted and what is kept, on real servers; the worker and the readers are the real
//! binaries.

mod clock;
mod erase;
mod expire;
mod expire_steps;
mod full;
mod plans;
mod receipt_history;
mod trim;

use std::collections::HashMap;

use async_nats::Client;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::function;
use protocol::endpoints::{HISTORY, RETENTION_ERASE, RETENTION_RUN, RETENTION_STATUS, SYNC};
use protocol::js_api;
use protocol::message::Message;
use protocol::retention::{Budget, Erased, RetentionReport};
use protocol::sync::SyncPage;
use service::config::Vars;
use service::function::Running;
use testing::{SOON, World, eventually};

/// The jobs run at start, and then not again while a test runs.
const SELDOM: (&str, &str) = ("RETENTION_INTERVAL_MS", "3600000");
const KEEP_NOTHING: [(&str, &str); 3] =
    [("TRIM_KEEP_MESSAGES", "0"), ("TRIM_KEEP_DAYS", "0"), SELDOM];

async fn start(world: &World, extra: &[(&str, &str)]) -> Running {
    let mut vars: HashMap<String, String> = world.vars("enforce-retention");
    vars.extend(
        extra
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
    );
    function().start(Vars::from_pairs(vars)).await.unwrap()
}

async fn ask(client: &Client, subject: String, body: Value) -> Value {
    let reply = client
        .request(subject, body.to_string().into())
        .await
        .unwrap();
    serde_json::from_slice(&reply.payload).unwrap()
}

async fn run(world: &World, dry_run: bool) -> RetentionReport {
    let operator = world.client("operator").await;
    let reply = ask(
        &operator,
        RETENTION_RUN.subject(&[]),
        json!({"dry_run": dry_run}),
    )
    .await;
    serde_json::from_value(reply.clone()).unwrap_or_else(|error| panic!("{error}: {reply}"))
}

async fn status(world: &World) -> Budget {
    let reply = ask(
        &world.client("operator").await,
        RETENTION_STATUS.subject(&[]),
        json!({}),
    )
    .await;
    serde_json::from_value(reply.clone()).unwrap_or_else(|error| panic!("{error}: {reply}"))
}

async fn publish(client: &Client, subject: &str, body: Value) -> u64 {
    let reply: Value = ask(client, subject.to_owned(), body).await;
    reply["seq"].as_u64().unwrap_or_else(|| panic!("{reply}"))
}

/// Publishes `count` messages to `subject`.
async fn publish_texts(client: &Client, subject: &str, count: usize) {
    for number in 0..count {
        publish(
            client,
            subject,
            json!({"user": "ann", "text": format!("text {number}")}),
        )
        .await;
    }
}

/// First and last sequence of the stream.
async fn range(world: &World) -> (u64, u64) {
    let info = ask(
        &world.client("operator").await,
        js_api::STREAM_INFO.to_owned(),
        json!({}),
    )
    .await;
    (
        info["state"]["first_seq"].as_u64().unwrap(),
        info["state"]["last_seq"].as_u64().unwrap(),
    )
}

async fn in_stream(world: &World, seq: u64) -> bool {
    let reader = world.client("enforce-retention").await;
    ask(
        &reader,
        js_api::MESSAGE_GET.to_owned(),
        json!({ "seq": seq }),
    )
    .await["error"]
        .is_null()
}

/// Waits until everything is acknowledged.
async fn settled(world: &World) {
    let operator = world.client("operator").await;
    eventually("everything is stored", SOON, async || {
        let info = ask(&operator, js_api::CONSUMER_INFO.to_owned(), json!({})).await;
        (info["num_pending"] == 0 && info["num_ack_pending"] == 0).then_some(())
    })
    .await;
}

/// Stores what the stream holds now, and nothing later.
async fn store(world: &World) {
    let worker = world.spawn("persist-message").await;
    settled(world).await;
    assert!(worker.terminate().await.success());
}

async fn history(client: &Client, room: &str, body: Value) -> Vec<Message> {
    let reply = ask(client, HISTORY.subject(&[room]), body).await;
    serde_json::from_value(reply.clone()).unwrap_or_else(|error| panic!("{error}: {reply}"))
}

fn seqs(messages: &[Message]) -> Vec<u64> {
    messages.iter().map(|message| message.seq.get()).collect()
}

async fn sync(client: &Client, room: &str, after: u64) -> SyncPage {
    let reply = ask(
        client,
        SYNC.subject(&[room]),
        json!({"after": after, "limit": 500}),
    )
    .await;
    serde_json::from_value(reply.clone()).unwrap_or_else(|error| panic!("{error}: {reply}"))
}

async fn count(database: &PgPool, table: &str) -> i64 {
    let sql = format!("select count(*) from {table}");
    sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
        .fetch_one(database)
        .await
        .unwrap()
}

/// Makes what is stored up to `through` older by `days`.
async fn age(database: &PgPool, through: u64, days: i32) {
    let sql =
        "update messages set received_at = received_at - $2 * interval '1 day' where seq <= $1";
    sqlx::query(sql)
        .bind(i64::try_from(through).unwrap())
        .bind(days)
        .execute(database)
        .await
        .unwrap();
}

/// Lets everything in `room` expire now. That includes what is in the stream, where messages cannot
/// be made older.
async fn expire_now(database: &PgPool, room: &str) {
    let now: String = sqlx::query_scalar("select now()::text")
        .fetch_one(database)
        .await
        .unwrap();
    let sql = format!(
        "create or replace function room_cutoff(asked text) returns table (cutoff timestamptz)
         language sql stable as
         $$ select case when asked in ('{room}', '*') then '{now}'::timestamptz
                        else '-infinity' end $$"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
        .execute(database)
        .await
        .unwrap();
}
