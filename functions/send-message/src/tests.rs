//! Sending as a client sees it, on real servers.

mod dedup;
mod failures;
mod order;
mod plans;

use std::collections::HashMap;
use std::time::Duration;

use async_nats::Client;
use serde_json::{Value, json};

use crate::function;
use protocol::endpoints::{DM_SEND, HISTORY, SEND};
use protocol::js_api;
use protocol::send::SendAck;
use service::config::Vars;
use service::function::Running;
use testing::{Process, RawClient, SOON, World, eventually};

/// Fast enough for a test that floods. Two make a batch already: how many wait together depends on
/// the machine.
const FLOOD: [(&str, &str); 3] = [
    ("SEND_BURST", "1000000"),
    ("SEND_RATE_PER_SECOND", "1000000"),
    ("SEND_MIN_BATCH", "2"),
];

async fn start_with(world: &World, extra: &[(&str, &str)]) -> Running {
    let mut vars: HashMap<String, String> = world.vars("send-message");
    vars.extend(
        extra
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
    );
    function().start(Vars::from_pairs(vars)).await.unwrap()
}

async fn start(world: &World) -> Running {
    start_with(world, &[]).await
}

/// A world whose stream differs from the one in `nats/`.
async fn world_with(field: &str, value: Value) -> (World, Process) {
    let world = World::builder()
        .bare()
        .administrator()
        .own_postgres()
        .start()
        .await;
    let config = world.with_edited_config(|file, object| {
        if file == "CHAT_MESSAGES.json" {
            object[field] = value.clone();
        }
    });
    let bootstrap = world
        .spawn_with("stream-bootstrap", &[("BOOTSTRAP_CONFIG", &config)])
        .await;
    (world, bootstrap)
}

/// An acknowledgement, or code and reason of an error.
async fn ask(client: &Client, subject: String, body: &str) -> Result<SendAck, (u64, String)> {
    let reply = client
        .request(subject, body.to_owned().into())
        .await
        .map_err(|error| (0, error.to_string()))?;
    let value: Value = serde_json::from_slice(&reply.payload).unwrap();
    match value["error"]["code"].as_u64() {
        Some(code) => Err((code, value["error"]["reason"].as_str().unwrap().to_owned())),
        None => Ok(serde_json::from_value(value).unwrap()),
    }
}

async fn send(
    client: &Client,
    user: &str,
    room: &str,
    body: Value,
) -> Result<SendAck, (u64, String)> {
    ask(client, SEND.subject(&[user, room]), &body.to_string()).await
}

/// The message at a sequence: subject, body, header block.
async fn at(client: &Client, seq: u64) -> Option<(String, Value, String)> {
    let reply = client
        .request(
            js_api::MESSAGE_GET,
            json!({ "seq": seq }).to_string().into(),
        )
        .await
        .unwrap();
    let reply: Value = serde_json::from_slice(&reply.payload).unwrap();
    let decode = |field: &str| {
        use base64::Engine as _;
        let text = reply["message"][field].as_str().unwrap_or_default();
        String::from_utf8(
            base64::engine::general_purpose::STANDARD
                .decode(text)
                .unwrap(),
        )
        .unwrap()
    };
    let subject = reply["message"]["subject"].as_str()?.to_owned();
    Some((
        subject,
        serde_json::from_str(&decode("data")).unwrap(),
        decode("hdrs"),
    ))
}

async fn last_seq(client: &Client) -> u64 {
    let reply = client
        .request(js_api::STREAM_INFO, "".into())
        .await
        .unwrap();
    serde_json::from_slice::<Value>(&reply.payload).unwrap()["state"]["last_seq"]
        .as_u64()
        .unwrap()
}

#[tokio::test]
async fn the_acknowledgement_carries_the_place_history_shows() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let (_history, _worker) =
        tokio::join!(world.spawn("get-history"), world.spawn("persist-message"));
    let given = send(
        &client,
        "ann",
        "general",
        json!({"text": "one", "id": "a-1", "timestamp": 1_700_000_000_000_i64}),
    )
    .await
    .unwrap();
    let made = send(
        &client,
        "bob",
        "general",
        json!({"text": "two", "user": "mallory", "room": "other"}),
    )
    .await
    .unwrap();
    assert_eq!(
        (given.message_id.as_str(), given.duplicate, made.duplicate),
        ("a-1", false, false)
    );
    assert_eq!(made.message_id.len(), 36);
    assert_eq!(
        &made.message_id[14..15],
        "7",
        "a UUIDv7: {}",
        made.message_id
    );
    let direct = ask(
        &client,
        DM_SEND.subject(&["ann", "bob"]),
        r#"{"text":"psst","timestamp":5}"#,
    )
    .await
    .unwrap();

    let page = client
        .request(HISTORY.subject(&["general"]), "".into())
        .await
        .unwrap();
    let page: Vec<protocol::message::Message> = serde_json::from_slice(&page.payload).unwrap();
    let shown: Vec<_> = page
        .iter()
        .map(|one| {
            (
                one.seq,
                one.id.as_str(),
                one.user.as_str(),
                one.text.as_str(),
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            (given.seq, "a-1", "ann", "one"),
            (made.seq, made.message_id.as_str(), "bob", "two")
        ]
    );
    assert_eq!(page[0].timestamp, 1_700_000_000_000);

    let reader = world.client("send-message").await;
    let (subject, body, headers) = at(&reader, direct.seq.get()).await.unwrap();
    assert_eq!(
        (subject.as_str(), &body["user"], &body["text"]),
        ("dm.ann.bob", &json!("ann"), &json!("psst"))
    );
    assert!(
        body["timestamp"].as_i64().unwrap() > 1_700_000_000_000,
        "an absurd time becomes the time of sending: {body}"
    );
    assert!(
        headers.contains(&format!("Nats-Msg-Id: ann:{}\r\n", direct.message_id)),
        "{headers}"
    );
    assert!(
        !headers.contains("Nats-Batch"),
        "alone, a message waits for no company: {headers}"
    );
    let database = world.database().await;
    eventually(
        "the direct message is stored under its sequence",
        SOON,
        async || {
            let found: Option<(String, String)> =
                sqlx::query_as("select sender, recipient from messages where seq = $1")
                    .bind(direct.seq.as_i64())
                    .fetch_optional(&database)
                    .await
                    .unwrap();
            (found? == ("ann".to_owned(), "bob".to_owned())).then_some(())
        },
    )
    .await;
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_bad_request_is_refused_with_a_hint() {
    let world = World::start().await;
    let function = start_with(&world, &[("MAX_TEXT_BYTES", "1000")]).await;
    let client = world.client("publisher").await;
    let long = "t".repeat(1001);
    let long_id = "i".repeat(129);
    for (body, code, hint) in [
        (String::new(), 400, "JSON object"),
        ("[]".to_owned(), 400, "JSON object"),
        (json!({"id": "a"}).to_string(), 400, "text is missing"),
        (json!({"text": 1}).to_string(), 400, "text must be a string"),
        (json!({"text": "a\0"}).to_string(), 400, "U+0000"),
        (
            json!({"text": long}).to_string(),
            413,
            "longer than 1000 bytes",
        ),
        (
            json!({"text": "a", "id": ""}).to_string(),
            400,
            "id must be",
        ),
        (
            json!({"text": "a", "id": {}}).to_string(),
            400,
            "id must be",
        ),
        (
            json!({"text": "a", "id": "a\0"}).to_string(),
            400,
            "id must be",
        ),
        (
            json!({"text": "a", "id": long_id}).to_string(),
            400,
            "id must be",
        ),
        (
            json!({"text": "a", "timestamp": "now"}).to_string(),
            400,
            "timestamp must be",
        ),
    ] {
        let (got, reason) = ask(&client, SEND.subject(&["ann", "general"]), &body)
            .await
            .unwrap_err();
        assert!(
            got == code && reason.contains(hint),
            "{body}: {got} {reason}"
        );
    }
    assert_eq!(
        send(&client, "ann", "__admin__", json!({"text": "a"}))
            .await
            .unwrap_err()
            .0,
        403
    );
    let mut raw = RawClient::connect(world.nats(), "publisher").await;
    let long = "r".repeat(65);
    for names in [
        "ann.general.x",
        "ann.*",
        "*.general",
        "ann.>",
        "ann.a/b",
        &format!("ann.{long}"),
        &format!("{long}.general"),
    ] {
        for subject in [SEND.subject(&[names]), DM_SEND.subject(&[names])] {
            let reply = raw
                .request(&subject, None, br#"{"text":"a"}"#)
                .await
                .unwrap();
            let body: Value = serde_json::from_slice(&reply.payload).unwrap();
            assert_eq!(body["error"]["code"], 400, "{subject}: {body}");
        }
    }
    let (code, _) = ask(&client, SEND.subject(&["ann"]), r#"{"text":"a"}"#)
        .await
        .unwrap_err();
    assert_eq!(code, 400);
    send(
        &client,
        "ann",
        "general",
        json!({"text": "t".repeat(1000), "id": "i".repeat(128), "unknown": [1]}),
    )
    .await
    .unwrap();
    let reader = world.client("send-message").await;
    assert_eq!(
        last_seq(&reader).await,
        1,
        "nothing of the above was stored"
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_user_who_sends_too_fast_waits_and_nobody_else() {
    let world = World::start().await;
    let function = start_with(
        &world,
        &[("SEND_BURST", "3"), ("SEND_RATE_PER_SECOND", "0.5")],
    )
    .await;
    let client = world.client("publisher").await;
    for number in 0..3 {
        send(
            &client,
            "ann",
            "general",
            json!({"text": number.to_string()}),
        )
        .await
        .unwrap();
    }
    let (code, reason) = send(&client, "ann", "other", json!({"text": "x"}))
        .await
        .unwrap_err();
    assert_eq!(code, 429);
    assert!(
        reason.starts_with("too fast: at most 3 at once and 0.5 a second; wait 1."),
        "{reason}"
    );
    send(&client, "bob", "general", json!({"text": "x"}))
        .await
        .unwrap();
    eventually("ann may send again", SOON, async || {
        send(&client, "ann", "general", json!({"text": "y"}))
            .await
            .ok()
    })
    .await;
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_wrong_configuration_is_refused() {
    let world = World::start().await;
    for (name, value) in [
        ("SEND_BURST", "0"),
        ("SEND_BURST", "4294967295"),
        ("SEND_RATE_PER_SECOND", "0"),
        ("SEND_RATE_PER_SECOND", "-1"),
        ("SEND_RATE_PER_SECOND", "NaN"),
        ("SEND_RATE_PER_SECOND", "inf"),
        ("SEND_RATE_PER_SECOND", "1e-300"),
        ("SEND_RATE_PER_SECOND", "1e300"),
    ] {
        let output = world
            .command("send-message")
            .env(name, value)
            .output()
            .await
            .unwrap();
        assert!(
            !output.status.success()
                && String::from_utf8_lossy(&output.stderr).contains(&format!("{name} must be at")),
            "{name}={value}: {output:?}"
        );
    }
}

#[tokio::test]
async fn concurrent_senders_share_batches_and_each_hears_their_own_place() {
    let world = World::start().await;
    let function = start_with(&world, &FLOOD).await;
    let client = world.client("publisher").await;
    let reader = world.client("send-message").await;
    let mut batched = 0;
    let mut acknowledged = HashMap::new();
    for round in 0..3 {
        let sends = (0..200).map(|number| {
            let client = &client;
            let text = format!("{round}/{number}");
            async move {
                let body = if number % 2 == 0 {
                    json!({"text": text, "id": text})
                } else {
                    json!({"text": text})
                };
                let ack = send(
                    client,
                    &format!("user-{number}"),
                    &format!("room-{}", number % 7),
                    body,
                )
                .await
                .unwrap();
                (ack.seq.get(), ack.duplicate, text, number)
            }
        });
        for (seq, duplicate, text, number) in futures::future::join_all(sends).await {
            let (subject, body, headers) = at(&reader, seq).await.unwrap();
            assert!(!duplicate);
            assert_eq!(
                (
                    subject,
                    body["text"].as_str(),
                    body["user"].as_str().unwrap()
                ),
                (
                    format!("chat.room-{}", number % 7),
                    Some(text.as_str()),
                    format!("user-{number}").as_str()
                )
            );
            batched += usize::from(headers.contains("Nats-Batch-Id"));
            assert_eq!(
                acknowledged.insert(seq, text),
                None,
                "two messages acknowledged at {seq}"
            );
        }
    }
    assert_eq!(last_seq(&reader).await, 600);
    assert!(batched > 500, "{batched} of 600 shared a flush");
    function.stop().await.unwrap();
}
