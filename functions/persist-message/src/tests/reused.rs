//! Sequences that a recreated stream assigns again.

use super::*;

#[tokio::test]
async fn a_reused_sequence_is_a_dead_letter() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    sqlx::query(
        "insert into messages select 2, 77, 'old', null, 'o', false, 'from another life',
      now(), now()",
    )
    .execute(&database)
    .await
    .unwrap();
    for text in ["one", "two", "three"] {
        publish(
            &publisher,
            "chat.general",
            None,
            &json!({"user": "ann", "text": text}).to_string(),
        )
        .await;
    }
    let worker = worker(&world).await;
    settled(&world).await;
    let letters: Vec<(i64, String)> = sqlx::query_as("select seq, reason from dead_letters")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(letters, [(2, "sequence_reused".to_owned())]);
    let texts: Vec<String> = sqlx::query_scalar("select text from messages order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(texts, ["one", "from another life", "three"]);
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn another_message_with_the_same_sender_and_sequence_is_a_dead_letter_too() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    // As a stream that is gone had it: no id of its own, the same sender, the same place.
    sqlx::query(
        "insert into messages select 1, 77, 'ann', null, 'seq:1', true,
      'from another life', now() - interval '1 day', now() - interval '1 day'",
    )
    .execute(&database)
    .await
    .unwrap();
    // And one whose id is used again, further down, in the recreated stream.
    sqlx::query(
        "insert into messages select 500, 77, 'ann', null, 'mine', false, 'first',
          now() - interval '1 day', now() - interval '1 day'",
    )
    .execute(&database)
    .await
    .unwrap();
    publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"another message"}"#,
    )
    .await;
    publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"again","id":"mine"}"#,
    )
    .await;
    let worker = worker(&world).await;
    settled(&world).await;
    let letters: Vec<(i64, String)> =
        sqlx::query_as("select seq, reason from dead_letters order by seq")
            .fetch_all(&database)
            .await
            .unwrap();
    assert_eq!(
        letters,
        [
            (1, "sequence_reused".to_owned()),
            (2, "id_conflict".to_owned())
        ]
    );
    let rows: Vec<(i64, String)> = sqlx::query_as("select seq, text from messages order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(
        rows,
        [
            (1, "from another life".to_owned()),
            (500, "first".to_owned())
        ],
        "nothing moved, nothing was replaced"
    );
    worker.stop().await.unwrap();
}
