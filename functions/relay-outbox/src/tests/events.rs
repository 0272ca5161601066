//! Events as their readers get them, and their order.

use super::*;

const AT: i64 = 1_700_000_000_000;
const STORED: &str = "scrollback.message.stored";
const DELETED: &str = "scrollback.message.deleted";

fn body(user: &str, id: &str) -> Value {
    json!({"user": user, "text": "a secret", "id": id, "timestamp": AT})
}

/// Messages in every kind of room, a deletion, a dead letter and a duplicate: sequences 1 to 8.
async fn publish_every_kind(admin: &Client) {
    let mut traced = HeaderMap::new();
    traced.insert("traceparent", TRACE);
    append(admin, "chat.general", body("ann", "a-1"), traced).await;
    let publish = async |subject: &str, body: Value| {
        append(admin, subject, body, HeaderMap::new()).await;
    };
    publish("dm.bob.alice", body("bob", "b-1")).await;
    publish("admin.alerts", body("root", "r-1")).await;
    publish("chat.müsli%", body("Ünal", "ü\n1")).await;
    let deletion = json!({
        "type": "delete", "target": 1, "id": "a-1", "user": "ann", "timestamp": AT, "received": 1,
        "mode": "hard", "by": "moderator",
    });
    publish("change.chat.general", deletion).await;
    let not_json = admin
        .request("chat.general", "no message".into())
        .await
        .unwrap();
    assert!(not_json.payload.starts_with(b"{\"stream\""));
    publish("chat.general", body("ann", "a-1")).await;
    let without_id = json!({"user": "ann", "text": "a secret", "timestamp": 5});
    publish("chat.general", without_id).await;
}

#[tokio::test]
async fn an_event_describes_what_was_stored() {
    let (world, admin, database) = world().await;
    let (_relay, _worker) =
        tokio::join!(world.spawn("relay-outbox"), world.spawn("persist-message"));
    publish_every_kind(&admin).await;
    let published = events(&admin, 6).await;
    let found: Vec<(&str, &str, &str, &str)> = published
        .iter()
        .map(|one| {
            (
                one.subject.as_str(),
                one.header("ce-type"),
                one.header("ce-id"),
                one.header("ce-subject"),
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            ("events.v1.chat.general", STORED, "stored:1", "general"),
            ("events.v1.dm.alice.bob", STORED, "stored:2", "dm.alice.bob"),
            ("events.v1.chat.__admin__", STORED, "stored:3", "__admin__"),
            ("events.v1.chat.müsli%", STORED, "stored:4", "m%C3%BCsli%25"),
            ("events.v1.chat.general", DELETED, "deleted:5", "general"),
            ("events.v1.chat.general", STORED, "stored:8", "general"),
        ]
    );
    check_data(&published);
    for (index, event) in published.iter().enumerate() {
        check_headers(event, if index == 0 { TRACE } else { "" });
    }
    eventually("the outbox is empty", SOON, async || {
        (outbox(&database).await == 0).then_some(())
    })
    .await;
    assert_eq!(relayed(&database).await, 8);
    check_stats(&world).await;
}

fn check_data(published: &[StoredEvent]) {
    let data: Vec<Value> = published[..5].iter().map(StoredEvent::data).collect();
    assert_eq!(
        data,
        [
            json!({"seq": 1, "id": "a-1", "room": "general", "user": "ann", "timestamp": AT}),
            json!({
                "seq": 2, "id": "b-1", "room": "dm.alice.bob", "user": "bob", "to": "alice",
                "timestamp": AT,
            }),
            json!({"seq": 3, "id": "r-1", "room": "__admin__", "user": "root", "timestamp": AT}),
            json!({"seq": 4, "id": "ü\n1", "room": "müsli%", "user": "Ünal", "timestamp": AT}),
            json!({
                "seq": 5, "target": 1, "id": "a-1", "room": "general", "user": "ann",
                "mode": "hard", "by": "moderator",
            }),
        ]
    );
    // Without an id of its own, and with a timestamp that is not valid.
    let last = published[5].data();
    assert_eq!(last["id"], "seq:8");
    assert!(last["timestamp"].as_i64().unwrap() > AT);
}

fn check_headers(event: &StoredEvent, trace: &str) {
    assert_eq!(event.header("ce-specversion"), "1.0");
    assert_eq!(event.header("ce-source"), "/scrollback/CHAT_MESSAGES");
    assert_eq!(event.header("ce-datacontenttype"), "application/json");
    assert_eq!(event.header("Nats-Msg-Id"), event.header("ce-id"));
    assert_eq!(
        event.header("ce-sequence"),
        format!("{:019}", event.data()["seq"].as_u64().unwrap())
    );
    let time = time::OffsetDateTime::parse(
        event.header("ce-time"),
        &time::format_description::well_known::Rfc3339,
    )
    .unwrap();
    let age = time::OffsetDateTime::now_utc() - time;
    assert!(age.whole_minutes() < 2, "{time}");
    assert_eq!(event.header("traceparent"), trace);
    assert_eq!(event.header("ce-traceparent"), trace);
    assert!(!String::from_utf8_lossy(&event.payload).contains("secret"));
}

/// STATS counts events as requests.
async fn check_stats(world: &World) {
    let stats = world
        .client("operator")
        .await
        .request("$SRV.STATS.relay-outbox", "".into())
        .await
        .unwrap();
    let stats: Value = serde_json::from_slice(&stats.payload).unwrap();
    let endpoint = &stats["endpoints"][0];
    assert_eq!(endpoint["name"], "relay", "{stats}");
    assert_eq!(endpoint["num_requests"], 6, "{stats}");
    assert_eq!(endpoint["num_errors"], 0, "{stats}");
    assert!(endpoint["processing_time"].as_u64().unwrap() > 0);
}

/// A publisher may use subjects that no client uses: no room's name stops the events of other
/// rooms.
#[tokio::test]
async fn no_name_stops_the_relay() {
    let (world, admin, database) = world().await;
    let (_relay, _worker) =
        tokio::join!(world.spawn("relay-outbox"), world.spawn("persist-message"));
    let long = format!("chat.{}", "r".repeat(255));
    for subject in [
        "chat.*",
        "chat.>",
        "chat.a\u{1}b",
        "chat.\u{a0}",
        "chat.\u{7f}\u{2028}",
        "dm.*.>",
        "admin.*",
        "chat.$JS",
        &long,
    ] {
        let mut client = RawClient::connect(world.nats(), "publisher").await;
        client
            .publish_raw(
                subject,
                None,
                None,
                br#"{"user":"\u0001 \" ann","text":"a secret","id":"\r\n"}"#,
            )
            .await;
        // The server itself refuses some of them.
        _ = client.flush().await;
    }
    let last = append(
        &admin,
        "chat.general",
        json!({"user": "ann", "text": "a secret"}),
        HeaderMap::new(),
    )
    .await;
    let stored = async || {
        sqlx::query_scalar::<_, i64>("select count(*) from messages")
            .fetch_one(&database)
            .await
            .unwrap()
    };
    let events = eventually("the last one is published", SOON, async || {
        let events = events(&admin, 1).await;
        (events.last()?.seq() == last).then_some(events)
    })
    .await;
    assert_eq!(events.len() as i64, stored().await);
}

#[tokio::test]
async fn thousands_come_in_the_order_of_the_stream() {
    let (world, admin, database) = world().await;
    advance(&admin, 12_000).await;
    store(&database, 1, 12_000, 30).await;
    // A message whose id an earlier one has has no row, and no event.
    sqlx::query("delete from messages where seq % 1000 = 7")
        .execute(&database)
        .await
        .unwrap();
    let relay = world.spawn("relay-outbox").await;
    let wanted: Vec<u64> = up_to(12_000)
        .into_iter()
        .filter(|seq| seq % 1000 != 7)
        .collect();
    assert_eq!(
        published(&admin, &database, wanted.len() as u64).await,
        wanted
    );
    assert_eq!(relayed(&database).await, 12_000);
    assert!(relay.terminate().await.success());
}

#[tokio::test]
async fn events_above_what_is_stored_wait() {
    let (world, admin, database) = world().await;
    advance(&admin, 10).await;
    store(&database, 1, 40, 3).await;
    // A slower worker is about to commit these, above the ack floor.
    sqlx::query("update outbox set seqs = array_remove(array_remove(seqs, 11), 12)")
        .execute(&database)
        .await
        .unwrap();
    let mut slow = database.begin().await.unwrap();
    sqlx::query("insert into outbox (first_seq, last_seq, seqs) values (11, 12, '{12, 11}')")
        .execute(&mut *slow)
        .await
        .unwrap();
    let _relay = world.spawn("relay-outbox").await;
    events(&admin, 10).await;
    slow.commit().await.unwrap();
    advance(&admin, 20).await;
    assert_eq!(
        events(&admin, 20)
            .await
            .iter()
            .map(StoredEvent::seq)
            .collect::<Vec<u64>>(),
        up_to(20)
    );
    assert!(outbox(&database).await > 0);
    advance(&admin, 40).await;
    // There is no wake-up now; while something waits, the relay runs again by itself.
    assert_eq!(published(&admin, &database, 40).await, up_to(40));
}

#[tokio::test]
async fn a_wake_up_is_enough() {
    let (world, admin, database) = world().await;
    advance(&admin, 100).await;
    let _relay = world.spawn("relay-outbox").await;
    let begun = Instant::now();
    for seq in 1..=8 {
        store(&database, seq, seq, 1).await;
        wake(&world).await;
        events(&admin, seq as u64).await;
    }
    assert!(
        begun.elapsed() < Duration::from_secs(12),
        "as slow as without wakes: {:?}",
        begun.elapsed()
    );
    // Without a wake-up it runs by itself.
    store(&database, 9, 9, 1).await;
    events(&admin, 9).await;
}
