//! Everybody who sends or is sent something is a user from then on.

use super::*;

type User = (String, bool, bool);

/// Name, whether `last_seen` is recent, and whether `first_seen` is.
async fn users(database: &PgPool) -> Vec<User> {
    let recent = "select name, last_seen > now() - interval '30 seconds',
      first_seen > now() - interval '30 seconds' from users order by name";
    sqlx::query_as(recent).fetch_all(database).await.unwrap()
}

fn user(name: &str, last: bool, first: bool) -> User {
    (name.to_owned(), last, first)
}

#[tokio::test]
async fn a_sender_is_a_user_and_costs_a_row_a_minute() {
    let world = World::start().await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    let said = async |subject: &str, from: &str| {
        publish(
            &client,
            subject,
            None,
            &json!({"user": from, "text": "hello"}).to_string(),
        )
        .await
    };
    let function = worker(&world).await;
    for _ in 0..3 {
        said("dm.bob.alice", "bob").await;
        said("chat.general", "zoe ü").await;
    }
    publish(&client, "chat.general", None, "nobody").await;
    settled(&world).await;
    assert_eq!(
        users(&database).await,
        [
            user("alice", true, true),
            user("bob", true, true),
            user("zoe ü", true, true)
        ]
    );

    // Recorded by this replica: no write. By another one: once.
    sqlx::query(
        "update users set last_seen = now() - interval '5 minutes',
      first_seen = now() - interval '5 minutes'",
    )
    .execute(&database)
    .await
    .unwrap();
    said("dm.bob.alice", "bob").await;
    settled(&world).await;
    assert_eq!(
        users(&database).await,
        [
            user("alice", false, false),
            user("bob", false, false),
            user("zoe ü", false, false)
        ]
    );
    function.stop().await.unwrap();
    let function = worker(&world).await;
    said("dm.carol.bob", "carol").await;
    settled(&world).await;
    let seen = [
        user("alice", false, false),
        user("bob", true, false),
        user("carol", true, true),
        user("zoe ü", false, false),
    ];
    assert_eq!(users(&database).await, seen);
    function.stop().await.unwrap();
}
