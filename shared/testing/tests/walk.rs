//! One walk through everything: messages are sent, received live, published as events, synced,
//! deleted and replayed, and all clients have the same at any time.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::BTreeMap;

use async_nats::{Client, Message as Heard, Subscriber};
use futures::StreamExt;
use serde_json::{Value, json};

use protocol::audit::AuditCounts;
use protocol::endpoints::{BOOTSTRAP_AUDIT, BOOTSTRAP_REPLAY, DELETE, HISTORY, SEND, SYNC};
use protocol::header;
use protocol::message::Message;
use protocol::send::SendAck;
use protocol::sync::SyncPage;
use testing::{SOON, World, eventually};

/// The room as a client has it: by position, the text and whether it is a tombstone.
type Held = BTreeMap<u64, (String, bool)>;

async fn ask(client: &Client, subject: String, body: Value) -> Vec<u8> {
    let reply = client
        .request(subject.clone(), body.to_string().into())
        .await
        .unwrap();
    assert!(
        reply
            .headers
            .as_ref()
            .is_none_or(|headers| headers.get(header::SERVICE_ERROR).is_none()),
        "{subject}: {:?}",
        reply.payload
    );
    reply.payload.to_vec()
}

async fn send(client: &Client, user: &str, text: &str, id: &str) -> SendAck {
    serde_json::from_slice(
        &ask(
            client,
            SEND.subject(&[user, "general"]),
            json!({"text": text, "id": id}),
        )
        .await,
    )
    .unwrap()
}

async fn delete(client: &Client, user: &str, body: Value) {
    ask(client, DELETE.subject(&[user, "general"]), body).await;
}

/// A client that subscribes to live messages.
struct Listener {
    live: Subscriber,
    held: Held,
    last: u64,
}

impl Listener {
    async fn start(client: &Client) -> Listener {
        let live = client.subscribe("live.>").await.unwrap();
        client.flush().await.unwrap();
        Listener {
            live,
            held: Held::new(),
            last: 0,
        }
    }

    /// Waits until the message at `seq` has arrived.
    async fn until(&mut self, seq: u64) {
        while self.last < seq {
            let heard = tokio::time::timeout(SOON, self.live.next())
                .await
                .unwrap()
                .unwrap();
            let body: Value = serde_json::from_slice(&heard.payload).unwrap();
            self.last = position(&heard);
            match body["target"].as_u64() {
                Some(target) => _ = self.held.insert(target, (String::new(), true)),
                None => {
                    _ = self.held.insert(
                        self.last,
                        (body["text"].as_str().unwrap().to_owned(), false),
                    )
                }
            }
        }
        assert_eq!(self.last, seq);
    }
}

fn position(heard: &Heard) -> u64 {
    heard
        .headers
        .as_ref()
        .unwrap()
        .get("Nats-Sequence")
        .unwrap()
        .as_str()
        .parse()
        .unwrap()
}

/// A client that was offline: it syncs from 0 until there is no more.
async fn synced(client: &Client) -> Held {
    let mut held = Held::new();
    let mut after = 0;
    loop {
        let page: SyncPage = serde_json::from_slice(
            &ask(
                client,
                SYNC.subject(&["general"]),
                json!({"after": after, "limit": 2}),
            )
            .await,
        )
        .unwrap();
        held.extend(
            page.messages
                .into_iter()
                .map(|message| (message.seq.get(), (message.text, message.deleted))),
        );
        for change in page.changes {
            held.insert(change.target.get(), (String::new(), true));
        }
        after = page.through.get();
        if !page.more {
            return held;
        }
    }
}

async fn read(client: &Client) -> Held {
    let page: Vec<Message> =
        serde_json::from_slice(&ask(client, HISTORY.subject(&["general"]), json!({})).await)
            .unwrap();
    page.into_iter()
        .map(|message| (message.seq.get(), (message.text, message.deleted)))
        .collect()
}

/// The next event: its type and position.
async fn event(events: &mut Subscriber) -> (String, u64) {
    let event = tokio::time::timeout(SOON, events.next())
        .await
        .unwrap()
        .unwrap();
    assert!(
        !String::from_utf8_lossy(&event.payload).contains("secret"),
        "an event carries no text"
    );
    let kind = event
        .headers
        .as_ref()
        .unwrap()
        .get("ce-type")
        .unwrap()
        .as_str()
        .to_owned();
    let data: Value = serde_json::from_slice(&event.payload).unwrap();
    (kind, data["seq"].as_u64().unwrap())
}

#[tokio::test]
async fn all_clients_have_the_same_whatever_happens() {
    let world = World::start().await;
    let functions = [
        "stream-bootstrap",
        "persist-message",
        "get-history",
        "send-message",
        "sync-messages",
        "delete-message",
        "relay-outbox",
    ];
    let _running = futures::future::join_all(functions.map(|name| world.spawn(name))).await;
    let client = world.client("publisher").await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let mut live = Listener::start(&client).await;
    let mut events = client.subscribe("events.v1.>").await.unwrap();
    client.flush().await.unwrap();

    // A message is acknowledged, received live and published as stored, each with the same
    // position.
    let mut sent = Vec::new();
    for (user, id) in [("ann", "a"), ("bob", "b"), ("ann", "c"), ("bob", "d")] {
        let ack = send(&client, user, &format!("secret {id}"), id).await;
        assert!(!ack.duplicate);
        live.until(ack.seq.get()).await;
        assert_eq!(live.held[&ack.seq.get()], (format!("secret {id}"), false));
        assert_eq!(
            event(&mut events).await,
            ("scrollback.message.stored".to_owned(), ack.seq.get())
        );
        sent.push(ack.seq.get());
    }
    assert_eq!(synced(&client).await, live.held);

    // A soft and a hard deletion.
    for (user, body, change) in [
        ("ann", json!({"id": "a"}), 5),
        ("bob", json!({"seq": sent[3], "mode": "hard"}), 6),
    ] {
        delete(&client, user, body).await;
        live.until(change).await;
        assert_eq!(
            event(&mut events).await,
            ("scrollback.message.deleted".to_owned(), change)
        );
    }
    let wanted: Held = [
        (sent[0], ""),
        (sent[1], "secret b"),
        (sent[2], "secret c"),
        (sent[3], ""),
    ]
    .map(|(seq, text)| (seq, (text.to_owned(), text.is_empty())))
    .into();
    assert_eq!(live.held, wanted);
    assert_eq!(
        (synced(&client).await, read(&client).await),
        (wanted.clone(), wanted.clone())
    );

    // The database is lost, and the stream is replayed into an empty one.
    sqlx::raw_sql("truncate messages, rooms, changes, duplicates, outbox, dead_letters")
        .execute(&database)
        .await
        .unwrap();
    ask(&operator, BOOTSTRAP_REPLAY.subject(&[]), json!({})).await;
    let counts = eventually("everything is stored again", SOON, async || {
        let audit: Value =
            serde_json::from_slice(&ask(&operator, BOOTSTRAP_AUDIT.subject(&[]), json!({})).await)
                .unwrap();
        let counts: AuditCounts = serde_json::from_value(audit["counts"].clone()).unwrap();
        (counts.waiting == 0).then_some(counts)
    })
    .await;
    // One message was erased from the stream, so its tombstone comes from its deletion.
    assert_eq!(
        (
            counts.stored,
            counts.deleted,
            counts.changes,
            counts.duplicates,
            counts.missing
        ),
        (2, 1, 2, 0, 0)
    );
    assert_eq!(
        (synced(&client).await, read(&client).await),
        (wanted.clone(), wanted.clone())
    );

    // Sending a deleted message again returns its old position; a new message gets a new one.
    let again = send(&client, "ann", "secret a", "a").await;
    assert_eq!((again.seq.get(), again.duplicate), (sent[0], true));
    let new = send(&client, "ann", "secret e", "e").await;
    live.until(new.seq.get()).await;
    assert_eq!(
        event(&mut events).await,
        ("scrollback.message.stored".to_owned(), new.seq.get()),
        "nothing of the replay was published again"
    );
    assert_eq!(
        (synced(&client).await, read(&client).await),
        (live.held.clone(), live.held.clone())
    );
}
