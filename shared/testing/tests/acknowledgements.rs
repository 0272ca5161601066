//! JetStream acknowledges a message to any reply subject that its publisher gives, unchecked.
//! Wherever the acknowledgement goes, it counts as no message, no request and no event, and no
//! function stops.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

#[expect(dead_code, reason = "who may call an endpoint is for other tests")]
mod table;

use async_nats::Client;
use futures::StreamExt;
use futures::future::join_all;
use serde_json::{Value, json};

use base::endpoint::Endpoint;
use protocol::endpoints::{
    BOOTSTRAP_APPLY, BOOTSTRAP_CHECK, DEADLETTERS_LIST, DELETE, ENDPOINTS, HISTORY, READ, SEND,
    SYNC, UNREAD,
};
use protocol::subject::OUTBOX_WAKE;
use testing::{RawClient, SOON, World, eventually};

use table::{example, functions};

/// Subjects of the stream. There, the acknowledgement becomes a dead letter.
const IN_THE_STREAM: [&str; 4] = [
    "chat.other",
    "dm.ann.bob",
    "admin.alerts",
    "change.chat.general",
];

/// Subjects that our functions subscribe to, and subjects that clients of ours subscribe to.
fn elsewhere() -> Vec<String> {
    let mut subjects = vec![
        OUTBOX_WAKE.to_owned(),
        "live.chat.general".to_owned(),
        "live.change.chat.general".to_owned(),
        "events.v1.chat.general".to_owned(),
        "events.v1.x".to_owned(),
        "scrollback.fence".to_owned(),
        "$SRV.PING".to_owned(),
        "$SRV.STATS".to_owned(),
    ];
    subjects.extend(ENDPOINTS.iter().map(example));
    let inboxes = functions().into_iter();
    subjects
        .extend(inboxes.flat_map(|name| [format!("_INBOX.{name}.x"), format!("_INBOX.{name}.>")]));
    subjects
}

async fn ask<T, R>(
    client: &Client,
    endpoint: Endpoint<T, R>,
    tokens: &[&str],
    body: Value,
) -> Value {
    let reply = client
        .request(endpoint.subject(tokens), body.to_string().into())
        .await
        .unwrap();
    let reply: Value = serde_json::from_slice(&reply.payload).unwrap();
    assert_eq!(reply.get("error"), None, "{reply}");
    reply
}

#[tokio::test]
async fn an_acknowledgement_counts_as_nothing_wherever_it_goes() {
    let world = World::start().await;
    // Without enforce-retention, because it removes what this test counts.
    let started = functions().into_iter();
    let started = started.filter(|name| name != "enforce-retention");
    let running = join_all(started.map(async |name| world.spawn(&name).await)).await;
    let client = world.client("publisher").await;
    let operator = world.client("operator").await;
    let mut live = client.subscribe("live.chat.general").await.unwrap();
    client.flush().await.unwrap();
    let mut mallory = RawClient::connect(world.nats(), "publisher").await;
    let replies: Vec<String> = IN_THE_STREAM
        .iter()
        .map(|subject| (*subject).to_owned())
        .chain(elsewhere())
        .collect();
    for (number, reply) in replies.iter().enumerate() {
        let body = json!({"user": "mallory", "text": "x", "id": number.to_string()}).to_string();
        mallory
            .publish_raw("chat.general", Some(reply), None, body.as_bytes())
            .await;
        // Some servers refuse such a reply subject by themselves. That is fine.
        _ = mallory.flush().await;
    }
    let last = ask(
        &client,
        SEND,
        &["ann", "general"],
        json!({"text": "after it all", "id": "a"}),
    )
    .await["seq"]
        .as_u64()
        .unwrap();

    let database = world.database().await;
    let stored = async || {
        sqlx::query_scalar::<_, i64>("select count(*) from messages")
            .fetch_one(&database)
            .await
            .unwrap()
    };
    eventually(
        "every message is stored, and nothing else",
        SOON,
        async || {
            let newest: Option<i64> = sqlx::query_scalar("select max(seq) from messages")
                .fetch_one(&database)
                .await
                .unwrap();
            (newest? == last as i64).then_some(())
        },
    )
    .await;
    assert_eq!(stored().await, replies.len() as i64 + 1);
    let dead_letters = ask(&operator, DEADLETTERS_LIST, &[], json!({})).await;
    let mut dead_letters: Vec<&str> = dead_letters["letters"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["subject"].as_str().unwrap())
        .collect();
    dead_letters.sort_unstable();
    assert_eq!(
        dead_letters,
        [
            "admin.alerts",
            "change.chat.general",
            "chat.other",
            "dm.ann.bob"
        ]
    );

    // Every function still answers correctly.
    ask(&client, HISTORY, &["general"], json!({})).await;
    ask(&client, SYNC, &["general"], json!({"after": 0})).await;
    assert_eq!(
        ask(&client, READ, &["bob", "general"], json!({"through": last})).await["moved"],
        true
    );
    assert_eq!(ask(&client, UNREAD, &["bob"], json!({})).await["total"], 0);
    assert_eq!(
        ask(&client, DELETE, &["ann", "general"], json!({"id": "a"})).await["status"],
        "deleted"
    );
    let published: i64 = eventually("everything is published", SOON, async || {
        let published: i64 = sqlx::query_scalar("select seq from relayed")
            .fetch_one(&database)
            .await
            .unwrap();
        (published > last as i64).then_some(published)
    })
    .await;
    assert_eq!(published, last as i64 + 1, "the deletion came last");
    eventually("only events are left in CHAT_EVENTS", SOON, async || {
        let _ = ask(&operator, BOOTSTRAP_APPLY, &[], json!({})).await;
        (ask(&operator, BOOTSTRAP_CHECK, &[], json!({})).await["ok"] == true).then_some(())
    })
    .await;
    // Live readers recognize an acknowledgement by the headers it lacks.
    let mut heard = 0;
    while heard < replies.len() + 1 {
        let message = tokio::time::timeout(SOON, live.next())
            .await
            .unwrap()
            .unwrap();
        let ours = message.headers.as_ref().is_some_and(|headers| {
            headers
                .get("Nats-Stream")
                .is_some_and(|stream| stream.as_str() == protocol::subject::STREAM)
                && headers.get("Nats-Sequence").is_some()
        });
        let body: Value = serde_json::from_slice(&message.payload).unwrap();
        assert_eq!(ours, body.get("text").is_some(), "{body}");
        heard += usize::from(ours);
    }
    assert!(running.iter().all(testing::Process::is_running));
}

/// JetStream's API does not treat its own acknowledgements as requests. Newer servers refuse such a
/// reply subject.
#[tokio::test]
async fn an_acknowledgement_is_no_request_to_jetstream() {
    let world = World::builder().administrator().start().await;
    let admin = world.client("administrator").await;
    let mut mallory = RawClient::connect(world.nats(), "publisher").await;
    let calls = [
        "STREAM.PURGE.",
        "STREAM.DELETE.",
        "STREAM.MSG.DELETE.",
        "STREAM.UPDATE.",
        "CONSUMER.RESET.",
        "CONSUMER.DELETE.",
        "CONSUMER.PAUSE.",
    ];
    for call in calls {
        let consumer = if call.starts_with("CONSUMER") {
            ".persist-message"
        } else {
            ""
        };
        let reply = format!("$JS.API.{call}CHAT_MESSAGES{consumer}");
        mallory
            .publish_raw(
                "chat.general",
                Some(&reply),
                None,
                br#"{"user":"mallory","text":"x"}"#,
            )
            .await;
        _ = mallory.flush().await;
    }
    let ack = admin
        .request("chat.general", r#"{"user":"ann","text":"x"}"#.into())
        .await
        .unwrap();
    let ack: Value = serde_json::from_slice(&ack.payload).unwrap();
    let info = async |call: &str| {
        let reply = admin
            .request(format!("$JS.API.{call}"), "".into())
            .await
            .unwrap();
        serde_json::from_slice::<Value>(&reply.payload).unwrap()
    };
    let stream = info("STREAM.INFO.CHAT_MESSAGES").await;
    assert_eq!(
        (&stream["state"]["first_seq"], &stream["state"]["messages"]),
        (&json!(1), &ack["seq"]),
        "{stream}"
    );
    let consumer = info("CONSUMER.INFO.CHAT_MESSAGES.persist-message").await;
    assert_eq!(
        (consumer.get("error"), consumer.get("paused")),
        (None, None),
        "{consumer}"
    );
}
