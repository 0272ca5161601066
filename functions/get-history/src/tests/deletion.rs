//! A deleted message stays deleted, whatever the stream and PostgreSQL hold of it, and its place
//! remains.

use serde_json::{Value, json};

use super::{Got, SOON, ask, eventually, history, publish_body};
use protocol::js_api;
use testing::World;

/// Appends a deletion, as only functions may.
async fn delete(world: &World, target: u64, id: &str, user: &str) -> u64 {
    let body = json!({
        "type": "delete", "target": target, "id": id, "user": user,
        "derived": id.starts_with("seq:"), "timestamp": 1_700_000_000_000_i64,
        "received": 4_000_000_000_000_i64, "mode": "soft", "by": user,
    });
    publish_body(
        &world.client("stream-bootstrap").await,
        "change.chat.general",
        &body.to_string(),
    )
    .await
}

/// Erases a message from the stream, as a hard deletion does.
async fn erase(world: &World, seq: u64) {
    let reply = world
        .client("persist-message")
        .await
        .request(
            js_api::MESSAGE_DELETE,
            json!({ "seq": seq }).to_string().into(),
        )
        .await;
    assert_eq!(
        serde_json::from_slice::<Value>(&reply.unwrap().payload).unwrap()["success"],
        true
    );
}

/// Waits until everything is stored and acknowledged: then no page reads the stream.
async fn settled(world: &World) {
    let operator = world.client("operator").await;
    eventually("everything is acknowledged", SOON, async || {
        let info = operator
            .request(js_api::CONSUMER_INFO, "".into())
            .await
            .ok()?;
        let info: Value = serde_json::from_slice(&info.payload).ok()?;
        (info["num_pending"] == 0 && info["num_ack_pending"] == 0).then_some(())
    })
    .await;
}

fn shown(got: &Got) -> Vec<(u64, &str, bool)> {
    got.messages
        .iter()
        .map(|message| (message.seq.get(), message.text.as_str(), message.deleted))
        .collect()
}

#[tokio::test]
async fn a_tombstone_stands_in_its_place_from_stream_projection_and_both() {
    let world = World::with_own_postgres().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    let say = async |user: &str, text: &str, id: Option<&str>| {
        publish_body(
            &client,
            "chat.general",
            &json!({"user": user, "text": text, "id": id}).to_string(),
        )
        .await
    };
    let one = say("ann", "one", None).await;
    let two = say("ann", "two", Some("b")).await;
    let three = say("ann", "three", Some("c")).await;
    let four = say("bob", "four", Some("b")).await;
    delete(&world, one, "seq:1", "ann").await;
    delete(&world, two, "b", "ann").await;
    // Another user's message, and one that does not exist.
    delete(&world, four, "b", "zoe").await;
    delete(&world, three, "c", "ann").await;
    erase(&world, three).await;
    let wanted = [
        (one, "", true),
        (two, "", true),
        (three, "", true),
        (four, "four", false),
    ];
    let check = async |source: &str| {
        for (body, from, to) in [
            (json!({}), 0, 4),
            (json!({"limit": 2}), 2, 4),
            (json!({"before": four, "limit": 1}), 2, 3),
            (json!({"after": one, "limit": 2}), 1, 3),
            (json!({"around": three, "limit": 2}), 1, 3),
            (json!({"before": two}), 0, 1),
        ] {
            let got = ask(&client, "general", body.clone()).await;
            assert_eq!(shown(&got), wanted[from..to], "{body} from {source}");
            assert_eq!(got.source, source, "{body}");
        }
    };
    check("both").await;
    world.postgres().stop().await;
    eventually("PostgreSQL is missed", SOON, async || {
        (ask(&client, "general", json!({})).await.source == "log").then_some(())
    })
    .await;
    check("log").await;
    world.postgres().start().await;
    let worker = world.spawn("persist-message").await;
    settled(&world).await;
    eventually("the ack floor is asked again", SOON, async || {
        (ask(&client, "general", json!({"before": four, "limit": 1}))
            .await
            .source
            == "index")
            .then_some(())
    })
    .await;
    check("index").await;
    // The message is stored, its deletion is not.
    assert!(worker.terminate().await.success());
    delete(&world, four, "b", "bob").await;
    assert_eq!(
        shown(&ask(&client, "general", json!({"limit": 1})).await),
        [(four, "", true)]
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_duplicate_of_a_deleted_message_is_not_shown() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    let body = json!({"user": "ann", "text": "secret", "id": "a"}).to_string();
    let first = publish_body(&client, "chat.general", &body).await;
    delete(&world, first, "a", "ann").await;
    publish_body(&client, "chat.general", &body).await;
    assert_eq!(
        shown(&ask(&client, "general", json!({})).await),
        [(first, "", true)]
    );
    let _worker = world.spawn("persist-message").await;
    settled(&world).await;
    publish_body(&client, "chat.general", &body).await;
    assert_eq!(
        shown(&ask(&client, "general", json!({})).await),
        [(first, "", true)]
    );
    function.stop().await.unwrap();
}
