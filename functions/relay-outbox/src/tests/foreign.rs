//! Messages in `CHAT_EVENTS` that are not events: JetStream's acknowledgements of messages whose
//! reply subject was one of the events' subjects.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;

const BODY: &[u8] = br#"{"user":"mallory","text":"x"}"#;

/// Publishes to the stream, and has the acknowledgement sent to `reply`.
async fn acknowledge_to(client: &mut RawClient, subject: &str, reply: &str) {
    client.publish_raw(subject, Some(reply), None, BODY).await;
    client.flush().await.unwrap();
}

/// Waits for `wanted` events; returns their sequences, without messages that are not events.
async fn real_events(admin: &Client, wanted: usize) -> Vec<u64> {
    eventually("the events are there", SOON * 2, async || {
        let all = match count(admin).await {
            0 => Vec::new(),
            _ => events(admin, 1).await,
        };
        let seqs: Vec<u64> = all
            .iter()
            .filter(|one| !one.header("ce-sequence").is_empty())
            .map(StoredEvent::seq)
            .collect();
        (seqs.len() >= wanted).then_some(seqs)
    })
    .await
}

#[tokio::test]
async fn an_acknowledgement_among_the_events_stops_nothing() {
    let (world, admin, database) = world().await;
    let mut mallory = RawClient::connect(world.nats(), "publisher").await;
    let _worker = world.spawn("persist-message").await;
    let mut wanted = 0;
    // First in the stream, after events, and more of them than are read together; before and while
    // a relay runs.
    for acknowledgements in [1, 3, 700] {
        for _ in 0..2 {
            for _ in 0..acknowledgements {
                acknowledge_to(&mut mallory, "chat.general", "events.v1.chat.general").await;
            }
            wanted += acknowledgements;
            let relay = world.spawn("relay-outbox").await;
            append(
                &admin,
                "chat.general",
                json!({"user": "ann", "text": "x"}),
                HeaderMap::new(),
            )
            .await;
            wanted += 1;
            assert_eq!(real_events(&admin, wanted).await, up_to(wanted as u64));
            acknowledge_to(&mut mallory, "chat.general", "events.v1.x").await;
            wanted += 1;
            assert_eq!(real_events(&admin, wanted).await, up_to(wanted as u64));
            assert!(relay.terminate().await.success());
        }
    }
    eventually("the outbox is empty", SOON, async || {
        (outbox(&database).await == 0).then_some(())
    })
    .await;
}

/// Two hundred a second until everything is relayed, in batches and one by one.
#[tokio::test]
async fn acknowledgements_without_end_do_not_stop_the_events() {
    let (world, admin, database) = world().await;
    const STORED: u64 = 1_500;
    advance(&admin, STORED).await;
    store(&database, 1, STORED as i64, 9).await;
    let mut mallory = RawClient::connect(world.nats(), "publisher").await;
    let running = AtomicBool::new(true);
    let sent = AtomicU64::new(0);
    let attack = async {
        let mut pace = tokio::time::interval(Duration::from_millis(5));
        while running.load(Ordering::Relaxed) {
            pace.tick().await;
            acknowledge_to(&mut mallory, "chat.general", "events.v1.x").await;
            sent.fetch_add(1, Ordering::Relaxed);
        }
    };
    let relaying = async {
        eventually("it has begun", SOON, async || {
            (sent.load(Ordering::Relaxed) > 10).then_some(())
        })
        .await;
        let _relays = tokio::join!(world.spawn("relay-outbox"), world.spawn("relay-outbox"));
        let relayed_all = eventually("everything is relayed", SOON * 4, async || {
            (relayed(&database).await == STORED as i64).then_some(())
        });
        relayed_all.await;
        running.store(false, Ordering::Relaxed);
    };
    tokio::join!(attack, relaying);
    assert_eq!(real_events(&admin, STORED as usize).await, up_to(STORED));
}
