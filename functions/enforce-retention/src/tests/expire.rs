//! Expired messages vanish at their time, for every reader, and do not come back.

use super::*;
use protocol::endpoints::{BOOTSTRAP_AUDIT, BOOTSTRAP_REPLAY, DM_HISTORY};

fn deletion(target: u64, room_user: &str, received: i64) -> Value {
    json!({
        "type": "delete", "target": target, "id": format!("seq:{target}"), "derived": true,
        "user": room_user, "timestamp": 1, "received": received, "mode": "soft", "by": room_user,
    })
}

fn now_ms() -> i64 {
    i64::try_from(
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_millis(),
    )
    .unwrap()
}

/// Four messages each in `general` (1 to 4), `forever` (5 to 8) and `short` (9 to 12), two direct
/// ones, two deletions; all stored.
async fn fill(world: &World, client: &Client, database: &PgPool) {
    for room in ["general", "forever", "short"] {
        publish_texts(client, &format!("chat.{room}"), 4).await;
    }
    publish_texts(client, "dm.ann.bob", 2).await;
    let bootstrap = world.client("stream-bootstrap").await;
    for target in [1, 4] {
        let deletion = deletion(target, "ann", now_ms());
        publish(&bootstrap, "change.chat.general", deletion).await;
    }
    store(world).await;
    sqlx::raw_sql("insert into retention values ('forever', null), ('short', 2), ('dm.*', 60)")
        .execute(database)
        .await
        .unwrap();
}

async fn shown(client: &Client, room: &str) -> Vec<u64> {
    seqs(&history(client, room, json!({})).await)
}

async fn shown_direct(client: &Client) -> usize {
    let messages = ask(client, DM_HISTORY.subject(&["ann", "bob"]), json!({})).await;
    messages.as_array().unwrap().len()
}

#[tokio::test]
async fn expired_messages_vanish_before_they_are_deleted() {
    let world = World::start().await;
    let (_history, _sync) = tokio::join!(world.spawn("get-history"), world.spawn("sync-messages"));
    let client = world.client("publisher").await;
    let database = world.database().await;
    fill(&world, &client, &database).await;
    assert_eq!(shown(&client, "general").await, [1, 2, 3, 4]);
    assert_eq!(sync(&client, "general", 0).await.changes.len(), 2);
    age(&database, 2, 31).await;
    age(&database, 14, 3).await;
    assert_eq!(shown(&client, "general").await, [3, 4], "34 days of 30");
    assert_eq!(shown(&client, "short").await, [0_u64; 0], "3 days of 2");
    assert_eq!(shown(&client, "forever").await, [5, 6, 7, 8]);
    age(&database, 14, 28).await;
    assert_eq!(shown(&client, "general").await, [0_u64; 0], "31 days of 30");
    assert_eq!(shown(&client, "forever").await, [5, 6, 7, 8]);
    assert_eq!(shown_direct(&client).await, 2, "31 days of 60");
    sqlx::raw_sql("update retention set days = 31 where room = 'dm.*'")
        .execute(&database)
        .await
        .unwrap();
    assert_eq!(shown_direct(&client).await, 0);
    let page = sync(&client, "general", 0).await;
    assert_eq!((page.messages.len(), page.changes.len()), (0, 0));
    assert_eq!((page.through.get(), page.more), (16, false));
    let new = json!({"user": "ann", "text": "new"});
    assert_eq!(publish(&client, "chat.general", new).await, 17);
    check_cursors(&client).await;
    store(&world).await;
    check_cursors(&client).await;
    check_deletion(&world, &client, &database).await;
}

/// Cursors before, among and after what has expired find the only message that has not.
async fn check_cursors(client: &Client) {
    for cursor in [
        json!({"after": 0}),
        json!({"after": 2}),
        json!({"around": 3}),
        json!({"before": 18}),
        json!({}),
    ] {
        let page = history(client, "general", cursor.clone()).await;
        assert_eq!(seqs(&page), [17], "{cursor}");
    }
    let page = sync(client, "general", 2).await;
    assert_eq!(seqs(&page.messages), [17]);
    assert_eq!((page.changes.len(), page.through.get()), (0, 17));
}

/// Until now the expired rows existed. Deletes them.
async fn check_deletion(world: &World, client: &Client, database: &PgPool) {
    let expired: i64 = sqlx::query_scalar("select sum(messages)::bigint from expired_messages")
        .fetch_one(database)
        .await
        .unwrap();
    assert_eq!(expired, 10);
    let running = start(world, &[SELDOM]).await;
    eventually("they are deleted", SOON, async || {
        (count(database, "messages").await == 5).then_some(())
    })
    .await;
    assert_eq!(run(world, true).await.expired, 0);
    assert_eq!(count(database, "changes").await, 0);
    let kept: Vec<(String, i64)> =
        sqlx::query_as("select room, messages from kept_messages order by room")
            .fetch_all(database)
            .await
            .unwrap();
    assert_eq!(kept, [("forever".to_owned(), 4), ("general".to_owned(), 1)]);
    let page = history(client, "general", json!({"after": 0})).await;
    assert_eq!(seqs(&page), [17]);
    assert_eq!(sync(client, "general", 3).await.through.get(), 17);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn what_the_stream_holds_expires_all_the_same() {
    let world = World::start().await;
    let _history = world.spawn("get-history").await;
    let _sync = world.spawn("sync-messages").await;
    let database = world.database().await;
    let client = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    publish_texts(&client, "chat.general", 5).await;
    let received = now_ms();
    expire_now(&database, "general").await;
    // Deletions of expired messages: one whose message exists, and one whose message was erased
    // before it was stored.
    publish(
        &bootstrap,
        "change.chat.general",
        deletion(2, "ann", received - 5_000),
    )
    .await;
    let eraser = world.client("enforce-retention").await;
    ask(
        &eraser,
        js_api::MESSAGE_DELETE.to_owned(),
        json!({ "seq": 3 }),
    )
    .await;
    publish(
        &bootstrap,
        "change.chat.general",
        deletion(3, "ann", received - 5_000),
    )
    .await;
    publish_texts(&client, "chat.general", 2).await;
    publish_texts(&client, "chat.other", 1).await;
    for stored in [false, true] {
        if stored {
            store(&world).await;
        }
        assert_eq!(
            seqs(&history(&client, "general", json!({})).await),
            [8, 9],
            "stored: {stored}"
        );
        assert_eq!(
            seqs(&history(&client, "general", json!({"after": 0})).await),
            [8, 9]
        );
        let page = sync(&client, "general", 0).await;
        assert_eq!(
            (seqs(&page.messages), page.changes.len(), page.through.get()),
            (vec![8, 9], 0, 10),
            "stored: {stored}"
        );
        assert_eq!(seqs(&history(&client, "other", json!({})).await), [10]);
    }
}

#[tokio::test]
async fn a_replay_brings_nothing_back() {
    let world = World::builder().administrator().start().await;
    let (_history, _bootstrap, _worker) = tokio::join!(
        world.spawn("get-history"),
        world.spawn("stream-bootstrap"),
        world.spawn("persist-message")
    );
    let client = world.client("publisher").await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    publish_texts(&client, "chat.general", 20).await;
    // The same message twice: the duplicate expires later than the first one, and must not be
    // stored in its place.
    let twice = json!({"user": "ann", "text": "twice", "id": "twice"});
    publish(&client, "chat.general", twice.clone()).await;
    settled(&world).await;
    expire_now(&database, "general").await;
    publish(&client, "chat.general", twice.clone()).await;
    let new = json!({"user": "ann", "text": "new"});
    publish(&client, "chat.general", new).await;
    settled(&world).await;
    assert_eq!(count(&database, "duplicates").await, 1);
    let running = start(&world, &[SELDOM]).await;
    let deleted = async || {
        (count(&database, "messages").await == 1 && count(&database, "duplicates").await == 0)
            .then_some(())
    };
    eventually("they are deleted", SOON, deleted).await;
    assert!(
        !in_stream(&world, 22).await,
        "the duplicate is erased with the first one"
    );
    let audit =
        async || ask(&operator, BOOTSTRAP_AUDIT.subject(&[]), json!({})).await["counts"].clone();
    let counts = audit().await;
    assert_eq!(
        (&counts["expired"], &counts["stored"], &counts["missing"]),
        (&json!(21), &json!(1), &json!(0)),
        "{counts}"
    );

    let reply = ask(&operator, BOOTSTRAP_REPLAY.subject(&[]), json!({"from": 0})).await;
    assert_eq!(reply["through"], 23, "{reply}");
    eventually("it is delivered again", SOON, async || {
        (count(&database, "messages").await == 22).then_some(())
    })
    .await;
    assert_eq!(seqs(&history(&client, "general", json!({})).await), [23]);
    settled(&world).await;
    assert_eq!(
        (
            run(&world, false).await.expired,
            count(&database, "messages").await
        ),
        (21, 1),
        "and deleted again"
    );

    // The id can be used again.
    let another = json!({"user": "ann", "text": "another", "id": "twice"});
    publish(&client, "chat.general", another).await;
    settled(&world).await;
    assert_eq!(
        history(&client, "general", json!({})).await[1].text,
        "another"
    );

    check_recreated_stream(&world, &client, &database).await;
    running.stop().await.unwrap();
}

/// A recreated stream does not assign the sequences of expired messages again.
async fn check_recreated_stream(world: &World, client: &Client, database: &PgPool) {
    expire_now(database, "general").await;
    assert_eq!(run(world, false).await.expired, 2);
    assert_eq!(count(database, "messages").await, 0);
    ask(
        &world.client("administrator").await,
        jetstream::api::stream("DELETE", protocol::subject::STREAM),
        json!({}),
    )
    .await;
    let next = eventually("the stream is there again", SOON, async || {
        let reply = client
            .request(
                "chat.general",
                json!({"user": "ann", "text": "first"}).to_string().into(),
            )
            .await
            .ok()?;
        serde_json::from_slice::<Value>(&reply.payload).ok()?["seq"].as_u64()
    })
    .await;
    assert_eq!(next, 25);
}
