//! Cursors as clients move them, on real servers; other functions are the real binaries.

mod cursors;
mod plans;
mod story;
mod unread;

use async_nats::Client;
use serde_json::{Value, json};

use crate::function;
use protocol::endpoints::{DELIVERED, DM_HISTORY, DM_INBOX, DM_READ, READ, UNREAD};
use protocol::receipt::Unread;
use protocol::{header, js_api};
use service::config::Vars;
use service::function::Running;
use testing::{SOON, World, eventually};

async fn start(world: &World) -> Running {
    function()
        .start(Vars::from_pairs(world.vars("track-receipts")))
        .await
        .unwrap()
}

/// The reply, or the error's code and message.
async fn ask(client: &Client, subject: String, body: &str) -> Result<Value, (u64, String)> {
    let reply = client
        .request(subject, body.to_owned().into())
        .await
        .unwrap();
    let answer: Value = serde_json::from_slice(&reply.payload).unwrap();
    match reply
        .headers
        .as_ref()
        .and_then(|headers| headers.get(header::SERVICE_ERROR_CODE))
    {
        Some(code) => Err((
            code.as_str().parse().unwrap(),
            answer["error"]["reason"].as_str().unwrap().to_owned(),
        )),
        None => Ok(answer),
    }
}

/// The reply; asks again when a busy machine took too long.
async fn ask_patiently(client: &Client, subject: String, body: &str) -> Value {
    eventually("an answer", SOON, async || {
        match ask(client, subject.clone(), body).await {
            Err((503, _)) => None,
            answer => Some(answer.unwrap()),
        }
    })
    .await
}

/// Where the cursor stands, and whether it moved.
async fn mark(client: &Client, subject: String, through: u64) -> (u64, bool) {
    let marked = ask_patiently(client, subject, &json!({ "through": through }).to_string()).await;
    (
        marked["through"].as_u64().unwrap(),
        marked["moved"].as_bool().unwrap(),
    )
}

async fn deliver(client: &Client, user: &str, through: u64) -> (u64, bool) {
    mark(client, DELIVERED.subject(&[user]), through).await
}

async fn read_direct(client: &Client, user: &str, peer: &str, through: u64) -> (u64, bool) {
    mark(client, DM_READ.subject(&[user, peer]), through).await
}

async fn read_room(client: &Client, user: &str, room: &str, through: u64) -> (u64, bool) {
    mark(client, READ.subject(&[user, room]), through).await
}

async fn whole_unread(client: &Client, user: &str) -> Unread {
    serde_json::from_value(ask_patiently(client, UNREAD.subject(&[user]), "").await).unwrap()
}

/// Room, count and whether there is more; and the total.
async fn unread(client: &Client, user: &str) -> (Vec<(String, u64, bool)>, u64) {
    let unread = whole_unread(client, user).await;
    assert_eq!(
        unread.more,
        unread.unread.iter().any(|room| room.more),
        "{unread:?}"
    );
    (
        unread
            .unread
            .into_iter()
            .map(|one| (one.room, one.count, one.more))
            .collect(),
        unread.total,
    )
}

fn of(room: &str, count: u64) -> (String, u64, bool) {
    (room.to_owned(), count, false)
}

/// Position, text and status of each message in the inbox of `user`.
async fn inbox(client: &Client, user: &str) -> Vec<(u64, String, String)> {
    let page = ask(client, DM_INBOX.subject(&[user]), "").await.unwrap();
    shown(&page["messages"])
}

async fn history(client: &Client, user: &str, peer: &str) -> Vec<(u64, String, String)> {
    shown(
        &ask(client, DM_HISTORY.subject(&[user, peer]), "")
            .await
            .unwrap(),
    )
}

fn shown(messages: &Value) -> Vec<(u64, String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let messages = messages.as_array().unwrap().iter();
    messages
        .map(|message| {
            (
                message["seq"].as_u64().unwrap(),
                text(&message["text"]),
                text(&message["status"]),
            )
        })
        .collect()
}

async fn append(client: &Client, subject: &str, body: Value) -> u64 {
    let ack = client
        .request(subject.to_owned(), body.to_string().into())
        .await
        .unwrap();
    serde_json::from_slice::<Value>(&ack.payload).unwrap()["seq"]
        .as_u64()
        .expect("an acknowledgement")
}

async fn say(client: &Client, subject: &str, user: &str, text: &str) -> u64 {
    append(client, subject, json!({"user": user, "text": text})).await
}

/// Waits until everything up to `seq` is stored and acknowledged.
async fn stored(world: &World, seq: u64) {
    let operator = world.client("operator").await;
    eventually("everything is stored", SOON, async || {
        let info = operator
            .request(js_api::CONSUMER_INFO, "".into())
            .await
            .unwrap();
        let info: Value = serde_json::from_slice(&info.payload).unwrap();
        (info["ack_floor"]["stream_seq"].as_u64() >= Some(seq)).then_some(())
    })
    .await;
}
