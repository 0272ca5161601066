//! Audits of every kind of message, of a damaged database, and of messages that no client can read.

use async_nats::Client;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::sequence_guard::{body, publish, received_ms};
use super::{SOON, api, ask, start, start_with};
use protocol::audit::Audit;
use protocol::endpoints::BOOTSTRAP_AUDIT;
use service::function::Running;
use testing::{RawClient, World, eventually};

/// Servers with everything applied, and a replica that answers.
pub(super) async fn world() -> (World, Running, Client, PgPool) {
    let world = World::builder().administrator().start().await;
    let running = start(&world).await.unwrap();
    let admin = world.client("administrator").await;
    let database = world.database().await;
    (world, running, admin, database)
}

/// Audits one part of the stream.
pub(super) async fn audit(world: &World, request: Value) -> Audit {
    let reply = ask(
        &world.client("operator").await,
        BOOTSTRAP_AUDIT.subject(&[]),
        request,
    )
    .await;
    serde_json::from_value(reply.clone()).unwrap_or_else(|error| panic!("{error}: {reply}"))
}

/// Waits until the worker has nothing left to do.
pub(super) async fn settled(admin: &Client) {
    eventually("everything is acknowledged", SOON, async || {
        let info = api(
            admin,
            "CONSUMER.INFO.CHAT_MESSAGES.persist-message",
            json!({}),
        )
        .await;
        (info["num_pending"] == 0 && info["num_ack_pending"] == 0).then_some(())
    })
    .await;
}

fn offenders(audit: &Audit) -> Vec<(u64, &str)> {
    audit
        .offenders
        .iter()
        .map(|offender| (offender.seq.get(), offender.what.as_str()))
        .collect()
}

const GONE: &str = "acknowledged, and neither stored nor a dead letter";
const TAKEN: &str = "another message is stored here";

/// Messages 1 to 10, one for each thing that can become of a message.
async fn every_kind(world: &World, admin: &Client, database: &PgPool) {
    let with_id = json!({"user": "ann", "text": "with an id", "id": "a-1"}).to_string();
    assert_eq!(publish(admin, "chat.general", &[], &with_id).await, 1);
    publish(admin, "dm.ann.bob", &[], &body("ann", "to be deleted")).await;
    publish(admin, "chat.other", &[], &with_id).await;
    publish(admin, "chat.general", &[], "no json").await;
    let deletion = json!({
        "type": "delete", "target": 2, "id": "seq:2", "derived": true, "user": "ann", "to": "bob",
        "timestamp": 1, "received": received_ms(admin, 2).await, "mode": "soft", "by": "ann",
    });
    publish(admin, "change.dm.ann.bob", &[], &deletion.to_string()).await;
    for text in [
        "removed",
        "lost from the database",
        "overwritten in the database",
    ] {
        publish(admin, "chat.general", &[], &body("ann", text)).await;
    }
    let worker = world.spawn("persist-message").await;
    settled(admin).await;
    worker.kill().await;
    publish(admin, "chat.general", &[], &body("ann", "not stored yet")).await;
    assert_eq!(publish(admin, "chat.general", &[], &with_id).await, 10);
    sqlx::raw_sql(
        "update messages set deleted = true, text = '' where seq = 2;
         update dead_letters set outcome = 'dropped', outcome_at = now() where seq = 4;
         delete from dead_letters where seq = 5;
         insert into changes (seq, room_id, target, sender, id, mode, changed_by, received_at)
         values (5, 1, 2, 'ann', 'seq:2', 'soft', 'ann', now()) on conflict do nothing;
         delete from messages where seq = 7;
         update messages set sender = 'zoe' where seq = 8",
    )
    .execute(database)
    .await
    .unwrap();
    api(admin, "STREAM.MSG.DELETE.CHAT_MESSAGES", json!({"seq": 6})).await;
}

#[tokio::test]
async fn every_message_is_counted_as_what_became_of_it() {
    let (world, running, admin, database) = world().await;
    every_kind(&world, &admin, &database).await;
    let found = audit(&world, json!({})).await;
    let counts = json!({
        "stored": 1, "deleted": 1, "changes": 1, "duplicates": 1,
        "deadLetters": {"id_conflict": 1, "not_json": 1}, "expired": 0, "waiting": 1, "missing": 2,
    });
    assert_eq!(serde_json::to_value(&found.counts).unwrap(), counts);
    assert_eq!(
        (found.from.get(), found.through.get(), found.more),
        (1, 10, false)
    );
    assert_eq!(offenders(&found), [(7, GONE), (8, TAKEN)]);
    assert_eq!(found.offenders[0].subject, "chat.general");

    // Only a part of the stream, and no more offenders than requested.
    let found = audit(&world, json!({"from": 7, "offenders": 1})).await;
    assert_eq!(
        (found.from.get(), found.counts.total(), found.counts.missing),
        (7, 4, 2)
    );
    assert_eq!(offenders(&found), [(7, GONE)]);
    let found = audit(&world, json!({"from": 11})).await;
    assert_eq!(
        (found.through.get(), found.more, found.counts.total()),
        (10, false, 0)
    );

    let worker = world.spawn("persist-message").await;
    settled(&admin).await;
    let found = audit(&world, json!({"from": 9})).await;
    assert_eq!(
        (
            found.counts.stored,
            found.counts.duplicates,
            found.counts.waiting
        ),
        (1, 1, 0)
    );
    worker.kill().await;
    running.stop().await.unwrap();
}

/// The lost stream had another message of the same sender at this sequence, without an id too.
#[tokio::test]
async fn the_row_of_a_lost_stream_is_another_message() {
    let (world, running, admin, database) = world().await;
    publish(&admin, "chat.general", &[], &body("ann", "of this stream")).await;
    let worker = world.spawn("persist-message").await;
    settled(&admin).await;
    assert_eq!(audit(&world, json!({})).await.counts.stored, 1);
    sqlx::raw_sql("update messages set received_at = received_at - interval '1 ms'")
        .execute(&database)
        .await
        .unwrap();
    let found = audit(&world, json!({})).await;
    assert_eq!(
        (found.counts.stored, found.counts.missing, offenders(&found)),
        (0, 1, vec![(1, TAKEN)])
    );
    worker.kill().await;
    running.stop().await.unwrap();
}

/// A direct get fails on these, and the fallback must not leave them out.
#[tokio::test]
async fn what_no_client_can_read_is_counted_too() {
    let (world, running, admin, database) = world().await;
    publish(&admin, "chat.general", &[], &body("ann", "before")).await;
    let mut raw = RawClient::connect(world.nats(), "administrator").await;
    raw.publish_raw(
        "chat.general",
        None,
        Some(b"NATS/1.0\r\nA B: c\r\n\r\n"),
        body("ann", "unreadable").as_bytes(),
    )
    .await;
    raw.publish_raw(
        "chat.general",
        None,
        Some(b"NATS/1.0\r\nNo-Colon\r\n\r\n"),
        body("ann", "unreadable").as_bytes(),
    )
    .await;
    raw.flush().await.unwrap();
    publish(&admin, "chat.general", &[], &body("ann", "after")).await;
    let found = audit(&world, json!({})).await;
    assert_eq!(
        (
            found.counts.waiting,
            found.counts.total(),
            found.through.get()
        ),
        (4, 4, 4)
    );

    // Acknowledged, although nobody stored them.
    api(
        &admin,
        "CONSUMER.RESET.CHAT_MESSAGES.persist-message",
        json!({"seq": 4}),
    )
    .await;
    sqlx::raw_sql(
        "insert into dead_letters (seq, subject, headers, payload, reason, received_at)
         values (3, 'chat.general', '', '', 'malformed_headers', now())",
    )
    .execute(&database)
    .await
    .unwrap();
    // The ack floor may be cached for a moment.
    let found = eventually("the floor is seen", SOON, async || {
        let found = audit(&world, json!({})).await;
        (found.counts.waiting == 1).then_some(found)
    })
    .await;
    assert_eq!(offenders(&found), [(1, GONE), (2, GONE)]);
    assert_eq!(
        (
            found.counts.missing,
            found.counts.dead_letters["malformed_headers"]
        ),
        (2, 1)
    );
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_long_stream_comes_in_parts() {
    const MESSAGES: u64 = 6_000;
    let world = World::builder().administrator().start().await;
    // Enough time for a part of the stream.
    let running = start_with(&world, &[("REQUEST_DEADLINE_MS", "150")])
        .await
        .unwrap();
    let admin = world.client("administrator").await;
    for number in 0..MESSAGES {
        admin
            .publish("chat.general", body("ann", &number.to_string()).into())
            .await
            .unwrap();
    }
    admin.flush().await.unwrap();
    eventually("the stream has them", SOON, async || {
        let state = api(&admin, "STREAM.INFO.CHAT_MESSAGES", json!({})).await["state"].clone();
        (state["last_seq"] == MESSAGES).then_some(())
    })
    .await;
    let operator = world.client("operator").await;
    let mut parts = 0;
    let mut total = 0;
    let mut next = 1;
    loop {
        // A busy machine may not finish even one chunk in time.
        let found: Audit = eventually("a part is audited", SOON, async || {
            let reply = ask(
                &operator,
                BOOTSTRAP_AUDIT.subject(&[]),
                json!({"from": next}),
            )
            .await;
            serde_json::from_value(reply).ok()
        })
        .await;
        assert_eq!(found.from.get(), next);
        assert_eq!(found.counts.total(), found.counts.waiting);
        assert_eq!(found.counts.total(), found.through.get() + 1 - next);
        (parts, total, next) = (
            parts + 1,
            total + found.counts.total(),
            found.through.get() + 1,
        );
        if !found.more {
            break;
        }
    }
    assert_eq!((total, next), (MESSAGES, MESSAGES + 1));
    assert!(parts > 1, "{parts}");
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_wrong_request_is_refused() {
    let (world, running, admin, _) = world().await;
    let operator = world.client("operator").await;
    for request in [json!({"from": -1}), json!({"offenders": 101}), json!([1])] {
        let reply = ask(&operator, BOOTSTRAP_AUDIT.subject(&[]), request).await;
        assert_eq!(reply["error"]["code"], 400, "{reply}");
    }
    // Without a stream the audit fails; "no offenders" would be wrong.
    api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    let reply = ask(&operator, BOOTSTRAP_AUDIT.subject(&[]), json!({})).await;
    assert_eq!(reply["error"]["code"], 409, "{reply}");
    running.stop().await.unwrap();
}
