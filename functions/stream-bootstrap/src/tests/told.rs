//! Log and database lost, the events kept: what is said next is told, too.

use async_nats::Client;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::fence::{body, entries, publish, texts};
use super::{SOON, api, ask, bare, check, log_with, start};
use protocol::endpoints::READ;
use protocol::header;
use testing::{World, eventually};

/// Up to where the last event says that the log is told, and how it says so.
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

async fn told(admin: &Client, wanted: (&'static str, u64)) {
    eventually("it is told", SOON, async || {
        (last_event(admin).await == Some(wanted)).then_some(())
    })
    .await;
}

async fn lose_log_and_database(admin: &Client, database: &PgPool) {
    api(admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    sqlx::raw_sql("drop schema public cascade; create schema public")
        .execute(database)
        .await
        .unwrap();
}

/// A worker and a relay, until what the log has is told.
async fn tell(world: &World, admin: &Client, wanted: u64) {
    let (worker, relay) = tokio::join!(world.spawn("persist-message"), world.spawn("relay-outbox"));
    told(admin, (header::SEQUENCE, wanted)).await;
    assert!(worker.terminate().await.success() && relay.terminate().await.success());
}

#[tokio::test]
async fn a_log_goes_on_above_what_is_told() {
    let world = bare().await;
    let (admin, database) = (world.client("administrator").await, world.database().await);
    start(&world).await.unwrap().stop().await.unwrap();
    for text in ["one", "two", "three"] {
        publish(&admin, "chat.general", &[], &body("ann", text)).await;
    }
    tell(&world, &admin, 3).await;

    lose_log_and_database(&admin, &database).await;
    let running = start(&world).await.unwrap();
    assert_eq!(
        publish(&admin, "chat.general", &[], &body("ann", "four")).await,
        4
    );
    let found = check(&world).await;
    assert!(found.ok, "{found:?}");
    running.stop().await.unwrap();
    tell(&world, &admin, 4).await;

    // The last event is a receipt's, and somebody was faster than we and made the log by hand.
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
    told(&admin, (header::PUBLISHED_THROUGH, 4)).await;
    assert!(relay.terminate().await.success() && receipts.terminate().await.success());
    lose_log_and_database(&admin, &database).await;
    api(&admin, "STREAM.CREATE.CHAT_MESSAGES", log_with(json!({}))).await;
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
    tell(&world, &admin, 6).await;
    let stored: Vec<i64> = sqlx::query_scalar("select seq from messages order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(stored, [5, 6]);
}

#[tokio::test]
async fn a_check_says_that_the_log_is_below_what_is_told() {
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
