//! Trims the stream: never what is not stored, never what is to be kept, and readers do not notice.

use super::*;
use protocol::endpoints::SEND;
use protocol::send::SendAck;

#[tokio::test]
async fn a_stopped_worker_stops_trimming() {
    let world = World::start().await;
    let running = start(&world, &KEEP_NOTHING).await;
    let publisher = world.client("publisher").await;
    publish_texts(&publisher, "chat.general", 50).await;
    assert_eq!(run(&world, false).await.trimmed, 0, "nothing is stored");
    store(&world).await;
    publish_texts(&publisher, "chat.general", 30).await;
    assert_eq!(
        (run(&world, true).await.trimmed, range(&world).await),
        (50, (1, 80)),
        "a dry run does nothing"
    );
    assert_eq!(
        (run(&world, false).await.trimmed, range(&world).await),
        (50, (51, 80))
    );
    assert_eq!(run(&world, false).await.trimmed, 0);
    // Everything is trimmed: the next sequence stays the same.
    store(&world).await;
    assert_eq!(
        (run(&world, false).await.trimmed, range(&world).await),
        (30, (81, 80))
    );
    assert_eq!(
        publish(
            &publisher,
            "chat.general",
            json!({"user": "ann", "text": "next"})
        )
        .await,
        81
    );
    running.stop().await.unwrap();
}

#[tokio::test]
async fn the_newest_messages_and_days_stay() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    publish_texts(&publisher, "chat.general", 50).await;
    store(&world).await;
    let running = start(
        &world,
        &[("TRIM_KEEP_MESSAGES", "0"), ("TRIM_KEEP_DAYS", "1"), SELDOM],
    )
    .await;
    assert_eq!(run(&world, false).await.trimmed, 0, "none is a day old");
    running.stop().await.unwrap();
    // Where messages were erased, twenty messages span more than twenty sequences.
    let eraser = world.client("enforce-retention").await;
    for seq in [35, 40, 45] {
        assert_eq!(
            ask(
                &eraser,
                js_api::MESSAGE_DELETE.to_owned(),
                json!({ "seq": seq })
            )
            .await["success"],
            true
        );
    }
    let running = start(
        &world,
        &[
            ("TRIM_KEEP_MESSAGES", "20"),
            ("TRIM_KEEP_DAYS", "0"),
            SELDOM,
        ],
    )
    .await;
    eventually("it is trimmed by itself", SOON, async || {
        (range(&world).await == (28, 50)).then_some(())
    })
    .await;
    running.stop().await.unwrap();
}

#[tokio::test]
async fn an_empty_database_needs_the_stream() {
    let world = World::start().await;
    let database = world.database().await;
    publish_texts(&world.client("publisher").await, "chat.general", 20).await;
    store(&world).await;
    // A stream-bootstrap is at work, so the range of stored messages may shrink.
    let mut bootstrap = database.acquire().await.unwrap();
    sqlx::query("select pg_advisory_lock($1)")
        .bind(crate::trim::BOOTSTRAP_LOCK)
        .execute(&mut *bootstrap)
        .await
        .unwrap();
    let running = start(&world, &KEEP_NOTHING).await;
    let found = run(&world, false).await;
    assert_eq!((found.trimmed, found.more), (0, true));
    sqlx::raw_sql("truncate messages")
        .execute(&database)
        .await
        .unwrap();
    sqlx::query("select pg_advisory_unlock_all()")
        .execute(&mut *bootstrap)
        .await
        .unwrap();
    let found = run(&world, false).await;
    assert_eq!(
        (found.trimmed, found.more, range(&world).await),
        (0, false, (1, 20))
    );
    running.stop().await.unwrap();
}

#[tokio::test]
async fn readers_do_not_notice_that_the_stream_is_trimmed() {
    let world = World::start().await;
    let (_history, _sync, _send) = tokio::join!(
        world.spawn("get-history"),
        world.spawn("sync-messages"),
        world.spawn_with("send-message", &[("SEND_BURST", "1000")])
    );
    let client = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let send = async || {
        let reply = ask(
            &client,
            SEND.subject(&["ann", "general"]),
            json!({"text": "hello", "id": "a-1"}),
        )
        .await;
        serde_json::from_value::<SendAck>(reply.clone())
            .unwrap_or_else(|error| panic!("{error}: {reply}"))
    };
    let sent = send().await;
    publish_texts(&client, "chat.general", 40).await;
    let deletion = json!({
        "type": "delete", "target": 10, "id": "seq:10", "derived": true, "user": "ann",
        "timestamp": 1, "received": 1, "mode": "soft", "by": "ann",
    });
    publish(&bootstrap, "change.chat.general", deletion).await;
    store(&world).await;
    publish_texts(&client, "chat.general", 5).await;
    let pages = async || {
        let cursors = [
            json!({"limit": 10}),
            json!({"after": 0}),
            json!({"after": 7}),
            json!({"before": 20}),
            json!({"around": 10}),
        ];
        let mut pages = Vec::new();
        for cursor in cursors {
            pages.push(history(&client, "general", cursor).await);
        }
        (
            pages,
            sync(&client, "general", 0).await,
            sync(&client, "general", 12).await,
        )
    };
    let before = pages().await;
    assert_eq!((before.1.messages.len(), before.1.changes.len()), (46, 1));
    let running = start(&world, &KEEP_NOTHING).await;
    eventually("all that is stored is trimmed", SOON, async || {
        (range(&world).await == (43, 47)).then_some(())
    })
    .await;
    assert_eq!(pages().await, before);
    let again = send().await;
    assert_eq!(
        (again.seq, again.duplicate),
        (sent.seq, true),
        "and an id is known for ever"
    );
    running.stop().await.unwrap();
}
