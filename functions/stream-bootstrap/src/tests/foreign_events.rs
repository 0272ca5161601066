//! Messages in `CHAT_EVENTS` that are not events: JetStream's acknowledgements of messages whose
//! reply subject was one of the events' subjects.

use async_nats::Client;
use serde_json::{Value, json};

use super::sequence_guard::{body, publish};
use super::{api, apply, bare, check, start};
use protocol::header;
use testing::{RawClient, SOON, World, eventually};

async fn held(admin: &Client) -> u64 {
    let info: Value = api(admin, "STREAM.INFO.CHAT_EVENTS", json!({})).await;
    info["state"]["messages"].as_u64().unwrap()
}

/// Publishes to the stream, and has `number` acknowledgements sent to a subject of the events.
async fn acknowledge(world: &World, admin: &Client, number: usize) {
    let before = held(admin).await;
    let mut mallory = RawClient::connect(world.nats(), "publisher").await;
    for _ in 0..number {
        mallory
            .publish_raw(
                "chat.general",
                Some("events.v1.x"),
                None,
                body("mallory", "x").as_bytes(),
            )
            .await;
    }
    mallory.flush().await.unwrap();
    eventually("they are there", SOON, async || {
        (held(admin).await == before + number as u64).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_acknowledgement_among_the_events_is_found_and_removed() {
    let world = bare().await;
    let admin = world.client("administrator").await;
    let running = start(&world).await.unwrap();
    publish(
        &admin,
        "events.v1.chat.general",
        &[(header::SEQUENCE, "0000000000000000002")],
        "{}",
    )
    .await;
    acknowledge(&world, &admin, 700).await;
    let found = check(&world).await;
    let [difference] = &found.differences[..] else {
        panic!("{found:?}")
    };
    assert_eq!(
        (
            difference.object.as_str(),
            difference.field.as_str(),
            &difference.actual
        ),
        (
            "stream CHAT_EVENTS",
            "(messages that are no events)",
            &json!(700)
        )
    );
    // They do not change up to where the stream is published.
    assert_eq!(
        (
            found.ok,
            found.fence.unwrap().last,
            found.fence.unwrap().stored
        ),
        (false, 700, 2)
    );
    assert_eq!(
        apply(&world).await,
        ["stream CHAT_EVENTS: 700 messages that are no events were removed"]
    );
    assert_eq!(held(&admin).await, 1);
    assert!(check(&world).await.ok);
    running.stop().await.unwrap();
    // Also at start, and when the stream holds nothing else.
    api(&admin, "STREAM.PURGE.CHAT_EVENTS", json!({})).await;
    acknowledge(&world, &admin, 3).await;
    start(&world).await.unwrap().stop().await.unwrap();
    assert_eq!(held(&admin).await, 0);
}
