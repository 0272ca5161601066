//! The promises hold while processes and servers die.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::Client;
use serde_json::{Value, json};

use protocol::endpoints::HISTORY;
use protocol::message::Message;
use testing::{RawClient, SOON, World, eventually};

/// Publishes until the stream acknowledges; returns the sequence.
async fn publish(client: &Client, room: &str, user: &str, id: &str) -> u64 {
    let body = json!({"user": user, "text": format!("text of {id}"), "id": id}).to_string();
    eventually("an acknowledgement", SOON, async || {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(protocol::header::MESSAGE_ID, format!("{user}:{id}"));
        let reply = client
            .request_with_headers(format!("chat.{room}"), headers, body.clone().into())
            .await
            .ok()?;
        serde_json::from_slice::<Value>(&reply.payload).ok()?["seq"]
            .as_u64()
            .filter(|&seq| seq > 0)
    })
    .await
}

/// All messages of the room, read page by page from the newest to the oldest.
async fn whole_room(client: &Client, room: &str) -> Vec<Message> {
    let mut messages: Vec<Message> = Vec::new();
    loop {
        let body = match messages.first() {
            Some(first) => json!({"limit": 500, "before": first.seq}),
            None => json!({"limit": 500}),
        };
        let reply = client
            .request(HISTORY.subject(&[room]), body.to_string().into())
            .await
            .unwrap();
        let headers = reply.headers.unwrap();
        let more = headers
            .get(protocol::header::MORE)
            .unwrap_or_else(|| panic!("{headers:?}"))
            .as_str()
            == "true";
        let mut page: Vec<Message> = serde_json::from_slice(&reply.payload).unwrap();
        page.append(&mut messages);
        messages = page;
        if !more {
            return messages;
        }
    }
}

async fn all_indexed(client: &Client, room: &str) {
    eventually("everything is stored", SOON, async || {
        let reply = client
            .request(HISTORY.subject(&[room]), r#"{"limit":500}"#.into())
            .await
            .ok()?;
        (reply.headers?.get(protocol::header::SOURCE)?.as_str() == "index").then_some(())
    })
    .await;
}

fn check(messages: &[Message], acknowledged: &BTreeMap<u64, String>) {
    let found: BTreeMap<u64, String> = messages
        .iter()
        .map(|message| (message.seq.get(), message.id.clone()))
        .collect();
    assert_eq!(found.len(), messages.len(), "no sequence twice");
    assert!(
        messages.is_sorted_by(|one, next| one.seq < next.seq),
        "in the order of the log"
    );
    assert_eq!(&found, acknowledged);
}

#[tokio::test]
async fn a_worker_killed_in_the_middle_of_a_batch_costs_nothing() {
    let world = World::start().await;
    let client = world.client("publisher").await;
    let _bootstrap = world.with_ack_wait(Duration::from_secs(2)).await;
    let _history = world.spawn("get-history").await;
    let small = [("PERSIST_BATCH", "20")];
    let _steady = world.spawn_with("persist-message", &small).await;
    let mut victim = world.spawn_with("persist-message", &small).await;
    let mut acknowledged = BTreeMap::new();
    for round in 0..4 {
        for number in 0..200 {
            let id = format!("{round}-{number}");
            acknowledged.insert(publish(&client, "general", "ann", &id).await, id);
        }
        victim.kill().await;
        victim = world.spawn_with("persist-message", &small).await;
    }
    // The promise holds at once, however much is stored by then, and again when everything is.
    check(&whole_room(&client, "general").await, &acknowledged);
    let database = world.database().await;
    eventually("all are stored", SOON, async || {
        let stored: i64 = sqlx::query_scalar("select count(*) from messages")
            .fetch_one(&database)
            .await
            .unwrap();
        (stored == acknowledged.len() as i64).then_some(())
    })
    .await;
    check(&whole_room(&client, "general").await, &acknowledged);
}

#[tokio::test]
async fn the_functions_survive_the_death_of_nats() {
    let world = World::start().await;
    let client = world.client("publisher").await;
    let (history, worker) =
        tokio::join!(world.spawn("get-history"), world.spawn("persist-message"));
    let mut acknowledged = BTreeMap::new();
    for round in 0..2 {
        for number in 0..50 {
            let id = format!("{round}-{number}");
            acknowledged.insert(publish(&client, "general", "ann", &id).await, id);
        }
        world.nats().kill().await;
        world.nats().start().await;
    }
    acknowledged.insert(
        publish(&client, "general", "ann", "last").await,
        "last".to_owned(),
    );
    all_indexed(&client, "general").await;
    check(&whole_room(&client, "general").await, &acknowledged);
    assert!(
        history.is_running() && worker.is_running(),
        "the same processes all along"
    );
}

#[tokio::test]
async fn the_functions_survive_the_death_of_postgres() {
    let world = World::with_own_postgres().await;
    let client = world.client("publisher").await;
    let (history, worker) =
        tokio::join!(world.spawn("get-history"), world.spawn("persist-message"));
    let mut acknowledged = BTreeMap::new();
    for round in 0..2 {
        for number in 0..50 {
            let id = format!("{round}-{number}");
            acknowledged.insert(publish(&client, "general", "ann", &id).await, id);
        }
        world.postgres().kill().await;
        acknowledged.insert(
            publish(&client, "general", "ann", &format!("away {round}")).await,
            format!("away {round}"),
        );
        check(&whole_room(&client, "general").await, &acknowledged);
        world.postgres().start().await;
    }
    all_indexed(&client, "general").await;
    check(&whole_room(&client, "general").await, &acknowledged);
    assert!(
        history.is_running() && worker.is_running(),
        "the same processes all along"
    );
}

#[tokio::test]
async fn a_database_that_hangs_does_not_hang_history() {
    let world = World::with_own_postgres().await;
    let client = world.client("publisher").await;
    let _functions = tokio::join!(world.spawn("get-history"), world.spawn("persist-message"));
    let mut acknowledged = BTreeMap::new();
    acknowledged.insert(
        publish(&client, "general", "ann", "before").await,
        "before".to_owned(),
    );
    all_indexed(&client, "general").await;
    world.postgres().pause().await;
    acknowledged.insert(
        publish(&client, "general", "ann", "while it hangs").await,
        "while it hangs".to_owned(),
    );
    check(&whole_room(&client, "general").await, &acknowledged);
    world.postgres().resume();
    all_indexed(&client, "general").await;
    check(&whole_room(&client, "general").await, &acknowledged);
}

#[tokio::test]
async fn stopping_a_copy_under_load_loses_no_request() {
    let world = World::start().await;
    let client = world.client("publisher").await;
    publish(&client, "general", "ann", "one").await;
    let _steady = world.spawn("get-history").await;
    let running = std::sync::atomic::AtomicBool::new(true);
    let asked = std::sync::atomic::AtomicU64::new(0);
    let ask = async || {
        let client = world.client("publisher").await;
        while running.load(std::sync::atomic::Ordering::Relaxed) {
            let reply = client
                .request(HISTORY.subject(&["general"]), "".into())
                .await
                .expect("an answer");
            assert_eq!(
                serde_json::from_slice::<Vec<Message>>(&reply.payload)
                    .expect("a page")
                    .len(),
                1
            );
            asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    };
    let load = futures::future::join_all((0..16).map(|_| ask()));
    let stops = async {
        for _ in 0..5 {
            let copy = world.spawn("get-history").await;
            let before = asked.load(std::sync::atomic::Ordering::Relaxed);
            eventually("it has its share of the load", SOON, async || {
                (asked.load(std::sync::atomic::Ordering::Relaxed) > before + 100).then_some(())
            })
            .await;
            assert!(copy.terminate().await.success());
        }
        running.store(false, std::sync::atomic::Ordering::Relaxed);
    };
    tokio::join!(load, stops);
}

#[tokio::test]
async fn a_forged_reply_subject_reaches_nothing() {
    let world = World::start().await;
    let (history, worker) =
        tokio::join!(world.spawn("get-history"), world.spawn("persist-message"));
    let client = world.client("publisher").await;
    let last = publish(&client, "general", "ann", "one").await;
    let mut raw = RawClient::connect(world.nats(), "publisher").await;
    for reply in [
        "chat.general",
        "dm.bob.carol",
        "$JS.API.STREAM.DELETE.CHAT_MESSAGES",
        "$JS.API.STREAM.PURGE.CHAT_MESSAGES",
        "_INBOXED.x",
    ] {
        raw.publish_raw(&HISTORY.subject(&["general"]), Some(reply), None, b"")
            .await;
        raw.publish_raw(
            &HISTORY.subject(&["general"]),
            Some(reply),
            None,
            b"not json",
        )
        .await;
    }
    raw.flush().await.unwrap();
    let operator = world.client("operator").await;
    eventually("all were counted", SOON, async || {
        let stats = operator
            .request("$SRV.STATS.get-history", "".into())
            .await
            .ok()?;
        let stats: Value = serde_json::from_slice(&stats.payload).ok()?;
        (stats["endpoints"][0]["num_errors"] == 10).then_some(())
    })
    .await;
    assert_eq!(
        publish(&client, "general", "ann", "two").await,
        last + 1,
        "nothing came in between"
    );

    // JetStream sends its acknowledgement to any reply subject; it must not count as a message
    // there.
    let body = json!({"user": "ann", "text": "x"}).to_string();
    raw.publish_raw("chat.general", Some("chat.other"), None, body.as_bytes())
        .await;
    raw.flush().await.unwrap();
    let database = world.database().await;
    eventually("the acknowledgement is dead-lettered", SOON, async || {
        let reason: Option<String> = sqlx::query_scalar("select reason from dead_letters")
            .fetch_optional(&database)
            .await
            .unwrap();
        (reason.as_deref() == Some("publish_ack")).then_some(())
    })
    .await;
    assert!(history.is_running() && worker.is_running());
}

#[tokio::test]
async fn a_worker_that_cannot_move_ends_itself() {
    let world = World::start().await;
    let client = world.client("publisher").await;
    publish(&client, "general", "ann", "held").await;
    // A client pulls the message and never acknowledges it.
    let mut thief = RawClient::connect(world.nats(), "persist-message").await;
    let inbox = thief.inbox();
    thief.subscribe(&inbox).await;
    thief
        .publish_raw(protocol::js_api::CONSUMER_NEXT, Some(&inbox), None, b"1")
        .await;
    assert_eq!(
        thief.next(SOON).await.expect("a delivery").subject,
        "chat.general"
    );
    let worker = world
        .spawn_with("persist-message", &[("PERSIST_STUCK_AFTER_MS", "1000")])
        .await;
    let status = worker.exited(SOON).await;
    assert!(!status.success());
    assert!(
        worker
            .stderr()
            .contains("stuck: 0 messages pending, 1 unacknowledged"),
        "{}",
        worker.stderr()
    );
}
