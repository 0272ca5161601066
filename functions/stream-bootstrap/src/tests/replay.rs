//! Replays into an emptied or a restored database, while messages arrive, with two workers, and
//! twice.

use async_nats::Client;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::audit::{audit, settled, world};
use super::sequence_guard::{body, publish};
use super::{SOON, api, ask, check, start_with};
use protocol::audit::Replayed;
use protocol::endpoints::BOOTSTRAP_REPLAY;
use testing::{RawClient, World, eventually};

const MESSAGES: u64 = 600;

async fn replay(world: &World, request: Value) -> Replayed {
    let reply = ask(
        &world.client("operator").await,
        BOOTSTRAP_REPLAY.subject(&[]),
        request,
    )
    .await;
    serde_json::from_value(reply.clone()).unwrap_or_else(|error| panic!("{error}: {reply}"))
}

async fn refused(world: &World, request: Value) -> (u64, String) {
    let reply = ask(
        &world.client("operator").await,
        BOOTSTRAP_REPLAY.subject(&[]),
        request,
    )
    .await;
    (
        reply["error"]["code"]
            .as_u64()
            .unwrap_or_else(|| panic!("{reply}")),
        reply["error"]["reason"].as_str().unwrap().to_owned(),
    )
}

/// Publishes `from..to`, each acknowledged; every tenth is a dead letter.
async fn say(client: &Client, from: u64, to: u64) {
    let mut context = async_nats::jetstream::new(client.clone());
    context.set_timeout(SOON);
    let mut acks = Vec::new();
    for number in from..to {
        let payload = if number % 10 == 0 {
            format!("no json {number}")
        } else {
            body("ann", &number.to_string())
        };
        acks.push(
            context
                .publish(format!("chat.room-{}", number % 7), payload.into())
                .await
                .unwrap(),
        );
    }
    for ack in acks {
        ack.await.unwrap();
    }
}

/// Everything stored: seq and text.
async fn rows(database: &PgPool) -> Vec<(i64, String)> {
    sqlx::query_as("select seq, text from messages order by seq")
        .fetch_all(database)
        .await
        .unwrap()
}

async fn dead_letters(database: &PgPool) -> i64 {
    sqlx::query_scalar("select count(*) from dead_letters")
        .fetch_one(database)
        .await
        .unwrap()
}

/// Checks that all messages below `to` are stored once each.
async fn whole(world: &World, database: &PgPool, to: u64) {
    let expected: Vec<(i64, String)> = (1..to)
        .filter(|number| number % 10 != 0)
        .map(|number| (number as i64, number.to_string()))
        .collect();
    assert_eq!(rows(database).await, expected);
    assert_eq!(dead_letters(database).await, (to as i64 - 1) / 10);
    let found = audit(world, json!({})).await;
    assert_eq!(
        (
            found.counts.missing,
            found.counts.waiting,
            found.counts.total()
        ),
        (0, 0, to - 1),
        "{found:?}"
    );
}

/// How many messages the worker got since the consumer was reset.
async fn delivered(admin: &Client) -> u64 {
    let info = api(
        admin,
        "CONSUMER.INFO.CHAT_MESSAGES.persist-message",
        json!({}),
    )
    .await;
    info["delivered"]["consumer_seq"].as_u64().unwrap()
}

#[tokio::test]
async fn an_emptied_database_is_filled_again_while_users_write() {
    let (world, running, admin, database) = world().await;
    let (one, two) = tokio::join!(
        world.spawn("persist-message"),
        world.spawn("persist-message")
    );
    say(&admin, 1, MESSAGES + 1).await;
    settled(&admin).await;
    for lost in [
        "truncate messages, rooms, dead_letters, changes, duplicates, outbox",
        "drop schema public cascade; create schema public",
    ] {
        sqlx::raw_sql(lost).execute(&database).await.unwrap();
        let last = api(&admin, "STREAM.INFO.CHAT_MESSAGES", json!({})).await["state"]["last_seq"]
            .as_u64()
            .unwrap();
        let talking = tokio::spawn({
            let admin = admin.clone();
            async move { say(&admin, last + 1, last + 301).await }
        });
        let replayed = replay(&world, json!({})).await;
        assert_eq!((replayed.from.get(), replayed.lost), (1, None));
        assert!(replayed.through.get() >= last, "{replayed:?}");
        talking.await.unwrap();
        settled(&admin).await;
        whole(&world, &database, last + 301).await;
    }
    assert!(check(&world).await.ok);
    one.kill().await;
    two.kill().await;
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_restored_database_gets_what_came_after() {
    let (world, running, admin, database) = world().await;
    let worker = world.spawn("persist-message").await;
    say(&admin, 1, MESSAGES + 1).await;
    settled(&admin).await;
    // As from a backup made when sequence 400 was the last.
    for asked in [401, 500, MESSAGES] {
        sqlx::raw_sql(
            "delete from messages where seq > 400; delete from dead_letters where seq > 400",
        )
        .execute(&database)
        .await
        .unwrap();
        assert_eq!(
            audit(&world, json!({})).await.counts.missing,
            MESSAGES - 400
        );
        let replayed = replay(&world, json!({"from": asked})).await;
        // What PostgreSQL lacks is not skipped, although the request asks for a later start.
        assert_eq!(
            (
                replayed.from.get(),
                replayed.through.get(),
                replayed.stored.get(),
                replayed.lost
            ),
            (401, MESSAGES, 400, None)
        );
        settled(&admin).await;
        assert_eq!(delivered(&admin).await, MESSAGES - 400);
        whole(&world, &database, MESSAGES + 1).await;
    }
    // Twice, although nothing is missing.
    for from in [1, 250] {
        assert_eq!(replay(&world, json!({"from": from})).await.from.get(), from);
        settled(&admin).await;
        assert_eq!(delivered(&admin).await, MESSAGES + 1 - from);
        whole(&world, &database, MESSAGES + 1).await;
    }
    worker.kill().await;
    running.stop().await.unwrap();
}

#[tokio::test]
async fn what_nobody_stored_yet_is_not_skipped() {
    let (world, running, admin, database) = world().await;
    let worker = world.spawn("persist-message").await;
    say(&admin, 1, 10).await;
    settled(&admin).await;
    worker.kill().await;
    say(&admin, 10, 20).await;
    // As if one worker had been ahead of another one that died.
    sqlx::raw_sql(
        "insert into dead_letters (seq, subject, headers, payload, reason, received_at)
         values (18, 'chat.general', '', '', 'not_json', now())",
    )
    .execute(&database)
    .await
    .unwrap();
    let replayed = replay(&world, json!({"from": 15})).await;
    assert_eq!((replayed.from.get(), replayed.through.get()), (10, 19));
    let (code, reason) = refused(&world, json!({"from": 20})).await;
    assert_eq!(
        (code, reason.as_str()),
        (
            409,
            "from 20 is beyond the stream's last sequence, 19; 0 means from its first"
        )
    );
    assert_eq!(refused(&world, json!({"from": "all"})).await.0, 400);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn what_neither_holds_any_more_is_reported() {
    let (world, running, admin, database) = world().await;
    // An empty stream: nothing to deliver, nothing lost.
    let replayed = replay(&world, json!({})).await;
    assert_eq!(
        (replayed.through.get(), replayed.stored.get(), replayed.lost),
        (0, 0, None)
    );
    let worker = world.spawn("persist-message").await;
    say(&admin, 1, 101).await;
    settled(&admin).await;
    api(&admin, "STREAM.PURGE.CHAT_MESSAGES", json!({"seq": 61})).await;
    assert_eq!(replay(&world, json!({})).await.lost, None);
    settled(&admin).await;
    let lost = async |statement: &'static str| {
        sqlx::raw_sql(statement).execute(&database).await.unwrap();
        let replayed = replay(&world, json!({})).await;
        settled(&admin).await;
        (
            replayed.from.get(),
            replayed.lost.map(|(first, last)| (first.get(), last.get())),
        )
    };
    assert_eq!(
        lost("delete from messages where seq > 60; delete from dead_letters where seq > 60").await,
        (61, None)
    );
    assert_eq!(
        lost("delete from messages where seq > 35; delete from dead_letters where seq > 35").await,
        (61, Some((36, 60)))
    );
    assert_eq!(
        lost("truncate messages, dead_letters").await,
        (61, Some((1, 60)))
    );
    assert_eq!(audit(&world, json!({})).await.counts.missing, 0);
    worker.kill().await;
    running.stop().await.unwrap();
}

/// Pulls one message as a worker would, without acknowledging it; returns its reply subject.
async fn take(worker: &mut RawClient) -> String {
    let inbox = worker.inbox();
    worker.subscribe(&inbox).await;
    worker
        .publish_raw(
            protocol::js_api::CONSUMER_NEXT,
            Some(&inbox),
            None,
            br#"{"batch":1}"#,
        )
        .await;
    worker
        .next(SOON)
        .await
        .expect("a delivery")
        .reply
        .expect("a subject to acknowledge on")
}

async fn acknowledge(worker: &mut RawClient, delivery: &str) {
    worker.publish_raw(delivery, None, None, b"+ACK").await;
    worker.flush().await.unwrap();
}

async fn floor(admin: &Client) -> (u64, u64) {
    let info = api(
        admin,
        "CONSUMER.INFO.CHAT_MESSAGES.persist-message",
        json!({}),
    )
    .await;
    (
        info["ack_floor"]["stream_seq"].as_u64().unwrap(),
        info["num_ack_pending"].as_u64().unwrap(),
    )
}

/// Why the consumer is paused: the server counts an acknowledgement from before the reset for the
/// second delivery.
#[tokio::test]
async fn an_old_acknowledgement_counts_for_the_new_delivery() {
    let (world, running, admin, _) = world().await;
    publish(&admin, "chat.general", &[], &body("ann", "hello")).await;
    let mut worker = RawClient::connect(world.nats(), "persist-message").await;
    let first = take(&mut worker).await;
    api(
        &admin,
        "CONSUMER.RESET.CHAT_MESSAGES.persist-message",
        json!({"seq": 1}),
    )
    .await;
    take(&mut worker).await;
    assert_eq!(floor(&admin).await, (0, 1));
    acknowledge(&mut worker, &first).await;
    eventually("it counted", SOON, async || {
        (floor(&admin).await == (1, 0)).then_some(())
    })
    .await;
    running.stop().await.unwrap();
}

#[tokio::test]
async fn what_was_delivered_before_gets_time_to_be_acknowledged() {
    let (world, running, admin, _) = world().await;
    publish(&admin, "chat.general", &[], &body("ann", "hello")).await;
    let mut worker = RawClient::connect(world.nats(), "persist-message").await;
    let first = take(&mut worker).await;
    let operator = world.client("operator").await;
    let replaying =
        tokio::spawn(async move { ask(&operator, BOOTSTRAP_REPLAY.subject(&[]), json!({})).await });
    eventually("the worker is held back", SOON, async || {
        let info = api(
            &admin,
            "CONSUMER.INFO.CHAT_MESSAGES.persist-message",
            json!({}),
        )
        .await;
        (info["paused"] == true).then_some(())
    })
    .await;
    acknowledge(&mut worker, &first).await;
    let replayed = replaying.await.unwrap();
    assert_eq!(
        (&replayed["from"], &replayed["error"]),
        (&json!(1), &Value::Null),
        "{replayed}"
    );
    // It is delivered again, and the consumer is not paused any more.
    assert_eq!(floor(&admin).await, (0, 0));
    take(&mut worker).await;
    assert_eq!(floor(&admin).await, (0, 1));
    running.stop().await.unwrap();
}

#[tokio::test]
async fn no_replay_runs_beside_an_apply() {
    let world = World::builder().administrator().start().await;
    let running = start_with(&world, &[("REQUEST_DEADLINE_MS", "500")])
        .await
        .unwrap();
    let admin = world.client("administrator").await;
    let database = world.database().await;
    let worker = world.spawn("persist-message").await;
    say(&admin, 1, 10).await;
    settled(&admin).await;
    worker.kill().await;
    let mut other = database.acquire().await.unwrap();
    sqlx::query("select pg_advisory_lock($1)")
        .bind(crate::bootstrap::LOCK)
        .execute(&mut *other)
        .await
        .unwrap();
    assert_eq!(refused(&world, json!({})).await.0, 503);
    assert_eq!(floor(&admin).await, (9, 0));
    // It finishes although the caller has stopped waiting.
    drop(other.detach());
    eventually("it was replayed", SOON, async || {
        (floor(&admin).await == (0, 0)).then_some(())
    })
    .await;
    running.stop().await.unwrap();
}
