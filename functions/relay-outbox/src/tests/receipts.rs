//! Receipts among the events: after the messages they are about, and without a sequence of their
//! own.

use super::*;

/// Inserts a row into the outbox with `count` receipts about `through`, as track-receipts does.
async fn receipt(database: &PgPool, kind: &str, user: &str, through: i64, count: i64) {
    sqlx::query(
        "insert into outbox (first_seq, last_seq, seqs, receipts)
         select $1, $1, '{}',
                jsonb_agg(jsonb_build_object('kind', $2, 'user', $3, 'room', 'room-' || number,
                                             'through', $1))
           from generate_series(1, $4) as number",
    )
    .bind(through)
    .bind(kind)
    .bind(user)
    .bind(count)
    .execute(database)
    .await
    .unwrap();
}

fn ids(events: &[StoredEvent]) -> Vec<String> {
    events
        .iter()
        .map(|event| event.header("ce-id").to_owned())
        .collect()
}

#[tokio::test]
async fn a_receipt_comes_after_what_it_is_about() {
    let (world, admin, database) = world().await;
    advance(&admin, 20).await;
    store(&database, 1, 30, 3).await;
    receipt(&database, "read", "bob", 25, 1).await;
    receipt(&database, "delivered", "bob", 15, 2).await;
    let relay = world.spawn("relay-outbox").await;
    let events = events(&admin, 22).await;
    assert_eq!(
        events
            .iter()
            .map(StoredEvent::seq)
            .take(20)
            .collect::<Vec<u64>>(),
        up_to(20)
    );
    assert_eq!(
        ids(&events[20..]),
        ["delivered:bob:room-1:15", "delivered:bob:room-2:15"]
    );
    let receipt = &events[20];
    assert_eq!(
        (receipt.subject.as_str(), receipt.header("ce-type")),
        ("events.v1.chat.room-1", "scrollback.receipt.delivered")
    );
    assert_eq!(
        (receipt.header("Nats-Msg-Id"), receipt.header("ce-sequence")),
        (receipt.header("ce-id"), "")
    );
    assert_eq!(
        receipt.data(),
        json!({"user": "bob", "room": "room-1", "through": 15})
    );
    // The other receipt waits for the messages it is about.
    advance(&admin, 30).await;
    let events = super::events(&admin, 33).await;
    assert_eq!(ids(&events[31..]), ["stored:30", "read:bob:room-1:25"]);
    eventually("the outbox is empty", SOON, async || {
        (outbox(&database).await == 0).then_some(())
    })
    .await;
    assert!(relay.terminate().await.success());
}

/// The receipt is far below the watermark. It is published all the same, once, and does not change
/// the order of the messages' events.
#[tokio::test]
async fn a_receipt_about_what_was_published_long_ago_moves_nothing() {
    let (world, admin, database) = world().await;
    forget_ids(&admin).await;
    advance(&admin, 500).await;
    store(&database, 1, 500, 5).await;
    let relay = world.spawn("relay-outbox").await;
    assert_eq!(published_messages(&admin, &database, 500).await, up_to(500));
    receipt(&database, "read", "bob", 3, 1).await;
    wake(&world).await;
    assert_eq!(
        ids(&events(&admin, 501).await[500..]),
        ["read:bob:room-1:3"]
    );
    // The replica is new and the table is empty: the receipt, which is the last event, says up to
    // where messages are published.
    relay.kill().await;
    sqlx::query("update relayed set seq = 0")
        .execute(&database)
        .await
        .unwrap();
    insert_rows(&mut database.acquire().await.unwrap(), 1, 500, 5).await;
    store(&database, 501, 600, 3).await;
    receipt(&database, "read", "bob", 550, 1).await;
    advance(&admin, 600).await;
    let _relay = world.spawn("relay-outbox").await;
    assert_eq!(
        published_messages(&admin, &database, 602).await,
        [up_to(500), (501..=600).collect()].concat()
    );
    assert_eq!(count(&admin).await, 602);
}

/// More than one round publishes, while there are no other events.
#[tokio::test]
async fn thousands_of_receipts_are_published_once_each() {
    let (world, admin, database) = world().await;
    advance(&admin, 5_000).await;
    for number in 1..=600 {
        receipt(&database, "read", "ann", number, 1).await;
    }
    for number in 1..=6 {
        receipt(&database, "delivered", "bob", 1_000 + number, 1_000).await;
    }
    receipt(&database, "delivered", "bob", 4_000, 9).await;
    let _relay = world.spawn("relay-outbox").await;
    eventually("the outbox is empty", SOON, async || {
        (outbox(&database).await == 0).then_some(())
    })
    .await;
    let mut ids = ids(&events(&admin, 6_609).await);
    assert_eq!(
        (
            ids.len(),
            ids[0].as_str(),
            ids[6_608].starts_with("delivered:bob:room-")
        ),
        (6_609, "read:ann:room-1:1", true)
    );
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 6_609);
}

/// Waits until the outbox is empty; returns the sequences of messages' events.
async fn published_messages(admin: &Client, database: &PgPool, wanted: u64) -> Vec<u64> {
    eventually("the outbox is empty", SOON, async || {
        (outbox(database).await == 0).then_some(())
    })
    .await;
    events(admin, wanted)
        .await
        .iter()
        .filter(|event| !event.header("ce-sequence").is_empty())
        .map(StoredEvent::seq)
        .collect()
}
