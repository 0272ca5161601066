//! What a stream below the guard holds and nobody stored is saved, and appended again.

use super::*;
use crate::tests::{start_with, stream_config};
use protocol::header;
use testing::RawClient;

/// Creates the stream by hand, with messages 1 to 10 of every kind: stored, not stored,
/// dead-lettered and unreadable ones.
async fn every_kind(world: &World, admin: &Client, database: &PgPool) {
    // Created by hand, with limits that would drop messages.
    let by_hand = json!({
        "max_age": 3_600_000_000_000_u64,
        "discard": "old",
        "subjects": ["chat.>", "dm.*.*", "admin.*"],
    });
    api(admin, "STREAM.CREATE.CHAT_MESSAGES", stream_with(by_hand)).await;
    let ann = |text: &str| body("ann", text);
    publish(admin, "chat.general", &[], &ann("stored")).await;
    store(database, 1, "ann", None, received_ms(admin, 1).await).await;
    // The lost stream had another message at this sequence.
    publish(admin, "chat.general", &[], &ann("at a reused sequence")).await;
    store(database, 2, "ann", None, received_ms(admin, 2).await - 1).await;
    publish(
        admin,
        "chat.general",
        &[("Nats-Msg-Id", "three"), ("X-Kept", "yes")],
        &ann("with an id"),
    )
    .await;
    publish(
        admin,
        "dm.ann.bob",
        &[("Nats-Expected-Last-Sequence", "3")],
        &ann("direct"),
    )
    .await;
    publish(admin, "chat.general", &[], "no json").await;
    publish(admin, "chat.general", &[("A", "b")], "dead already").await;
    sqlx::query(
        "insert into dead_letters (seq, subject, headers, payload, reason, received_at)
         values (6, 'chat.general', convert_to(E'NATS/1.0\\r\\nA:  b \\r\\n\\r\\n', 'utf8'),
                 'dead already', 'not_json', now())",
    )
    .execute(database)
    .await
    .unwrap();
    let mut raw = RawClient::connect(world.nats(), "administrator").await;
    raw.publish_raw(
        "chat.general",
        None,
        Some(b"NATS/1.0\r\nA B: c\r\n\r\n"),
        b"unreadable",
    )
    .await;
    raw.flush().await.unwrap();
    publish(
        admin,
        "chat.general",
        &[("Nats-Msg-Id", "zoe-1")],
        &body("zoe", "stored under another sequence"),
    )
    .await;
    store(database, 490, "zoe", Some("zoe-1"), 0).await;
    publish(
        admin,
        "chat.history.general",
        &[],
        &ann("a captured request"),
    )
    .await;
    assert_eq!(
        publish(admin, "admin.notice", &[], &ann("to all")).await,
        10
    );
}

#[tokio::test]
async fn what_nobody_stored_is_appended_again_above_the_guard() {
    let (world, admin, database) = without_stream().await;
    every_kind(&world, &admin, &database).await;
    let running = start(&world).await.unwrap();
    let stream = entries(&admin).await;
    let appended = [
        (501, "at a reused sequence"),
        (502, "with an id"),
        (503, "direct"),
        (504, "no json"),
        (505, "to all"),
    ];
    assert_eq!(texts(&stream), appended);
    assert_eq!(
        (stream[2].subject.as_str(), stream[4].subject.as_str()),
        ("dm.ann.bob", "admin.notice")
    );
    assert!(
        stream[1].headers.contains("three") && stream[1].headers.contains("X-Kept"),
        "{:?}",
        stream[1]
    );
    assert!(
        stream
            .iter()
            .all(|entry| entry.headers.contains(header::ORIGINAL_ID)
                && !entry.headers.contains("Expected")),
        "{stream:?}"
    );
    let left = [
        (6, "not_json"),
        (7, "malformed_headers"),
        (9, "unsupported_subject"),
    ];
    assert_eq!(
        dead_letters(&database).await,
        left.map(|(seq, reason)| (seq, reason.to_owned()))
    );
    assert_eq!(
        stream_config(&admin).await["subjects"],
        json!(protocol::subject::STREAM_SUBJECTS)
    );
    assert!(check(&world).await.ok);
    running.stop().await.unwrap();

    // A worker reads the message's original id.
    let worker = world.spawn("persist-message").await;
    let id = eventually("the message is stored", SOON, async || {
        sqlx::query_scalar::<_, String>("select id from messages where seq = 502")
            .fetch_optional(&database)
            .await
            .unwrap()
    });
    assert_eq!(id.await, "three");
    worker.kill().await;
}

/// The dead letters wait while the stream has no space, and the function starts all the same.
#[tokio::test]
async fn a_full_stream_gets_its_dead_letters_later() {
    let (world, admin, database) = without_stream().await;
    let folder = world.nats().store_dir().with_file_name("config");
    for (part, name, config) in [
        (
            "streams",
            "CHAT_MESSAGES.json",
            stream_with(json!({"max_bytes": 1_000})).to_string(),
        ),
        (
            "consumers",
            "CHAT_MESSAGES.persist-message.json",
            crate::tests::CONSUMER_JSON.to_owned(),
        ),
    ] {
        std::fs::create_dir_all(folder.join(part)).unwrap();
        std::fs::write(folder.join(part).join(name), config).unwrap();
    }
    salvage(&database, 1, &"long ".repeat(300)).await;
    let small = [("BOOTSTRAP_CONFIG", folder.to_str().unwrap())];
    let running = start_with(&world, &small).await.unwrap();
    let found = check(&world).await;
    assert_eq!(
        (
            found.differences[0].field.as_str(),
            &found.differences[0].actual
        ),
        ("below_fence", &json!(1)),
        "{found:?}"
    );
    running.stop().await.unwrap();
    assert_eq!(
        dead_letters(&database).await,
        [(1, "below_fence".to_owned())]
    );
    start(&world).await.unwrap().stop().await.unwrap();
    assert_eq!(
        texts(&entries(&admin).await),
        [(501, "long ".repeat(300).as_str())]
    );
}
