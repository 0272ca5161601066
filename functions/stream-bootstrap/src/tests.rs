//! The whole function on real servers.

mod apply;
mod audit;
mod deletions;
mod foreign_events;
mod other_streams;

mod plans;
mod published;
mod refusals;
mod replay;
mod sequence_guard;
mod shared_database;
mod start;

use std::collections::HashMap;

use async_nats::Client;
use serde_json::{Value, json};

use crate::function;
use base::error::Fatal;
use protocol::bootstrap::{Applied, Check};
use protocol::endpoints::{BOOTSTRAP_APPLY, BOOTSTRAP_CHECK};
use service::config::Vars;
use service::function::Running;
use testing::{SOON, World, eventually};

const STREAM_JSON: &str = include_str!("../../../nats/streams/CHAT_MESSAGES.json");
const CONSUMER_JSON: &str =
    include_str!("../../../nats/consumers/CHAT_MESSAGES.persist-message.json");

async fn bare() -> World {
    World::builder().bare().administrator().start().await
}

async fn start(world: &World) -> Result<Running, Fatal> {
    start_with(world, &[]).await
}

async fn start_with(world: &World, extra: &[(&str, &str)]) -> Result<Running, Fatal> {
    let mut vars: HashMap<String, String> = world.vars("stream-bootstrap");
    vars.extend(
        extra
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
    );
    function().start(Vars::from_pairs(vars)).await
}

async fn ask(client: &Client, subject: String, body: Value) -> Value {
    let reply = client
        .request(subject, body.to_string().into())
        .await
        .unwrap();
    serde_json::from_slice(&reply.payload).unwrap()
}

/// Calls JetStream's API as a user who may call everything.
async fn api(admin: &Client, call: &str, body: Value) -> Value {
    let reply = ask(admin, format!("$JS.API.{call}"), body).await;
    assert_eq!(reply["error"], Value::Null, "{call}: {reply}");
    reply
}

async fn check(world: &World) -> Check {
    let reply = ask(
        &world.client("operator").await,
        BOOTSTRAP_CHECK.subject(&[]),
        json!({}),
    )
    .await;
    serde_json::from_value(reply.clone()).unwrap_or_else(|error| panic!("{error}: {reply}"))
}

async fn apply(world: &World) -> Vec<String> {
    let reply = ask(
        &world.client("operator").await,
        BOOTSTRAP_APPLY.subject(&[]),
        json!({}),
    )
    .await;
    let applied: Applied =
        serde_json::from_value(reply.clone()).unwrap_or_else(|error| panic!("{error}: {reply}"));
    applied.done
}

/// The chat stream's desired configuration, with some fields changed.
fn stream_with(fields: Value) -> Value {
    let mut config: Value = serde_json::from_str(STREAM_JSON).unwrap();
    config
        .as_object_mut()
        .unwrap()
        .extend(fields.as_object().unwrap().clone());
    config
}

async fn stream_config(admin: &Client) -> Value {
    api(admin, "STREAM.INFO.CHAT_MESSAGES", json!({})).await["config"].clone()
}
