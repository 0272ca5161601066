//! Deletions and the outbox, as the database and the stream show them.

use async_nats::Client;
use serde_json::{Value, json};
use sqlx::PgPool;
use sqlx::types::time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{SOON, count, publish, settled, stored, worker};
use testing::{RawClient, World, eventually};

/// Where functions append a deletion. Only `delete-message` and `stream-bootstrap` may.
pub(super) async fn delete(bootstrap: &Client, target: u64, id: &str, mode: &str) -> u64 {
    let derived = id.starts_with("seq:");
    let received = received_ms(bootstrap, target).await;
    let body = json!({
        "type": "delete", "target": target, "id": id, "user": "ann", "derived": derived,
        "timestamp": 1_700_000_000_000_i64, "received": received, "mode": mode, "by": "ann",
    });
    publish(bootstrap, "change.chat.general", None, &body.to_string())
        .await
        .0
}

async fn log_entry(bootstrap: &Client, seq: u64) -> Value {
    let reply = bootstrap
        .request(
            protocol::js_api::MESSAGE_GET,
            json!({ "seq": seq }).to_string().into(),
        )
        .await
        .unwrap();
    serde_json::from_slice(&reply.payload).unwrap()
}

/// The stream holds nothing there.
pub(super) async fn is_gone(bootstrap: &Client, seq: u64) -> bool {
    log_entry(bootstrap, seq).await["error"]["err_code"] == 10_037
}

pub(super) async fn received_ms(bootstrap: &Client, seq: u64) -> i64 {
    let entry = log_entry(bootstrap, seq).await;
    let Some(time) = entry["message"]["time"].as_str() else {
        return 0;
    };
    let at = OffsetDateTime::parse(time, &Rfc3339).unwrap();
    (at.unix_timestamp_nanos() / 1_000_000) as i64
}

pub(super) async fn rows(database: &PgPool) -> Vec<(i64, String, bool)> {
    sqlx::query_as("select seq, text, deleted from messages order by seq")
        .fetch_all(database)
        .await
        .unwrap()
}

pub(super) fn message(text: &str, id: Option<&str>) -> String {
    json!({"user": "ann", "text": text, "id": id}).to_string()
}

#[tokio::test]
async fn a_deleted_message_leaves_its_place() {
    let world = World::start().await;
    let worker = worker(&world).await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let (kept, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("kept", Some("k")),
    )
    .await;
    let (soft, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("soft secret", Some("s")),
    )
    .await;
    let (plain, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("plain secret", None),
    )
    .await;
    stored(&database, 3, SOON).await;
    let change = delete(&bootstrap, soft, "s", "soft").await;
    delete(&bootstrap, plain, &format!("seq:{plain}"), "soft").await;
    // A delete of a delete, and the same again in one batch.
    delete(&bootstrap, soft, "s", "soft").await;
    settled(&world).await;
    assert_eq!(
        rows(&database).await,
        [
            (kept as i64, "kept".to_owned(), false),
            (soft as i64, String::new(), true),
            (plain as i64, String::new(), true)
        ]
    );
    type Change = (i64, i64, String, String, String, String);
    let first: Change = sqlx::query_as(
        "select seq, target, sender, id, mode, changed_by from changes order by seq limit 1",
    )
    .fetch_one(&database)
    .await
    .unwrap();
    assert_eq!(
        first,
        (
            change as i64,
            soft as i64,
            "ann".into(),
            "s".into(),
            "soft".into(),
            "ann".into()
        )
    );
    assert_eq!(count(&database, "select count(*) from changes").await, 3);
    assert_eq!(
        count(&database, "select count(*) from dead_letters").await,
        0
    );
    assert!(
        log_entry(&bootstrap, soft).await["message"]["data"].is_string(),
        "soft leaves the stream alone"
    );
    // Every message and every change is in the outbox once.
    let relayed: Vec<i64> =
        sqlx::query_scalar("select unnest(seqs) as seq from outbox order by seq")
            .fetch_all(&database)
            .await
            .unwrap();
    assert_eq!(relayed, (1..=6).collect::<Vec<i64>>());
    assert_eq!(
        count(
            &database,
            "select count(*) from outbox where (first_seq,
          last_seq) <> (select min(s), max(s) from unnest(seqs) s)"
        )
        .await,
        0
    );
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn a_deletion_stored_before_its_message_blocks_it() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let (given, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    let (plain, _) = publish(&publisher, "chat.general", None, &message("secret", None)).await;
    // Another worker takes both messages, and stands still.
    let mut other = RawClient::connect(world.nats(), "persist-message").await;
    let inbox = other.inbox();
    other.subscribe(&inbox).await;
    other
        .publish_raw(protocol::js_api::CONSUMER_NEXT, Some(&inbox), None, b"2")
        .await;
    let held = [
        other.next(SOON).await.unwrap(),
        other.next(SOON).await.unwrap(),
    ];
    delete(&bootstrap, given, "s", "soft").await;
    delete(&bootstrap, plain, &format!("seq:{plain}"), "soft").await;
    let worker = worker(&world).await;
    let tombstones = [
        (given as i64, String::new(), true),
        (plain as i64, String::new(), true),
    ];
    eventually("the tombstones stand", SOON, async || {
        (rows(&database).await == tombstones).then_some(())
    })
    .await;
    // It naks them.
    for message in held {
        other
            .publish_raw(message.reply.as_deref().unwrap(), None, None, b"-NAK")
            .await;
    }
    settled(&world).await;
    assert_eq!(rows(&database).await, tombstones);
    assert_eq!(
        count(&database, "select count(*) from dead_letters").await,
        0,
        "the message is met as itself, not as a collision"
    );
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn hard_takes_the_text_from_everywhere() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let (first, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    let (same_batch, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    let (innocent, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("kept", Some("k")),
    )
    .await;
    let worker = worker(&world).await;
    settled(&world).await;
    let (later, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    settled(&world).await;
    let duplicates: Vec<i64> = sqlx::query_scalar("select seq from duplicates order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(duplicates, [same_batch as i64, later as i64]);
    for (reason, body) in [
        ("sequence_reused", message("secret", Some("s"))),
        ("below_fence", message("secret", Some("other"))),
    ] {
        sqlx::query(
            "insert into dead_letters (seq, subject, headers, payload, reason,
              received_at) values (77, 'chat.general', '', $1, $2, now())",
        )
        .bind(body.as_bytes())
        .bind(reason)
        .execute(&database)
        .await
        .unwrap();
    }
    // The stream has it, too, where a dead letter came from.
    let (letters, _) = publish(
        &publisher,
        "chat.general",
        Some("other header"),
        &message("secret", Some("s")),
    )
    .await;
    sqlx::query("update dead_letters set seq = $1 where reason = 'sequence_reused'")
        .bind(letters as i64)
        .execute(&database)
        .await
        .unwrap();
    sqlx::query("delete from duplicates where seq = $1")
        .bind(letters as i64)
        .execute(&database)
        .await
        .unwrap();
    delete(&bootstrap, first, "s", "hard").await;
    settled(&world).await;
    // Said once more, by a publisher who does not know.
    let (again, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    settled(&world).await;
    for seq in [first, same_batch, later, letters, again] {
        assert_eq!(
            log_entry(&bootstrap, seq).await["error"]["err_code"],
            10_037,
            "sequence {seq} is gone"
        );
    }
    assert!(log_entry(&bootstrap, innocent).await["message"]["data"].is_string());
    assert_eq!(
        rows(&database).await,
        [
            (first as i64, String::new(), true),
            (innocent as i64, "kept".to_owned(), false)
        ]
    );
    let letters: Vec<(String, Option<String>, i32)> = sqlx::query_as(
        "select reason, outcome, octet_length(payload) from dead_letters order by id",
    )
    .fetch_all(&database)
    .await
    .unwrap();
    assert_eq!(
        letters[0],
        ("sequence_reused".to_owned(), Some("erased".to_owned()), 0)
    );
    assert_eq!(
        (letters[1].1.as_deref(), letters[1].2 > 0),
        (None, true),
        "another message"
    );
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn a_displaced_copy_is_known_as_a_duplicate() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let (first, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    let (second, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    // As if another replica had stored the second one, and then its deletion, before we see the
    // first.
    sqlx::query("insert into rooms (name) values ('general')")
        .execute(&database)
        .await
        .unwrap();
    sqlx::query(
        "insert into messages select $1, 1, 'ann', null, 's', false, '', now(), now(), true",
    )
    .bind(second as i64)
    .execute(&database)
    .await
    .unwrap();
    let worker = worker(&world).await;
    settled(&world).await;
    assert_eq!(
        rows(&database).await,
        [(first as i64, String::new(), true)],
        "the first takes the place, and no text"
    );
    delete(&bootstrap, first, "s", "hard").await;
    settled(&world).await;
    for seq in [first, second] {
        assert_eq!(
            log_entry(&bootstrap, seq).await["error"]["err_code"],
            10_037,
            "sequence {seq} is gone"
        );
    }
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn a_change_that_says_nothing_is_a_dead_letter_and_a_reused_one_too() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let (kept, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("kept", Some("k")),
    )
    .await;
    publish(&bootstrap, "change.chat.general", None, "{}").await;
    publish(&bootstrap, "change.somewhere", None, "{}").await;
    // A change whose target another message stands on, and one whose own place another change has.
    delete(&bootstrap, kept, "never sent", "soft").await;
    sqlx::query(
        "insert into changes values (5, 1, 1, 'zoe', 'z', 'soft', 'zoe', now() - interval '1 day')",
    )
    .execute(&database)
    .await
    .unwrap();
    delete(&bootstrap, kept, "k", "soft").await;
    let worker = worker(&world).await;
    settled(&world).await;
    let letters: Vec<(i64, String)> =
        sqlx::query_as("select seq, reason from dead_letters order by seq")
            .fetch_all(&database)
            .await
            .unwrap();
    let letters: Vec<(i64, &str)> = letters
        .iter()
        .map(|(seq, reason)| (*seq, reason.as_str()))
        .collect();
    assert_eq!(
        letters,
        [
            (2, "malformed_change"),
            (3, "unsupported_subject"),
            (4, "sequence_reused"),
            (5, "sequence_reused")
        ]
    );
    assert_eq!(
        rows(&database).await,
        [(kept as i64, String::new(), true)],
        "asked for is asked for"
    );
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn what_is_stored_already_is_no_news() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let worker = worker(&world).await;
    publish(&publisher, "chat.general", None, &message("one", Some("1"))).await;
    settled(&world).await;
    publish(
        &publisher,
        "chat.general",
        None,
        &message("again", Some("1")),
    )
    .await;
    publish(&publisher, "chat.general", None, "no message").await;
    settled(&world).await;
    let noted: Vec<Vec<i64>> = sqlx::query_scalar("select seqs from outbox")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(noted, [vec![1]]);
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn the_trace_goes_on_in_the_outbox() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let worker = worker(&world).await;
    let sampled = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    for traceparent in [
        sampled,
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        "nonsense",
    ] {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("traceparent", traceparent);
        publisher
            .request_with_headers("chat.general", headers, message("one", None).into())
            .await
            .unwrap();
    }
    settled(&world).await;
    let traced: Vec<(i64, String)> =
        sqlx::query_as("select unnest(traced), unnest(traceparents) from outbox")
            .fetch_all(&database)
            .await
            .unwrap();
    assert_eq!(traced, [(1, sampled.to_owned())]);
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn the_relay_is_woken() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let mut relay = RawClient::connect(world.nats(), "relay-outbox").await;
    relay.subscribe(protocol::subject::OUTBOX_WAKE).await;
    relay.flush().await.unwrap();
    let worker = worker(&world).await;
    publish(&publisher, "chat.general", None, &message("one", None)).await;
    assert_eq!(
        relay.next(SOON).await.expect("a wake").subject,
        protocol::subject::OUTBOX_WAKE
    );
    worker.stop().await.unwrap();
}
