//! A thousand users send at once, while the functions they depend on are killed.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::Client;
use futures::future::join_all;
use serde_json::{Value, json};

use protocol::audit::Audit;
use protocol::endpoints::{BOOTSTRAP_AUDIT, HISTORY, SEND};
use protocol::header;
use protocol::message::Message;
use protocol::send::SendAck;
use testing::{Process, SOON, World, eventually};

const SENDERS: usize = 1_000;
const EACH: usize = 3;
const ROOMS: usize = 5;
const CONNECTIONS: usize = 25;
const KILLS: usize = 6;

/// Sends until the message is acknowledged, now and then once more, and returns its position.
async fn send(client: &Client, user: &str, number: usize) -> u64 {
    let room = format!("room-{}", number % ROOMS);
    let id = format!("{user}-{number}");
    let body = json!({"text": format!("text of {id}"), "id": id}).to_string();
    let once = async || {
        let reply = client
            .request(SEND.subject(&[user, &room]), body.clone().into())
            .await
            .ok()?;
        let ack: SendAck = match serde_json::from_slice(&reply.payload) {
            Ok(ack) => ack,
            Err(_) => {
                let error: Value = serde_json::from_slice(&reply.payload).unwrap();
                assert_eq!(error["error"]["retryable"], true, "{error}");
                return None;
            }
        };
        assert_eq!(ack.message_id, id);
        Some(ack.seq.get())
    };
    let seq = eventually("an acknowledgement", SOON, once).await;
    if (seq + number as u64).is_multiple_of(3) {
        assert_eq!(
            eventually("another", SOON, once).await,
            seq,
            "the same id stands in the same place"
        );
    }
    seq
}

#[tokio::test]
async fn every_acknowledged_message_stands_once_where_it_was_acknowledged() {
    let world = World::start().await;
    let _bootstrap = world.with_ack_wait(Duration::from_secs(2)).await;
    let _history = world.spawn("get-history").await;
    let _steady = (
        world.spawn("send-message").await,
        world.spawn("persist-message").await,
    );
    let clients = join_all((0..CONNECTIONS).map(|_| world.client("publisher"))).await;
    let done = AtomicUsize::new(0);
    let sender = async |number: usize| {
        let client = &clients[number % CONNECTIONS];
        let user = format!("user-{number}");
        let mut acknowledged = Vec::with_capacity(EACH);
        for message in 0..EACH {
            let seq = send(client, &user, number + message).await;
            acknowledged.push(((user.clone(), format!("{user}-{}", number + message)), seq));
            done.fetch_add(1, Ordering::Relaxed);
        }
        acknowledged
    };
    let kills = async {
        let mut victims: Vec<(&str, Process)> = Vec::new();
        for kill in 1..=KILLS {
            for name in ["send-message", "persist-message"] {
                victims.push((
                    name,
                    world.spawn_with(name, &[("PERSIST_BATCH", "50")]).await,
                ));
            }
            // The kills are spread over the whole time of sending, however fast it is.
            eventually("more was sent", SOON, async || {
                (done.load(Ordering::Relaxed) >= SENDERS * EACH * kill / (KILLS + 1)).then_some(())
            })
            .await;
            for (_, victim) in victims.drain(..) {
                victim.kill().await;
            }
        }
    };
    let (sent, ()) = tokio::join!(join_all((0..SENDERS).map(sender)), kills);
    let acknowledged: HashMap<(String, String), u64> = sent.into_iter().flatten().collect();
    assert_eq!(acknowledged.len(), SENDERS * EACH);

    let operator = world.client("operator").await;
    let database = world.database().await;
    let audit = eventually("everything is stored", SOON, async || {
        let reply = operator
            .request(BOOTSTRAP_AUDIT.subject(&[]), "".into())
            .await
            .ok()?;
        let audit: Audit = serde_json::from_slice(&reply.payload).ok()?;
        (audit.counts.waiting == 0 && !audit.more).then_some(audit)
    })
    .await;
    assert_eq!(
        (audit.counts.missing, audit.offenders.len()),
        (0, 0),
        "{audit:?}"
    );
    assert_eq!(audit.counts.stored, (SENDERS * EACH) as u64, "{audit:?}");

    let stored: Vec<(String, String, i64)> = sqlx::query_as("select sender, id, seq from messages")
        .fetch_all(&database)
        .await
        .unwrap();
    let stored: HashMap<(String, String), u64> = stored
        .into_iter()
        .map(|(user, id, seq)| ((user, id), seq as u64))
        .collect();
    assert!(
        stored == acknowledged,
        "what is stored is what was acknowledged"
    );
    // The room as readers get it.
    let mut read = HashMap::new();
    for room in 0..ROOMS {
        let mut after = 0;
        let mut more = true;
        while more {
            let body = json!({"after": after, "limit": 500}).to_string();
            let page = clients[0]
                .request(HISTORY.subject(&[&format!("room-{room}")]), body.into())
                .await
                .unwrap();
            let header = |name: &str| page.headers.as_ref().unwrap().get(name).unwrap().as_str();
            (after, more) = (
                header(header::THROUGH).parse().unwrap(),
                header(header::MORE) == "true",
            );
            for message in serde_json::from_slice::<Vec<Message>>(&page.payload).unwrap() {
                assert_eq!(message.text, format!("text of {}", message.id));
                assert_eq!(
                    read.insert((message.user, message.id), message.seq.get()),
                    None,
                    "no message twice"
                );
            }
        }
    }
    assert!(
        read == acknowledged,
        "what is read is what was acknowledged"
    );
}
