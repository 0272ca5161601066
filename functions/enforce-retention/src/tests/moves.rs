//! Moves of marks go when nobody can ask about them any more, and not before.

use super::*;
use protocol::endpoints::{DELIVERED, DM_HISTORY, DM_READ, READ};

async fn mark(client: &Client, subject: String, through: u64) {
    let marked = ask(client, subject, json!({ "through": through })).await;
    assert_eq!(marked["moved"], true, "{marked}");
}

/// Reader, room and position of every move.
async fn moves(database: &PgPool) -> Vec<(String, Option<String>, i64)> {
    sqlx::query_as("select reader, room, through from receipt_moves order by reader, room, through")
        .fetch_all(database)
        .await
        .unwrap()
}

fn of(reader: &str, room: Option<&str>, through: i64) -> (String, Option<String>, i64) {
    (reader.to_owned(), room.map(str::to_owned), through)
}

/// Makes all that was done so far so many days older.
async fn age_all(database: &PgPool, days: i32) {
    age(database, 1_000_000, days).await;
    sqlx::query("update receipt_moves set at = at - $1 * interval '1 day'")
        .bind(days)
        .execute(database)
        .await
        .unwrap();
}

/// What history says of the messages of ann to bob: position, and whether it says when they were delivered and read.
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

#[tokio::test]
async fn a_move_goes_when_all_it_reached_is_gone() {
    let world = World::start().await;
    let (client, database) = (world.client("publisher").await, world.database().await);
    let (_history, _receipts) =
        tokio::join!(world.spawn("get-history"), world.spawn("track-receipts"));
    say(&client, "dm.ann.bob", 4).await;
    say(&client, "chat.general", 2).await;
    say(&client, "chat.forever", 1).await;
    store(&world).await;
    for through in [2, 3] {
        mark(&client, DELIVERED.subject(&["bob"]), through).await;
        mark(&client, DM_READ.subject(&["bob", "ann"]), through).await;
    }
    mark(&client, READ.subject(&["bob", "general"]), 5).await;
    mark(&client, READ.subject(&["bob", "forever"]), 7).await;
    sqlx::raw_sql("insert into retention values ('forever', null)")
        .execute(&database)
        .await
        .unwrap();
    age_all(&database, 31).await;
    // Of what was said later, some is not stored yet.
    say(&client, "dm.ann.bob", 1).await;
    store(&world).await;
    say(&client, "chat.general", 1).await;
    mark(&client, DELIVERED.subject(&["bob"]), 8).await;
    mark(&client, READ.subject(&["bob", "general"]), 9).await;
    // As if the second message were kept longer than the first.
    sqlx::raw_sql("update messages set received_at = now() where seq in (3, 4)")
        .execute(&database)
        .await
        .unwrap();
    let all = moves(&database).await;

    let before = shown(&client).await;
    assert_eq!(
        before,
        [(3, true, true), (4, true, false), (8, true, false)]
    );
    let running = start(&world, &[SELDOM]).await;
    eventually("messages are swept", SOON, async || {
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
    eventually("moves are swept", SOON, async || {
        (moves(&database).await == left).then_some(())
    })
    .await;
    assert_eq!(all.len(), left.len() + 3);
    assert_eq!(shown(&client).await, before, "and nobody notices");
    let marks: Vec<(String, i64)> = sqlx::query_as("select room, read from receipts order by room")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(
        marks,
        [
            ("dm.ann.bob".to_owned(), 3),
            ("forever".to_owned(), 7),
            ("general".to_owned(), 9)
        ],
        "positions stay"
    );

    // Everything expires, also what is in the log only.
    age_all(&database, 31).await;
    assert_eq!(
        (run(&world, true).await.moves, moves(&database).await.len()),
        (1, 5),
        "where messages are swept already"
    );
    let done = run(&world, false).await;
    assert_eq!((done.expired, done.moves), (3, 4));
    assert_eq!(moves(&database).await, [of("bob", Some("forever"), 7)]);
    running.stop().await.unwrap();
}

/// Conversations with days of their own keep the moves of the two, and nobody else's.
#[tokio::test]
async fn a_conversation_that_is_kept_keeps_its_moves() {
    let world = World::start().await;
    let (client, database) = (world.client("publisher").await, world.database().await);
    let _receipts = world.spawn("track-receipts").await;
    say(&client, "dm.ann.bob", 1).await;
    say(&client, "dm.ann.zoe", 1).await;
    for reader in ["bob", "zoe"] {
        mark(&client, DELIVERED.subject(&[reader]), 2).await;
        mark(&client, DM_READ.subject(&[reader, "ann"]), 2).await;
    }
    sqlx::raw_sql("insert into retention values ('dm.ann.bob', null)")
        .execute(&database)
        .await
        .unwrap();
    // Nothing of it is stored, and the moves are needed all the same.
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
        moves(&database).await,
        [of("bob", Some("dm.ann.bob"), 2), of("bob", None, 2)]
    );
    running.stop().await.unwrap();
}

/// More of them than one step takes, of few marks and of many.
#[tokio::test]
async fn many_go_step_by_step() {
    let world = World::start().await;
    let database = world.database().await;
    sqlx::raw_sql(
        "insert into rooms (name) values ('general');
         insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
         select 12000, id, 'ann', 'last', false, 'kept', now(), now() from rooms;
         insert into users (name, delivered) select 'user-' || n, 3 from generate_series(1, 1200) as n;
         insert into receipts select 'user-' || n, 'general', 3 from generate_series(1, 1200) as n;
         insert into receipts values ('bob', 'general', 13000);
         insert into receipt_moves
         select 'user-' || n, case kind when 'read' then 'general' end, kind, through, now() - interval '40 days'
           from generate_series(1, 1200) as n, generate_series(1, 3) as through, unnest(array['read', 'delivered']) as kind;
         insert into receipt_moves
         select 'bob', 'general', 'read', through, now() - interval '40 days' from generate_series(1, 13000) as through;
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
    eventually("moves are swept", SOON, async || {
        (count(&database, "receipt_moves").await == 1_001).then_some(())
    })
    .await;
    sqlx::raw_sql(
        "insert into receipt_moves select 'user-7', 'general', 'read', n, now() - interval '40 days' from generate_series(1, 11000) as n",
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
