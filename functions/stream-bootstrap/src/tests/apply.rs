//! Applies the desired state: from nothing, again, by several replicas, and after a change by hand.

use super::*;

#[tokio::test]
async fn everything_is_created_from_nothing_and_then_left_alone() {
    let world = bare().await;
    let running = start(&world).await.unwrap();
    let admin = world.client("administrator").await;
    let config = stream_config(&admin).await;
    assert_eq!(
        (
            &config["discard"],
            &config["storage"],
            &config["allow_atomic"]
        ),
        (&json!("new"), &json!("file"), &json!(true))
    );
    let consumer = api(
        &admin,
        "CONSUMER.INFO.CHAT_MESSAGES.persist-message",
        json!({}),
    )
    .await;
    assert_eq!(consumer["config"]["max_ack_pending"], 20_000);
    let tables: i64 = sqlx::query_scalar(
        "select count(*) from pg_tables where tablename in ('messages', 'rooms', 'dead_letters')",
    )
    .fetch_one(&world.database().await)
    .await
    .unwrap();
    assert_eq!(tables, 3);
    let found = check(&world).await;
    assert!(found.ok, "{found:?}");
    assert_eq!(
        (found.fence.unwrap().last, found.fence.unwrap().stored),
        (0, 0)
    );
    assert_eq!(apply(&world).await, [""; 0]);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_check_of_bare_servers_names_what_is_missing() {
    let world = bare().await;
    let running = start(&world).await.unwrap();
    let admin = world.client("administrator").await;
    api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    sqlx::raw_sql("drop table messages, rooms, dead_letters, _sqlx_migrations cascade")
        .execute(&world.database().await)
        .await
        .unwrap();
    let found = check(&world).await;
    let missing: Vec<(&str, &str)> = found
        .differences
        .iter()
        .map(|one| (one.object.as_str(), one.field.as_str()))
        .collect();
    assert_eq!(
        missing,
        [
            ("stream CHAT_MESSAGES", "(missing)"),
            ("consumer CHAT_MESSAGES/persist-message", "(missing)")
        ]
    );
    assert_eq!(
        (found.ok, found.fence, &found.migrations[..2]),
        (false, None, &[1, 2][..])
    );
    running.stop().await.unwrap();
}

#[tokio::test]
async fn replicas_started_at_once_agree() {
    let world = bare().await;
    let (one, two, three) = tokio::join!(start(&world), start(&world), start(&world));
    assert!(check(&world).await.ok);
    let runs: i64 = sqlx::query_scalar("select count(*) from _sqlx_migrations")
        .fetch_one(&world.database().await)
        .await
        .unwrap();
    assert_eq!(
        runs,
        std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../../migrations"))
            .unwrap()
            .count() as i64
    );
    for running in [one, two, three] {
        running.unwrap().stop().await.unwrap();
    }
}

#[tokio::test]
async fn a_changed_field_is_found_and_changed_back() {
    let world = bare().await;
    let running = start(&world).await.unwrap();
    let admin = world.client("administrator").await;
    api(
        &admin,
        "STREAM.UPDATE.CHAT_MESSAGES",
        stream_with(json!({"max_bytes": 1_000_000, "discard": "old"})),
    )
    .await;
    let found = check(&world).await;
    assert!(!found.ok);
    let fields: Vec<(&str, &Value, &Value)> = found
        .differences
        .iter()
        .map(|one| (one.field.as_str(), &one.wanted, &one.actual))
        .collect();
    assert_eq!(
        fields,
        [
            ("discard", &json!("new"), &json!("old")),
            ("max_bytes", &json!(8_589_934_592_u64), &json!(1_000_000))
        ]
    );
    assert_eq!(
        apply(&world).await,
        [
            r#"stream CHAT_MESSAGES: discard changed from "old" to "new""#,
            "stream CHAT_MESSAGES: max_bytes changed from 1000000 to 8589934592",
        ]
    );
    assert!(check(&world).await.ok);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn the_job_reconciles_by_itself() {
    let world = bare().await;
    let running = start_with(&world, &[("BOOTSTRAP_INTERVAL_MS", "50")])
        .await
        .unwrap();
    let admin = world.client("administrator").await;
    api(
        &admin,
        "CONSUMER.DELETE.CHAT_MESSAGES.persist-message",
        json!({}),
    )
    .await;
    eventually("the consumer is back", SOON, async || {
        let info = ask(
            &admin,
            "$JS.API.CONSUMER.INFO.CHAT_MESSAGES.persist-message".to_owned(),
            json!({}),
        )
        .await;
        (info["config"]["ack_policy"] == "explicit").then_some(())
    })
    .await;
    api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    eventually("all is well", SOON, async || {
        check(&world).await.ok.then_some(())
    })
    .await;
    running.stop().await.unwrap();
}

#[tokio::test]
async fn one_replica_applies_at_a_time() {
    let world = bare().await;
    let mut other = world.database().await.acquire().await.unwrap();
    sqlx::query("select pg_advisory_lock($1)")
        .bind(crate::bootstrap::LOCK)
        .execute(&mut *other)
        .await
        .unwrap();
    let process = world.launch("stream-bootstrap", &[]);
    eventually("it waits", SOON, async || {
        process
            .stderr()
            .contains("another replica is applying")
            .then_some(())
    })
    .await;
    let tables: i64 =
        sqlx::query_scalar("select count(*) from pg_tables where schemaname = 'public'")
            .fetch_one(&mut *other)
            .await
            .unwrap();
    assert_eq!(tables, 0);
    // The lock ends with the connection, however that ends.
    drop(other.detach());
    eventually("it applied", SOON, async || {
        process.stderr().contains("ready").then_some(())
    })
    .await;
}
