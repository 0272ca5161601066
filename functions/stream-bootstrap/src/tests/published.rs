//! Stream and database are lost, and the events are kept: later messages are published too.

use async_nats::Client;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::sequence_guard::{body, entries, publish, texts};
use super::{SOON, api, ask, bare, check, start, stream_with};
use protocol::endpoints::READ;
use protocol::header;
use testing::{World, eventually};

/// The header of the last event that says up to where the stream is published, and its value.
async fn last_event(admin: &Client) -> Option<(&'static str, u64)> {
    let stream = async_nats::jetstream::new(admin.clone())
        .get_stream(protocol::subject::EVENTS_STREAM)
        .await
        .unwrap();
    let last = stream
        .get_last_raw_message_by_subject(protocol::subject::EVENTS)
        .await
        .ok()?;
    let value = |name| Some((name, last.headers.get(name)?.as_str().parse().unwrap()));
    value(header::SEQUENCE).or_else(|| value(header::PUBLISHED_THROUGH))
}

async fn published(admin: &Client, wanted: (&'static str, u64)) {
    eventually("it is published", SOON, async || {
        (last_event(admin).await == Some(wanted)).then_some(())
    })
    .await;
}

async fn lose_stream_and_database(admin: &Client, database: &PgPool) {
    api(admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    sqlx::raw_sql("drop schema public cascade; create schema public")
        .execute(database)
        .await
        .unwrap();
}

/// Runs a worker and a relay until `wanted` is published.
async fn publish_events(world: &World, admin: &Client, wanted: u64) {
    let (worker, relay) = tokio::join!(world.spawn("persist-message"), world.spawn("relay-outbox"));
    published(admin, (header::SEQUENCE, wanted)).await;
    assert!(worker.terminate().await.success() && relay.terminate().await.success());
}

#[tokio::test]
async fn a_stream_continues_above_what_is_published() {
    let world = bare().await;
    let admin = world.client("administrator").await;
    let database = world.database().await;
    start(&world).await.unwrap().stop().await.unwrap();
    for text in ["one", "two", "three"] {
        publish(&admin, "chat.general", &[], &body("ann", text)).await;
    }
    publish_events(&world, &admin, 3).await;

    lose_stream_and_database(&admin, &database).await;
    let running = start(&world).await.unwrap();
    assert_eq!(
        publish(&admin, "chat.general", &[], &body("ann", "four")).await,
        4
    );
    let found = check(&world).await;
    assert!(found.ok, "{found:?}");
    running.stop().await.unwrap();
    publish_events(&world, &admin, 4).await;

    // The last event is a receipt, and somebody recreates the stream by hand before we do.
    let (relay, receipts) =
        tokio::join!(world.spawn("relay-outbox"), world.spawn("track-receipts"));
    let reader = world.client("publisher").await;
    let marked: Value = ask(
        &reader,
        READ.subject(&["bob", "general"]),
        json!({"through": 2}),
    )
    .await;
    assert_eq!(marked["moved"], true, "{marked}");
    published(&admin, (header::PUBLISHED_THROUGH, 4)).await;
    assert!(relay.terminate().await.success() && receipts.terminate().await.success());
    lose_stream_and_database(&admin, &database).await;
    api(
        &admin,
        "STREAM.CREATE.CHAT_MESSAGES",
        stream_with(json!({})),
    )
    .await;
    assert_eq!(
        publish(&admin, "chat.general", &[], &body("ann", "five")).await,
        1
    );
    start(&world).await.unwrap().stop().await.unwrap();
    assert_eq!(
        publish(&admin, "chat.general", &[], &body("ann", "six")).await,
        6
    );
    assert_eq!(texts(&entries(&admin).await), [(5, "five"), (6, "six")]);
    publish_events(&world, &admin, 6).await;
    let stored: Vec<i64> = sqlx::query_scalar("select seq from messages order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(stored, [5, 6]);
}

#[tokio::test]
async fn a_check_reports_a_stream_below_what_is_published() {
    let world = bare().await;
    let admin = world.client("administrator").await;
    let running = start(&world).await.unwrap();
    publish(&admin, "chat.general", &[], &body("ann", "one")).await;
    publish(
        &admin,
        "events.v1.chat.general",
        &[(header::SEQUENCE, "0000000000000000700")],
        "{}",
    )
    .await;
    let found = check(&world).await;
    assert_eq!(
        (
            found.ok,
            found.fence.unwrap().last,
            found.fence.unwrap().stored
        ),
        (false, 1, 700)
    );
    running.stop().await.unwrap();
}
