//! Processes that die at any step of the sequence guard.

use super::*;
use crate::tests::stream_config;

async fn finished(world: &World, admin: &Client, database: &PgPool) {
    start(world).await.unwrap().stop().await.unwrap();
    assert_eq!(
        texts(&entries(admin).await),
        [(501, "one"), (502, "two"), (503, "three")]
    );
    assert!(dead_letters(database).await.is_empty());
    assert_eq!(
        stream_config(admin).await["subjects"],
        json!(protocol::subject::STREAM_SUBJECTS)
    );
    let consumer = api(
        admin,
        "CONSUMER.INFO.CHAT_MESSAGES.persist-message",
        json!({}),
    )
    .await;
    assert_ne!(consumer["paused"], true, "{consumer}");
}

#[tokio::test]
async fn a_death_after_closing_is_recovered() {
    let (world, admin, database) = three_unstored().await;
    close(&admin).await;
    finished(&world, &admin, &database).await;
}

#[tokio::test]
async fn a_death_while_salvaging_is_recovered() {
    let (world, admin, database) = three_unstored().await;
    close(&admin).await;
    salvage(&database, 1, "one").await;
    finished(&world, &admin, &database).await;
}

#[tokio::test]
async fn a_death_after_advancing_is_recovered() {
    let (world, admin, database) = three_unstored().await;
    close(&admin).await;
    for (seq, text) in [(1, "one"), (2, "two"), (3, "three")] {
        salvage(&database, seq, text).await;
    }
    advance(&admin).await;
    finished(&world, &admin, &database).await;
}

/// The replica that died had appended the first dead letter and had not removed it, and meanwhile
/// JetStream has forgotten its id.
#[tokio::test]
async fn a_death_while_appending_appends_nothing_twice() {
    let (world, admin, database) = three_unstored().await;
    close(&admin).await;
    for (seq, text) in [(1, "one"), (2, "two"), (3, "three")] {
        salvage(&database, seq, text).await;
    }
    advance(&admin).await;
    api(
        &admin,
        "CONSUMER.PAUSE.CHAT_MESSAGES.persist-message",
        json!({}),
    )
    .await;
    api(
        &admin,
        "STREAM.UPDATE.CHAT_MESSAGES",
        stream_with(json!({"duplicate_window": 100_000_000})),
    )
    .await;
    let digest: String = sqlx::query_scalar(
        "select encode(sha256(sha256(headers) || sha256(payload)), 'hex')
               from dead_letters where seq = 1",
    )
    .fetch_one(&database)
    .await
    .unwrap();
    let id = format!("fence:1:{digest}");
    assert_eq!(
        publish(
            &admin,
            "chat.general",
            &[("Nats-Msg-Id", &id)],
            &body("ann", "one")
        )
        .await,
        501
    );
    // When JetStream has forgotten a later id, it has forgotten ours.
    let probe = async || publish(&admin, "admin.probe", &[("Nats-Msg-Id", "probe")], "{}").await;
    let first = probe().await;
    eventually("JetStream has forgotten the id", SOON, async || {
        (probe().await != first).then_some(())
    })
    .await;
    api(
        &admin,
        "STREAM.PURGE.CHAT_MESSAGES",
        json!({"filter": "admin.probe"}),
    )
    .await;
    start(&world).await.unwrap().stop().await.unwrap();
    let stream = entries(&admin).await;
    assert_eq!(
        stream
            .iter()
            .map(|entry| entry.text.as_str())
            .collect::<Vec<&str>>(),
        ["one", "two", "three"]
    );
    assert!(dead_letters(&database).await.is_empty());
}

/// Killed with -9 at each of the steps, one after the other; the messages have no ids.
#[tokio::test]
async fn killed_at_every_step_nothing_is_lost_or_doubled() {
    const MESSAGES: usize = 200;
    let (world, admin, database) = without_stream().await;
    api(
        &admin,
        "STREAM.CREATE.CHAT_MESSAGES",
        stream_with(json!({})),
    )
    .await;
    for number in 0..MESSAGES {
        publish(
            &admin,
            "chat.general",
            &[],
            &body("ann", &format!("{number}")),
        )
        .await;
    }
    let taken = async || {
        sqlx::query_scalar::<_, i64>("select count(*) from dead_letters")
            .fetch_one(&database)
            .await
            .unwrap()
    };
    let last = async || {
        api(&admin, "STREAM.INFO.CHAT_MESSAGES", json!({})).await["state"]["last_seq"]
            .as_u64()
            .unwrap()
    };
    for step in 0..6 {
        let process = world.launch("stream-bootstrap", &[]);
        eventually("it got as far", SOON, async || {
            let far = match step {
                0 => stream_config(&admin).await["subjects"] == json!([GUARD_SUBJECT]),
                1 => taken().await >= 64,
                2 => last().await >= 500,
                3 => last().await >= 510,
                4 => last().await >= 560,
                _ => last().await >= 640,
            };
            far.then_some(())
        })
        .await;
        process.kill().await;
    }
    start(&world).await.unwrap().stop().await.unwrap();
    let stream = entries(&admin).await;
    let appended: Vec<&str> = stream.iter().map(|entry| entry.text.as_str()).collect();
    assert_eq!(
        appended,
        (0..MESSAGES)
            .map(|number| number.to_string())
            .collect::<Vec<String>>()
    );
    assert_eq!(stream[0].seq, 501);
    assert_eq!(taken().await, 0);
}
