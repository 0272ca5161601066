//! What is refused and named: by the server, or because it would break a guarantee.

use super::*;

#[tokio::test]
async fn a_refused_field_is_named() {
    let world = bare().await;
    let admin = world.client("administrator").await;
    let by_hand = json!({"storage": "memory", "max_bytes": 1_000_000, "discard": "old"});
    api(&admin, "STREAM.CREATE.CHAT_MESSAGES", stream_with(by_hand)).await;
    let output = world.command("stream-bootstrap").output().await.unwrap();
    assert!(!output.status.success());
    let line = String::from_utf8(output.stderr).unwrap();
    let line = line.lines().last().unwrap();
    assert!(
        line.starts_with("stream-bootstrap: stream CHAT_MESSAGES: the server refuses to change "),
        "{line}"
    );
    let storage = concat!(
        r#"storage (wanted "file", is "memory"; the server says: "#,
        "stream configuration update can not change storage type)",
    );
    // There is not enough memory for the desired size either.
    assert!(
        line.contains(storage) && line.contains("max_bytes (wanted 8589934592, is 1000000;"),
        "{line}"
    );
    // What the server accepts is applied, and not named.
    assert!(!line.contains("discard"), "{line}");
    assert_eq!(stream_config(&admin).await["discard"], "new");
}

#[tokio::test]
async fn a_refusal_while_running_is_a_409() {
    let world = bare().await;
    let running = start(&world).await.unwrap();
    let admin = world.client("administrator").await;
    api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    api(
        &admin,
        "STREAM.CREATE.CHAT_MESSAGES",
        stream_with(json!({"storage": "memory", "max_bytes": 1_000_000})),
    )
    .await;
    let reply = ask(
        &world.client("operator").await,
        BOOTSTRAP_APPLY.subject(&[]),
        json!({}),
    )
    .await;
    assert_eq!(reply["error"]["code"], 409);
    assert!(
        reply["error"]["reason"]
            .as_str()
            .unwrap()
            .contains("storage"),
        "{reply}"
    );
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_consumer_that_cannot_be_changed_is_named() {
    let world = bare().await;
    let admin = world.client("administrator").await;
    api(
        &admin,
        "STREAM.CREATE.CHAT_MESSAGES",
        stream_with(json!({})),
    )
    .await;
    let mut config: Value = serde_json::from_str(CONSUMER_JSON).unwrap();
    config["deliver_policy"] = json!("new");
    let request = json!({"stream_name": "CHAT_MESSAGES", "config": config});
    api(
        &admin,
        "CONSUMER.DURABLE.CREATE.CHAT_MESSAGES.persist-message",
        request,
    )
    .await;
    let line = start(&world).await.unwrap_err().to_string();
    assert!(
        line.contains("consumer CHAT_MESSAGES/persist-message: the server refuses to change")
            && line.contains(r#"change deliver_policy (wanted "all", is "new""#),
        "{line}"
    );
}

#[tokio::test]
async fn what_another_version_migrated_is_refused() {
    let world = bare().await;
    start(&world).await.unwrap().stop().await.unwrap();
    let database = world.database().await;
    let newer = "
        insert into _sqlx_migrations (version, description, success, checksum, execution_time)
        values (9999, 'later', true, '', 0)";
    sqlx::raw_sql(newer).execute(&database).await.unwrap();
    let line = start(&world).await.unwrap_err().to_string();
    assert!(
        line.contains("the database has migration 9999, which this version does not know"),
        "{line}"
    );
    let another_text = "
        delete from _sqlx_migrations where version = 9999;
        update _sqlx_migrations set checksum = 'x' where version = 1";
    sqlx::raw_sql(another_text)
        .execute(&database)
        .await
        .unwrap();
    let line = start(&world).await.unwrap_err().to_string();
    assert!(
        line.contains("migration 1 was run here with another text"),
        "{line}"
    );
}

/// A paused consumer is reported.
async fn check_pause(world: &World, admin: &Client) {
    let until = time::OffsetDateTime::now_utc() + std::time::Duration::from_secs(600);
    let until = until
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap();
    api(
        admin,
        "CONSUMER.PAUSE.CHAT_MESSAGES.persist-message",
        json!({ "pause_until": until }),
    )
    .await;
    let found = check(world).await;
    assert_eq!(
        (found.ok, found.differences[0].field.as_str()),
        (false, "pause_until"),
        "{found:?}"
    );
    assert_eq!(
        found.differences[0].object,
        "consumer CHAT_MESSAGES/persist-message"
    );
    api(
        admin,
        "CONSUMER.PAUSE.CHAT_MESSAGES.persist-message",
        json!({}),
    )
    .await;
}

/// Settings that break a guarantee are named, and changed back where the server allows it.
#[tokio::test]
async fn what_breaks_a_guarantee_is_named() {
    let world = bare().await;
    let running = start(&world).await.unwrap();
    let admin = world.client("administrator").await;
    let by_hand = json!({
        "max_msgs": 100,
        "max_age": 600_000_000_000_u64,
        "allow_rollup_hdrs": true,
        "no_ack": true,
        "subject_transform": {"src": "chat.*", "dest": "chat.{{wildcard(1)}}"},
    });
    api(&admin, "STREAM.UPDATE.CHAT_MESSAGES", stream_with(by_hand)).await;
    let fields = async || {
        check(&world)
            .await
            .differences
            .into_iter()
            .map(|one| one.field)
            .collect::<Vec<String>>()
    };
    assert_eq!(
        fields().await,
        [
            "allow_rollup_hdrs",
            "max_age",
            "max_msgs",
            "no_ack",
            "subject_transform"
        ]
    );
    apply(&world).await;
    assert_eq!(fields().await, [""; 0]);
    check_pause(&world, &admin).await;
    assert_eq!(fields().await, [""; 0]);
    // The server does not unset these two.
    for (field, value) in [("deny_delete", json!(true)), ("sealed", json!(true))] {
        let mut changed = json!({"deny_delete": true, "deny_purge": false});
        changed[field] = value;
        api(&admin, "STREAM.UPDATE.CHAT_MESSAGES", stream_with(changed)).await;
        assert!(fields().await.contains(&field.to_owned()), "{field}");
        let reply = ask(
            &world.client("operator").await,
            BOOTSTRAP_APPLY.subject(&[]),
            json!({}),
        )
        .await;
        let reason = reply["error"]["reason"].as_str().unwrap();
        assert!(
            reason.contains("the server refuses to change deny_delete") && reason.contains(field),
            "{reply}"
        );
    }
    running.stop().await.unwrap();
}

/// `async` acknowledges what is not on the disk yet, whatever `sync_interval` is.
#[tokio::test]
async fn an_asynchronous_stream_is_refused() {
    let world = bare().await;
    let admin = world.client("administrator").await;
    api(
        &admin,
        "STREAM.CREATE.CHAT_MESSAGES",
        stream_with(json!({"persist_mode": "async", "allow_atomic": false})),
    )
    .await;
    let line = start(&world).await.unwrap_err().to_string();
    assert!(
        line.contains(r#"persist_mode (wanted null, is "async""#),
        "{line}"
    );
    api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    let running = start(&world).await.unwrap();
    api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    api(
        &admin,
        "STREAM.CREATE.CHAT_MESSAGES",
        stream_with(json!({"persist_mode": "async", "allow_atomic": false})),
    )
    .await;
    let found = check(&world).await;
    assert!(
        found
            .differences
            .iter()
            .any(|one| one.field == "persist_mode" && one.actual == "async"),
        "{found:?}"
    );
    running.stop().await.unwrap();
}

#[tokio::test]
async fn stream_replicas_have_to_be_insisted_on() {
    let world = bare().await;
    let config = world.with_edited_config(|file, object| {
        if file == "CHAT_MESSAGES.json" {
            object["num_replicas"] = json!(3);
        }
    });
    let line = start_with(&world, &[("BOOTSTRAP_CONFIG", &config)])
        .await
        .unwrap_err()
        .to_string();
    assert!(
        line.contains("CHAT_MESSAGES has num_replicas 3")
            && line.contains("BOOTSTRAP_ALLOW_REPLICAS=true"),
        "{line}"
    );
    let insisted = start_with(
        &world,
        &[
            ("BOOTSTRAP_CONFIG", &config),
            ("BOOTSTRAP_ALLOW_REPLICAS", "true"),
        ],
    )
    .await;
    // Only now the server is asked, and a single server cannot have three replicas.
    assert!(
        insisted
            .unwrap_err()
            .to_string()
            .contains("stream CHAT_MESSAGES cannot be created")
    );
}
