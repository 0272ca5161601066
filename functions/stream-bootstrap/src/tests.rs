//! From nothing, again, side by side, and against what an operator or another version did: on real servers.

mod audit;
mod deletions;
mod events;
mod fence;
mod plans;
mod replay;
mod shared_database;
mod told;

use std::collections::HashMap;

use async_nats::Client;
use serde_json::{Value, json};

use crate::function;
use base::error::Fatal;
use protocol::bootstrap::{Applied, Check};
use protocol::endpoints::{BOOTSTRAP_APPLY, BOOTSTRAP_CHECK};
use service::config::Vars;
use service::function::Running;
use testing::{SOON, World, eventually};

const LOG: &str = include_str!("../../../nats/streams/CHAT_MESSAGES.json");
const WORKER: &str = include_str!("../../../nats/consumers/CHAT_MESSAGES.persist-message.json");

async fn bare() -> World {
    World::builder().bare().administrator().start().await
}

async fn start(world: &World) -> Result<Running, Fatal> {
    start_with(world, &[]).await
}

async fn start_with(world: &World, extra: &[(&str, &str)]) -> Result<Running, Fatal> {
    let mut vars: HashMap<String, String> = world.vars("stream-bootstrap");
    vars.extend(
        extra
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
    );
    function().start(Vars::from_pairs(vars)?).await
}

async fn ask(client: &Client, subject: String, body: Value) -> Value {
    let reply = client
        .request(subject, body.to_string().into())
        .await
        .unwrap();
    serde_json::from_slice(&reply.payload).unwrap()
}

/// JetStream's API, asked by somebody who may ask anything.
async fn api(admin: &Client, call: &str, body: Value) -> Value {
    let reply = ask(admin, format!("$JS.API.{call}"), body).await;
    assert_eq!(reply["error"], Value::Null, "{call}: {reply}");
    reply
}

async fn check(world: &World) -> Check {
    let reply = ask(
        &world.client("operator").await,
        BOOTSTRAP_CHECK.subject(&[]),
        json!({}),
    )
    .await;
    serde_json::from_value(reply.clone()).unwrap_or_else(|error| panic!("{error}: {reply}"))
}

async fn apply(world: &World) -> Vec<String> {
    let reply = ask(
        &world.client("operator").await,
        BOOTSTRAP_APPLY.subject(&[]),
        json!({}),
    )
    .await;
    let applied: Applied =
        serde_json::from_value(reply.clone()).unwrap_or_else(|error| panic!("{error}: {reply}"));
    applied.done
}

/// The log as shipped, with other values.
fn log_with(fields: Value) -> Value {
    let mut config: Value = serde_json::from_str(LOG).unwrap();
    config
        .as_object_mut()
        .unwrap()
        .extend(fields.as_object().unwrap().clone());
    config
}

async fn log_config(admin: &Client) -> Value {
    api(admin, "STREAM.INFO.CHAT_MESSAGES", json!({})).await["config"].clone()
}

#[tokio::test]
async fn everything_is_made_from_nothing_and_then_left_alone() {
    let world = bare().await;
    let running = start(&world).await.unwrap();
    let admin = world.client("administrator").await;
    let config = log_config(&admin).await;
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
async fn a_check_of_bare_servers_says_what_is_missing() {
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
async fn copies_started_at_once_agree() {
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
async fn a_changed_field_is_found_and_mended() {
    let world = bare().await;
    let running = start(&world).await.unwrap();
    let admin = world.client("administrator").await;
    api(
        &admin,
        "STREAM.UPDATE.CHAT_MESSAGES",
        log_with(json!({"max_bytes": 1_000_000, "discard": "old"})),
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
async fn the_timer_mends_by_itself() {
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
async fn a_refused_field_is_named() {
    let world = bare().await;
    let admin = world.client("administrator").await;
    let by_hand = json!({"storage": "memory", "max_bytes": 1_000_000, "discard": "old"});
    api(&admin, "STREAM.CREATE.CHAT_MESSAGES", log_with(by_hand)).await;
    let output = world.command("stream-bootstrap").output().await.unwrap();
    assert!(!output.status.success());
    let line = String::from_utf8(output.stderr).unwrap();
    let line = line.lines().last().unwrap();
    assert!(
        line.starts_with("stream-bootstrap: stream CHAT_MESSAGES: the server refuses to change "),
        "{line}"
    );
    let storage = r#"storage (wanted "file", is "memory"; the server says: stream configuration update can not change storage type)"#;
    // In memory there is no room for the shipped size either.
    assert!(
        line.contains(storage) && line.contains("max_bytes (wanted 8589934592, is 1000000;"),
        "{line}"
    );
    // What the server does take is applied, and not complained of.
    assert!(!line.contains("discard"), "{line}");
    assert_eq!(log_config(&admin).await["discard"], "new");
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
        log_with(json!({"storage": "memory", "max_bytes": 1_000_000})),
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
    api(&admin, "STREAM.CREATE.CHAT_MESSAGES", log_with(json!({}))).await;
    let mut config: Value = serde_json::from_str(WORKER).unwrap();
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
        line.contains(r#"consumer CHAT_MESSAGES/persist-message: the server refuses to change deliver_policy (wanted "all", is "new""#),
        "{line}"
    );
}

#[tokio::test]
async fn a_stream_that_would_swallow_requests_is_refused() {
    let world = bare().await;
    let running = start(&world).await.unwrap();
    let admin = world.client("administrator").await;
    // Many streams, so that the list has more than one page.
    for number in 0..300 {
        api(
            &admin,
            &format!("STREAM.CREATE.S{number}"),
            json!({"name": format!("S{number}"), "subjects": [format!("s.{number}")], "storage": "memory"}),
        )
        .await;
    }
    api(
        &admin,
        "STREAM.CREATE.Z",
        json!({"name": "Z", "subjects": ["chat.history.*"], "storage": "memory"}),
    )
    .await;
    let found = check(&world).await;
    assert_eq!(found.swallowed.len(), 1, "{found:?}");
    assert!(
        found.swallowed[0]
            .contains("stream Z takes in chat.history.*, and so the request chat.history.*"),
        "{found:?}"
    );
    running.stop().await.unwrap();
    let line = start(&world).await.unwrap_err().to_string();
    assert!(line.contains("stream Z takes in chat.history.*"), "{line}");
}

#[tokio::test]
async fn what_another_version_migrated_is_refused() {
    let world = bare().await;
    start(&world).await.unwrap().stop().await.unwrap();
    let database = world.database().await;
    let newer = "insert into _sqlx_migrations (version, description, success, checksum, execution_time) values (9999, 'later', true, '', 0)";
    sqlx::raw_sql(newer).execute(&database).await.unwrap();
    let line = start(&world).await.unwrap_err().to_string();
    assert!(
        line.contains("the database has migration 9999, which this version does not know"),
        "{line}"
    );
    sqlx::raw_sql("delete from _sqlx_migrations where version = 9999; update _sqlx_migrations set checksum = 'x' where version = 1")
        .execute(&database)
        .await
        .unwrap();
    let line = start(&world).await.unwrap_err().to_string();
    assert!(
        line.contains("migration 1 was run here with another text"),
        "{line}"
    );
}

#[tokio::test]
async fn one_copy_applies_at_a_time() {
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
            .contains("another copy is applying")
            .then_some(())
    })
    .await;
    let tables: i64 =
        sqlx::query_scalar("select count(*) from pg_tables where schemaname = 'public'")
            .fetch_one(&mut *other)
            .await
            .unwrap();
    assert_eq!(tables, 0);
    // However the other one ends, its lock ends with it.
    drop(other.detach());
    eventually("it applied", SOON, async || {
        process.stderr().contains("ready").then_some(())
    })
    .await;
}

#[tokio::test]
async fn servers_that_are_away_are_waited_for() {
    let world = World::builder()
        .bare()
        .own_postgres()
        .administrator()
        .start()
        .await;
    world.postgres().stop().await;
    world.nats().stop().await;
    let process = world.launch("stream-bootstrap", &[("BOOTSTRAP_INTERVAL_MS", "50")]);
    eventually("it waits for NATS", SOON, async || {
        process.stderr().contains("waiting for NATS").then_some(())
    })
    .await;
    world.nats().start().await;
    let complaints = || process.stderr().matches("not applied yet").count();
    eventually("it waits for PostgreSQL", SOON, async || {
        (complaints() > 0).then_some(())
    })
    .await;
    world.postgres().start().await;
    eventually("it applied", SOON, async || {
        process.stderr().contains("ready").then_some(())
    })
    .await;
    assert_eq!(complaints(), 1, "{}", process.stderr());
    assert!(check(&world).await.ok);

    // Later, too; and each time costs one line.
    world.postgres().kill().await;
    let operator = world.client("operator").await;
    let refused = async || {
        let stats = ask(
            &operator,
            "$SRV.STATS.stream-bootstrap".to_owned(),
            json!({}),
        )
        .await;
        let reconcile = stats["endpoints"]
            .as_array()
            .unwrap()
            .iter()
            .find(|endpoint| endpoint["name"] == "reconcile")
            .unwrap();
        reconcile["num_errors"].as_u64().unwrap()
    };
    eventually("it noticed, several times", SOON, async || {
        (refused().await >= 2).then_some(())
    })
    .await;
    assert_eq!(complaints(), 2, "{}", process.stderr());
    let reply = ask(&operator, BOOTSTRAP_CHECK.subject(&[]), json!({})).await;
    assert_eq!(reply["error"]["code"], 503, "{reply}");
    world.postgres().start().await;
    let checked =
        async || ask(&operator, BOOTSTRAP_CHECK.subject(&[]), json!({})).await["ok"] == true;
    eventually("all is well", SOON, async || checked().await.then_some(())).await;
    assert!(process.terminate().await.success());
}

#[tokio::test]
async fn a_wrong_setting_ends_it_with_one_line() {
    let world = bare().await;
    for (name, value, told) in [
        (
            "BOOTSTRAP_INTERVAL_MS",
            "0",
            "BOOTSTRAP_INTERVAL_MS must be at least 1",
        ),
        (
            "BOOTSTRAP_INTERVAL_MS",
            "18446744073709551615",
            "BOOTSTRAP_INTERVAL_MS must be at most 86400000, a day",
        ),
        (
            "BOOTSTRAP_CONFIG",
            "/no/such/directory",
            "/no/such/directory/streams cannot be read",
        ),
        ("NATS_PASS", "wrong", "NATS refused this user"),
    ] {
        let line = start_with(&world, &[(name, value)])
            .await
            .unwrap_err()
            .to_string();
        assert!(line.contains(told), "{line}");
    }
    let wrong = world.database_url().replacen("world_", "no_such_world_", 1);
    let line = start_with(&world, &[("DATABASE_URL", &wrong)])
        .await
        .unwrap_err()
        .to_string();
    assert!(
        line.contains("3D000") && line.contains("there is no such database"),
        "{line}"
    );
}

/// Settings that break a promise, whoever made them: named, and mended where the server lets us.
#[tokio::test]
async fn what_breaks_a_promise_is_named() {
    let world = bare().await;
    let running = start(&world).await.unwrap();
    let admin = world.client("administrator").await;
    let by_hand = json!({"max_msgs": 100, "max_age": 600_000_000_000_u64, "allow_rollup_hdrs": true, "no_ack": true,
                         "subject_transform": {"src": "chat.*", "dest": "chat.{{wildcard(1)}}"}});
    api(&admin, "STREAM.UPDATE.CHAT_MESSAGES", log_with(by_hand)).await;
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
    let until = time::OffsetDateTime::now_utc() + std::time::Duration::from_secs(600);
    let until = until
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap();
    api(
        &admin,
        "CONSUMER.PAUSE.CHAT_MESSAGES.persist-message",
        json!({ "pause_until": until }),
    )
    .await;
    let found = check(&world).await;
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
        &admin,
        "CONSUMER.PAUSE.CHAT_MESSAGES.persist-message",
        json!({}),
    )
    .await;
    assert_eq!(fields().await, [""; 0]);
    // Once set, the server takes neither back.
    for (field, value) in [("deny_delete", json!(true)), ("sealed", json!(true))] {
        let mut changed = json!({"deny_delete": true, "deny_purge": false});
        changed[field] = value;
        api(&admin, "STREAM.UPDATE.CHAT_MESSAGES", log_with(changed)).await;
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

/// `async` acknowledges what is not on the disk, whatever `sync_interval` says.
#[tokio::test]
async fn an_asynchronous_log_is_refused() {
    let world = bare().await;
    let admin = world.client("administrator").await;
    api(
        &admin,
        "STREAM.CREATE.CHAT_MESSAGES",
        log_with(json!({"persist_mode": "async", "allow_atomic": false})),
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
        log_with(json!({"persist_mode": "async", "allow_atomic": false})),
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
async fn a_stream_of_somebody_else_over_our_subjects_is_named() {
    let world = bare().await;
    let admin = world.client("administrator").await;
    for (name, subject, ours) in [
        ("LEGACY", "chat.general", "CHAT_MESSAGES"),
        ("AUDIT", "events.>", "CHAT_EVENTS"),
    ] {
        api(
            &admin,
            &format!("STREAM.CREATE.{name}"),
            json!({"name": name, "subjects": [subject], "storage": "memory"}),
        )
        .await;
        let line = start(&world).await.unwrap_err().to_string();
        let wanted = format!(
            "stream {name} takes in {subject}, which belongs to stream {ours}: narrow its subjects, or delete it"
        );
        assert!(line.contains(&wanted), "{line}");
        api(&admin, &format!("STREAM.DELETE.{name}"), json!({})).await;
    }
}

#[tokio::test]
async fn replicas_have_to_be_insisted_on() {
    let world = bare().await;
    let config = world.shipped_but(|file, object| {
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
    // Only now the one server is asked, and has not three.
    assert!(
        insisted
            .unwrap_err()
            .to_string()
            .contains("stream CHAT_MESSAGES cannot be created")
    );
}
