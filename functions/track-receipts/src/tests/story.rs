//! Two users, one of them away, and everything between them.

use std::time::Duration;

use async_nats::{Client, Subscriber};
use futures::StreamExt;
use serde_json::{Value, json};

use super::{SOON, append, ask, deliver, history, inbox, read_direct};
use protocol::endpoints::{DM_HISTORY, DM_INBOX, DM_SEND, DM_SYNC};
use testing::{Process, World, eventually};

/// All but `stream-bootstrap`, which is started with settings of its own.
const FUNCTIONS: [&str; 9] = [
    "persist-message",
    "send-message",
    "get-history",
    "sync-messages",
    "track-receipts",
    "relay-outbox",
    "delete-message",
    "enforce-retention",
    "manage-dead-letters",
];

/// Every function, as a process.
struct All<'a> {
    world: &'a World,
    running: Vec<Process>,
    restarts: bool,
}

impl All<'_> {
    async fn start(world: &World, restarts: bool) -> All<'_> {
        let mut all = All {
            world,
            running: Vec::new(),
            restarts,
        };
        all.run().await;
        all
    }

    /// Restarts everything, in the test that restarts: no process that served a request so far is
    /// there afterwards.
    async fn restart(&mut self) {
        if self.restarts {
            let ended =
                futures::future::join_all(self.running.drain(..).map(Process::terminate)).await;
            assert!(
                ended.iter().all(std::process::ExitStatus::success),
                "{ended:?}"
            );
            self.run().await;
        }
    }

    async fn run(&mut self) {
        // Messages that were delivered to a worker while it stopped are redelivered soon.
        self.running
            .push(self.world.with_ack_wait(Duration::from_secs(2)).await);
        for name in FUNCTIONS {
            self.running.push(self.world.spawn(name).await);
        }
    }
}

fn row(seq: u64, text: &str, status: &str) -> (u64, String, String) {
    (seq, text.to_owned(), status.to_owned())
}

async fn send(client: &Client, from: &str, to: &str, text: &str) {
    let sent = ask(
        client,
        DM_SEND.subject(&[from, to]),
        &json!({ "text": text }).to_string(),
    )
    .await
    .unwrap();
    assert_eq!(
        (&sent["type"], &sent["status"], &sent["duplicate"]),
        (&json!("ack"), &json!("sent"), &json!(false)),
        "{sent}"
    );
}

/// Waits for the event of a receipt of bob's; the same event may come again.
async fn heard(events: &mut Subscriber, kind: &str, through: u64) {
    let wanted = json!({"user": "bob", "room": "dm.alice.bob", "through": through});
    loop {
        let event = tokio::time::timeout(SOON, events.next())
            .await
            .unwrap_or_else(|_| panic!("{kind} {through} never came"))
            .unwrap();
        let event_type = event
            .headers
            .as_ref()
            .unwrap()
            .get("ce-type")
            .unwrap()
            .as_str()
            .to_owned();
        if event_type == format!("scrollback.receipt.{kind}") {
            assert_eq!(
                serde_json::from_slice::<Value>(&event.payload).unwrap(),
                wanted
            );
            return;
        }
    }
}

#[tokio::test]
async fn bob_was_away() {
    run_story(false).await;
}

#[tokio::test]
async fn bob_was_away_and_everything_is_restarted_all_the_time() {
    run_story(true).await;
}

async fn run_story(restarts: bool) {
    let world = World::builder().administrator().start().await;
    let mut all = All::start(&world, restarts).await;
    let client = world.client("publisher").await;
    let mut alice = client.subscribe("events.v1.dm.alice.bob").await.unwrap();
    for text in ["one", "two", "three"] {
        send(&client, "alice", "bob", text).await;
    }
    send(&client, "carol", "dave", "not for bob").await;
    all.restart().await;
    let three = |status: [&str; 3]| {
        vec![
            row(1, "one", status[0]),
            row(2, "two", status[1]),
            row(3, "three", status[2]),
        ]
    };
    assert_eq!(history(&client, "alice", "bob").await, three(["sent"; 3]));
    all.restart().await;
    assert_eq!(inbox(&client, "bob").await, three(["sent"; 3]));
    // Bob's client stops before it confirms: sending a page to it does not count as delivery.
    all.restart().await;
    assert_eq!(history(&client, "alice", "bob").await, three(["sent"; 3]));
    let waits = ask(&client, DM_INBOX.subject(&["bob"]), "").await.unwrap();
    assert_eq!(
        super::shown(&waits["messages"]),
        three(["sent"; 3]),
        "the same three"
    );
    assert_eq!(inbox(&client, "alice").await, []);

    let through = waits["through"].as_u64().unwrap();
    assert_eq!(deliver(&client, "bob", through).await, (through, true));
    all.restart().await;
    heard(&mut alice, "delivered", through).await;
    assert_eq!(
        history(&client, "alice", "bob").await,
        three(["delivered"; 3])
    );
    assert_eq!(inbox(&client, "bob").await, []);
    all.restart().await;
    assert_eq!(read_direct(&client, "bob", "alice", 2).await, (2, true));
    all.restart().await;
    heard(&mut alice, "read", 2).await;
    let now = three(["read", "read", "delivered"]);
    assert_eq!(history(&client, "alice", "bob").await, now);
    assert_eq!(history(&client, "bob", "alice").await, now);
    let sync = ask(
        &client,
        DM_SYNC.subject(&["alice", "bob"]),
        r#"{"after":0}"#,
    )
    .await
    .unwrap();
    assert_eq!(super::shown(&sync["messages"]), now);
    when(&client).await;
    all.restart().await;
    when(&client).await;
    check_events(&world, through).await;
}

/// Alice asks when her messages were delivered and read; only with `receipts` the reply says so.
async fn when(client: &Client) {
    let reply = ask(
        client,
        DM_HISTORY.subject(&["alice", "bob"]),
        r#"{"receipts":true}"#,
    )
    .await
    .unwrap();
    let at = |message: usize, field: &str| reply[message][field].as_i64();
    for message in 0..3 {
        assert_eq!(at(message, "readAt").is_some(), message < 2, "{reply}");
        assert!(
            at(message, "deliveredAt").unwrap() > 1_700_000_000_000,
            "{reply}"
        );
        assert!(
            at(message, "readAt").is_none_or(|read| read >= at(message, "deliveredAt").unwrap()),
            "{reply}"
        );
    }
    let plain = ask(client, DM_HISTORY.subject(&["alice", "bob"]), "")
        .await
        .unwrap();
    assert!(
        plain[0]["deliveredAt"].is_null() && plain[0]["readAt"].is_null(),
        "{plain}"
    );
}

/// Each event comes once, and after the message that it concerns.
async fn check_events(world: &World, through: u64) {
    let events = events(world, 6).await;
    let dm = "events.v1.dm.alice.bob";
    let receipts: Vec<&(String, String, Value)> = events
        .iter()
        .filter(|(_, kind, _)| kind.starts_with("scrollback.receipt."))
        .collect();
    let data = |through: u64| json!({"user": "bob", "room": "dm.alice.bob", "through": through});
    assert_eq!(
        receipts,
        [
            &(
                dm.to_owned(),
                "scrollback.receipt.delivered".to_owned(),
                data(through)
            ),
            &(dm.to_owned(), "scrollback.receipt.read".to_owned(), data(2)),
        ]
    );
    let place = |kind: &str, key: &str, value: u64| {
        events
            .iter()
            .position(|event| event.1.ends_with(kind) && event.2[key] == value)
            .unwrap()
    };
    assert!(
        place("message.stored", "seq", 3) < place("receipt.delivered", "through", through),
        "{events:?}"
    );
    assert!(
        place("receipt.delivered", "through", through) < place("receipt.read", "through", 2),
        "{events:?}"
    );
}

/// Subject, type and data of every event, once there are `wanted`.
async fn events(world: &World, wanted: u64) -> Vec<(String, String, Value)> {
    let admin = world.client("administrator").await;
    eventually("the events are there", SOON, async || {
        let info = admin
            .request("$JS.API.STREAM.INFO.CHAT_EVENTS", "".into())
            .await
            .unwrap();
        let info: Value = serde_json::from_slice(&info.payload).unwrap();
        (info["state"]["messages"] == wanted).then_some(())
    })
    .await;
    let stream = async_nats::jetstream::new(admin)
        .get_stream("CHAT_EVENTS")
        .await
        .unwrap();
    let mut events = Vec::new();
    for seq in 1..=wanted {
        let event = stream.get_raw_message(seq).await.unwrap();
        let kind = event.headers.get("ce-type").unwrap().as_str().to_owned();
        events.push((
            event.subject.to_string(),
            kind,
            serde_json::from_slice(&event.payload).unwrap(),
        ));
    }
    events
}

#[tokio::test]
async fn a_read_message_is_delivered_and_a_deleted_one_comes_as_a_tombstone() {
    let world = World::start().await;
    let _all = tokio::join!(
        world.spawn("sync-messages"),
        world.spawn("get-history"),
        world.spawn("track-receipts")
    );
    let client = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    for text in ["one", "two"] {
        append(
            &client,
            "dm.alice.bob",
            json!({"user": "alice", "text": text, "id": text}),
        )
        .await;
    }
    append(
        &client,
        "dm.carol.bob",
        json!({"user": "carol", "text": "three", "id": "three"}),
    )
    .await;
    let deletion = json!({
        "type": "delete", "target": 1, "id": "one", "user": "alice", "to": "bob",
        "timestamp": 1_700_000_000_000_i64, "received": 4_000_000_000_000_i64, "mode": "soft",
        "by": "alice",
    });
    append(&bootstrap, "change.dm.alice.bob", deletion).await;
    let other = json!({
        "type": "delete", "target": 3, "id": "x", "user": "carol", "to": "dave", "timestamp": 1,
        "received": 1, "mode": "soft", "by": "carol",
    });
    append(&bootstrap, "change.dm.carol.dave", other).await;
    // From the stream alone, before anything is stored; then from PostgreSQL.
    assert_eq!(read_direct(&client, "bob", "alice", 1).await, (1, true));
    let waits = vec![
        row(1, "", "read"),
        row(2, "two", "sent"),
        row(3, "three", "sent"),
    ];
    let page = async || ask(&client, DM_INBOX.subject(&["bob"]), "").await.unwrap();
    let check = |page: &Value| {
        assert_eq!(super::shown(&page["messages"]), waits);
        assert_eq!(
            (
                &page["messages"][0]["deleted"],
                &page["through"],
                &page["more"]
            ),
            (&json!(true), &json!(5), &json!(false))
        );
        assert_eq!(page["changes"].as_array().unwrap().len(), 1, "{page}");
        assert_eq!(
            (&page["changes"][0]["seq"], &page["changes"][0]["target"]),
            (&json!(4), &json!(1))
        );
        assert_eq!(page["messages"][2]["room"], "dm.bob.carol");
    };
    check(&page().await);
    let _worker = world.spawn("persist-message").await;
    super::stored(&world, 5).await;
    check(&page().await);
    // Page by page, confirming each: every message comes once.
    let mut got = Vec::new();
    let mut through = 0;
    for _ in 0..9 {
        let page = ask(&client, DM_INBOX.subject(&["bob"]), r#"{"limit":1}"#)
            .await
            .unwrap();
        got.extend(
            super::shown(&page["messages"])
                .into_iter()
                .map(|(seq, ..)| seq),
        );
        through = page["through"].as_u64().unwrap();
        deliver(&client, "bob", through).await;
        if page["more"] == false {
            break;
        }
    }
    assert_eq!((got, through), (vec![1, 2, 3], 5));
    let read = ask(
        &client,
        DM_HISTORY.subject(&["bob", "alice"]),
        r#"{"receipts":true}"#,
    )
    .await
    .unwrap();
    assert!(
        read[0]["deliveredAt"].as_i64() <= read[0]["readAt"].as_i64(),
        "who has read it, had it: {read}"
    );
}
