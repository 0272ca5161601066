//! Messages as they are stored.

use super::*;

#[tokio::test]
async fn a_message_is_stored_as_it_was_sent() {
    let world = World::start().await;
    let worker = worker(&world).await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let (seq, _) = publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"grüß dich","timestamp":1600000000123,"id":"a-1"}"#,
    )
    .await;
    publish(
        &publisher,
        "admin.alerts",
        None,
        r#"{"user":"root","text":"disk"}"#,
    )
    .await;
    publish(
        &publisher,
        "dm.bob.alice",
        None,
        r#"{"user":"bob","text":"psst"}"#,
    )
    .await;
    stored(&database, 3, SOON).await;
    type Stored = (
        i64,
        String,
        String,
        Option<String>,
        String,
        bool,
        String,
        i64,
    );
    let rows: Vec<Stored> = sqlx::query_as(
        "select m.seq, r.name, sender, recipient, m.id, derived, text,
          (extract(epoch from sent_at) * 1000)::bigint
           from messages m join rooms r on r.id = m.room_id order by seq",
    )
    .fetch_all(&database)
    .await
    .unwrap();
    let own = |row: usize| {
        (
            rows[row].1.as_str(),
            rows[row].2.as_str(),
            rows[row].3.as_deref(),
            rows[row].4.as_str(),
            rows[row].5,
        )
    };
    assert_eq!(own(0), ("general", "ann", None, "a-1", false));
    assert_eq!(
        (rows[0].0, rows[0].6.as_str(), rows[0].7),
        (seq as i64, "grüß dich", 1_600_000_000_123)
    );
    assert_eq!(
        own(1),
        (
            "__admin__",
            "root",
            None,
            format!("seq:{}", seq + 1).as_str(),
            true
        )
    );
    assert_eq!(
        own(2),
        (
            "dm.alice.bob",
            "bob",
            Some("alice"),
            format!("seq:{}", seq + 2).as_str(),
            true
        )
    );
    settled(&world).await;
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn an_id_is_stored_once_per_sender() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let body =
        |user: &str, text: &str| json!({"user": user, "text": text, "id": "same"}).to_string();
    let (first, _) = publish(
        &publisher,
        "chat.general",
        Some("ann:same"),
        &body("ann", "first"),
    )
    .await;
    // Inside JetStream's window the stream itself does not store it again.
    assert_eq!(
        publish(
            &publisher,
            "chat.general",
            Some("ann:same"),
            &body("ann", "again")
        )
        .await,
        (first, true)
    );
    // Outside of it, the header's id is as good as forgotten.
    publish(&publisher, "chat.general", None, &body("ann", "much later")).await;
    publish(
        &publisher,
        "chat.other",
        None,
        &body("ann", "in another room"),
    )
    .await;
    let (bobs, _) = publish(
        &publisher,
        "chat.general",
        None,
        &body("bob", "another sender"),
    )
    .await;
    let worker = worker(&world).await;
    settled(&world).await;
    let rows: Vec<(i64, String)> = sqlx::query_as("select seq, text from messages order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(
        rows,
        [
            (first as i64, "first".to_owned()),
            (bobs as i64, "another sender".to_owned())
        ]
    );
    // Now each in a batch of its own: the database has to know.
    publish(&publisher, "chat.general", None, &body("ann", "tomorrow")).await;
    settled(&world).await;
    assert_eq!(count(&database, "select count(*) from messages").await, 2);
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn the_lower_sequence_stays_whichever_copy_was_faster() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let (first, _) = publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"first","id":"x"}"#,
    )
    .await;
    // As if another replica had already stored the second message with that id.
    sqlx::query("insert into rooms (name) values ('general')")
        .execute(&database)
        .await
        .unwrap();
    sqlx::query(
        "insert into messages select $1, 1, 'ann', null, 'x', false, 'second', now(), now()",
    )
    .bind(first as i64 + 5)
    .execute(&database)
    .await
    .unwrap();
    let worker = worker(&world).await;
    settled(&world).await;
    let rows: Vec<(i64, String)> = sqlx::query_as("select seq, text from messages")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(rows, [(first as i64, "first".to_owned())]);
    worker.stop().await.unwrap();
}
