//! Connections that break, replicas that stop, a database that is away.

use std::time::Instant;

use super::bad::{bad_messages, send_bad};
use super::*;

#[tokio::test]
async fn what_is_sent_to_a_lost_connection_is_fetched() {
    const GOOD: usize = 60;
    let world = World::start().await;
    let worker = worker(&world).await;
    let database = world.database().await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    let bad = bad_messages()
        .into_iter()
        .find(|message| message.3 == "malformed_headers")
        .unwrap();
    let mut rounds = Vec::new();
    for round in 1..=12 {
        let begun = Instant::now();
        send_bad(&mut client, &bad).await;
        // One by one, each when the server has the one before: some come while the connection is
        // being repaired.
        for number in 0..GOOD {
            let body = json!({"user": "ann", "text": number.to_string()}).to_string();
            client
                .publish_raw("chat.general", None, None, body.as_bytes())
                .await;
            client.flush().await.unwrap();
        }
        stored(&database, (round * GOOD) as i64, WITHIN).await;
        rounds.push(begun.elapsed());
    }
    // Nor does one after the other make the pause longer, which would be 2.5 s at least by now.
    let fastest = rounds.iter().skip(8).min().unwrap();
    assert!(*fastest < Duration::from_secs(2), "{rounds:?}");
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn what_another_replica_has_under_way_is_not_fetched_when_a_connection_breaks() {
    const THEIRS: usize = 3_000;
    const GOOD: usize = 60;
    let world = World::start().await;
    let database = world.database().await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    for number in 0..THEIRS {
        let body = json!({"user": "zoe", "text": number.to_string()}).to_string();
        client
            .publish_raw("chat.general", None, None, body.as_bytes())
            .await;
    }
    logged(&world.client("operator").await, THEIRS).await;
    let (_other, held) = taken(&world, THEIRS).await;
    assert_eq!(held.len(), THEIRS);
    let worker = worker(&world).await;
    let bad = bad_messages()
        .into_iter()
        .find(|message| message.3 == "malformed_headers")
        .unwrap();
    send_bad(&mut client, &bad).await;
    for number in 0..GOOD {
        let body = json!({"user": "ann", "text": number.to_string()}).to_string();
        client
            .publish_raw("chat.general", None, None, body.as_bytes())
            .await;
    }
    client.flush().await.unwrap();
    eventually("ours are stored", SOON, async || {
        (count(
            &database,
            "select count(*) from messages where sender = 'ann'",
        )
        .await
            == GOOD as i64)
            .then_some(())
    })
    .await;
    eventually("the bad one is a dead letter", SOON, async || {
        (count(&database, "select count(*) from dead_letters").await == 1).then_some(())
    })
    .await;
    assert_eq!(
        count(
            &database,
            "select count(*) from messages where sender = 'zoe'"
        )
        .await,
        0,
        "theirs are theirs"
    );
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn a_paused_consumer_is_no_reason_to_leave() {
    const PAUSE: Duration = Duration::from_secs(10);
    let world = World::builder().administrator().start().await;
    let admin = world.client("administrator").await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let running = world
        .spawn_with("persist-message", &[("PERSIST_STUCK_AFTER_MS", "3000")])
        .await;
    let until = (time::OffsetDateTime::now_utc() + PAUSE)
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap();
    let subject = "$JS.API.CONSUMER.PAUSE.CHAT_MESSAGES.persist-message";
    let paused = admin
        .request(subject, json!({ "pause_until": until }).to_string().into())
        .await
        .unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&paused.payload).unwrap()["paused"],
        true,
        "{paused:?}"
    );
    publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"later"}"#,
    )
    .await;
    eventually("it says so", SOON, async || {
        running.stderr().contains("is paused").then_some(())
    })
    .await;
    // By itself, when the pause is over.
    stored(&database, 1, SOON).await;
    assert!(
        running.is_running() && !running.stderr().contains("stuck"),
        "{}",
        running.stderr()
    );
    assert!(running.terminate().await.success());
}

#[tokio::test]
async fn a_replica_that_stops_naks_what_it_has_not_begun() {
    const MESSAGES: usize = 20_000;
    let world = World::start().await;
    // Unprocessed messages that are not nak'ed would be delivered again after this.
    let _bootstrap = world.with_ack_wait(Duration::from_secs(3600)).await;
    let database = world.database().await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    for number in 0..MESSAGES {
        let body = json!({"user": "ann", "text": number.to_string()}).to_string();
        client
            .publish_raw("chat.general", None, None, body.as_bytes())
            .await;
    }
    logged(&world.client("operator").await, MESSAGES).await;
    let stays = worker(&world).await;
    let leaves = worker(&world).await;
    eventually("storing is under way", SOON, async || {
        (count(&database, "select count(*) from messages").await > 0).then_some(())
    })
    .await;
    leaves.stop().await.unwrap();
    stored(&database, MESSAGES as i64, 3 * SOON).await;
    stays.stop().await.unwrap();
}

#[tokio::test]
async fn while_the_database_is_away_nothing_is_spent() {
    let world = World::with_own_postgres().await;
    let worker = worker(&world).await;
    let publisher = world.client("publisher").await;
    publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"before"}"#,
    )
    .await;
    settled(&world).await;
    world.postgres().stop().await;
    for number in 0..50 {
        publish(
            &publisher,
            "chat.general",
            None,
            &json!({"user": "ann", "text": format!("{number}")}).to_string(),
        )
        .await;
    }
    let operator = world.client("operator").await;
    eventually("the worker has taken some", SOON, async || {
        let info = operator
            .request(protocol::js_api::CONSUMER_INFO, "".into())
            .await
            .ok()?;
        let info: Value = serde_json::from_slice(&info.payload).ok()?;
        (info["num_ack_pending"].as_u64()? > 0).then_some(())
    })
    .await;
    world.postgres().start().await;
    let database = world.database().await;
    stored(&database, 51, SOON).await;
    let info = settled(&world).await;
    assert_eq!(info["num_redelivered"], 0);
    assert_eq!(
        info["delivered"]["consumer_seq"], 51,
        "each delivered once: {info}"
    );
    assert_eq!(
        count(&database, "select count(*) from dead_letters").await,
        0
    );
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn a_worker_without_work_waits_for_its_consumer() {
    let world = World::bare().await;
    let worker = worker(&world).await;
    let bootstrap = world.spawn("stream-bootstrap").await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"x"}"#,
    )
    .await;
    stored(&database, 1, SOON).await;
    worker.stop().await.unwrap();
    assert!(bootstrap.terminate().await.success());
}
