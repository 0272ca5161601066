//! Entries of the receipt history are deleted when nobody can ask about them any more, and not
//! before.

use super::*;
use protocol::endpoints::{DELIVERED, DM_HISTORY, DM_READ, READ};

async fn advance_cursor(client: &Client, subject: String, through: u64) {
    let reply = ask(client, subject, json!({ "through": through })).await;
    assert_eq!(reply["moved"], true, "{reply}");
}

/// Reader, room and sequence of every entry.
async fn entries(database: &PgPool) -> Vec<(String, Option<String>, i64)> {
    sqlx::query_as("select reader, room, through from receipt_moves order by reader, room, through")
        .fetch_all(database)
        .await
        .unwrap()
}

fn of(reader: &str, room: Option<&str>, through: i64) -> (String, Option<String>, i64) {
    (reader.to_owned(), room.map(str::to_owned), through)
}

/// Makes everything so far older by `days`.
async fn age_all(database: &PgPool, days: i32) {
    age(database, 1_000_000, days).await;
    sqlx::query("update receipt_moves set at = at - $1 * interval '1 day'")
        .bind(days)
        .execute(database)
        .await
        .unwrap();
}

/// What history returns of ann's messages to bob: the sequence, and whether it has the times of
/// delivery and of reading.
async fn shown(client: &Client) -> Vec<(u64, bool, bool)> {
    let messages = ask(
        client,
        DM_HISTORY.subject(&["ann", "bob"]),
        json!({"receipts": true}),
    )
    .await;
    let shown = |message: &Value| {
        (
            message["seq"].as_u64().unwrap(),
            message["deliveredAt"].is_u64(),
            message["readAt"].is_u64(),
        )
    };
    messages.as_array().unwrap().iter().map(shown).collect()
}

/// Messages and cursors of bob, made older by 31 days, and then later ones.
async fn fill(world: &World, client: &Client, database: &PgPool) {
    publish_texts(client, "dm.ann.bob", 4).await;
    publish_texts(client, "chat.general", 2).await;
    publish_texts(client, "chat.forever", 1).await;
    store(world).await;
    for through in [2, 3] {
        advance_cursor(client, DELIVERED.subject(&["bob"]), through).await;
        advance_cursor(client, DM_READ.subject(&["bob", "ann"]), through).await;
    }
    advance_cursor(client, READ.subject(&["bob", "general"]), 5).await;
    advance_cursor(client, READ.subject(&["bob", "forever"]), 7).await;
    sqlx::raw_sql("insert into retention values ('forever', null)")
        .execute(database)
        .await
        .unwrap();
    age_all(database, 31).await;
    // Later messages, of which some are not stored yet.
    publish_texts(client, "dm.ann.bob", 1).await;
    store(world).await;
    publish_texts(client, "chat.general", 1).await;
    advance_cursor(client, DELIVERED.subject(&["bob"]), 8).await;
    advance_cursor(client, READ.subject(&["bob", "general"]), 9).await;
    // As if these two messages were kept longer than the others.
    sqlx::raw_sql("update messages set received_at = now() where seq in (3, 4)")
        .execute(database)
        .await
        .unwrap();
}

#[tokio::test]
async fn an_entry_is_deleted_when_all_it_reached_is_gone() {
    let world = World::start().await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    let (_history, _receipts) =
        tokio::join!(world.spawn("get-history"), world.spawn("track-receipts"));
    fill(&world, &client, &database).await;
    let all = entries(&database).await;

    let before = shown(&client).await;
    assert_eq!(
        before,
        [(3, true, true), (4, true, false), (8, true, false)]
    );
    let running = start(&world, &[SELDOM]).await;
    eventually("messages are deleted", SOON, async || {
        (count(&database, "messages").await == 4).then_some(())
    })
    .await;
    let left = [
        of("bob", Some("dm.ann.bob"), 3),
        of("bob", Some("forever"), 7),
        of("bob", Some("general"), 9),
        of("bob", None, 3),
        of("bob", None, 8),
    ];
    eventually("receipt history is deleted", SOON, async || {
        (entries(&database).await == left).then_some(())
    })
    .await;
    assert_eq!(all.len(), left.len() + 3);
    assert_eq!(shown(&client).await, before, "and nobody notices");
    let cursors: Vec<(String, i64)> =
        sqlx::query_as("select room, read from receipts order by room")
            .fetch_all(&database)
            .await
            .unwrap();
    assert_eq!(
        cursors,
        [
            ("dm.ann.bob".to_owned(), 3),
            ("forever".to_owned(), 7),
            ("general".to_owned(), 9)
        ],
        "the cursors stay"
    );

    // Everything expires, also what is only in the stream.
    age_all(&database, 31).await;
    assert_eq!(
        (
            run(&world, true).await.moves,
            entries(&database).await.len()
        ),
        (1, 5),
        "where messages are deleted already"
    );
    let done = run(&world, false).await;
    assert_eq!((done.expired, done.moves), (3, 4));
    assert_eq!(entries(&database).await, [of("bob", Some("forever"), 7)]);
    running.stop().await.unwrap();
}

/// A conversation with a retention of its own keeps the entries of its two users, and no others.
#[tokio::test]
async fn a_conversation_that_is_kept_keeps_its_receipt_history() {
    let world = World::start().await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    let _receipts = world.spawn("track-receipts").await;
    publish_texts(&client, "dm.ann.bob", 1).await;
    publish_texts(&client, "dm.ann.zoe", 1).await;
    for reader in ["bob", "zoe"] {
        advance_cursor(&client, DELIVERED.subject(&[reader]), 2).await;
        advance_cursor(&client, DM_READ.subject(&[reader, "ann"]), 2).await;
    }
    sqlx::raw_sql("insert into retention values ('dm.ann.bob', null)")
        .execute(&database)
        .await
        .unwrap();
    // The messages are not stored, and the entries are needed all the same.
    let running = start(&world, &[SELDOM]).await;
    assert_eq!(
        (
            run(&world, false).await.moves,
            run(&world, true).await.moves
        ),
        (0, 0)
    );
    age_all(&database, 31).await;
    assert_eq!(run(&world, false).await.moves, 2);
    assert_eq!(
        entries(&database).await,
        [of("bob", Some("dm.ann.bob"), 2), of("bob", None, 2)]
    );
    running.stop().await.unwrap();
}

/// More entries than one step deletes, of few cursors and of many.
#[tokio::test]
async fn many_go_step_by_step() {
    let world = World::start().await;
    let database = world.database().await;
    sqlx::raw_sql(
        "insert into rooms (name) values ('general');
         insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
         select 12000, id, 'ann', 'last', false, 'kept', now(), now() from rooms;
         insert into users (name, delivered)
         select 'user-' || n, 3 from generate_series(1, 1200) as n;
         insert into receipts select 'user-' || n, 'general', 3 from generate_series(1, 1200) as n;
         insert into receipts values ('bob', 'general', 13000);
         insert into receipt_moves
         select 'user-' || n, case kind when 'read' then 'general' end, kind, through,
                now() - interval '40 days'
           from generate_series(1, 1200) as n, generate_series(1, 3) as through,
                unnest(array['read', 'delivered']) as kind;
         insert into receipt_moves
         select 'bob', 'general', 'read', through, now() - interval '40 days'
           from generate_series(1, 13000) as through;
         analyze",
    )
    .execute(&database)
    .await
    .unwrap();
    let running = start(
        &world,
        &[
            ("REQUEST_DEADLINE_MS", "60000"),
            ("RETENTION_INTERVAL_MS", "3600000"),
        ],
    )
    .await;
    eventually("receipt history is deleted", SOON, async || {
        (count(&database, "receipt_moves").await == 1_001).then_some(())
    })
    .await;
    sqlx::raw_sql(
        "insert into receipt_moves
         select 'user-7', 'general', 'read', n, now() - interval '40 days'
           from generate_series(1, 11000) as n",
    )
    .execute(&database)
    .await
    .unwrap();
    assert_eq!(
        (
            run(&world, true).await.moves,
            run(&world, false).await.moves
        ),
        (11_000, 11_000)
    );
    assert_eq!(
        (
            count(&database, "receipt_moves").await,
            count(&database, "receipts").await
        ),
        (1_001, 1_201)
    );
    running.stop().await.unwrap();
}
