//! A full stream refuses messages and loses none; and it recovers by itself.

use super::*;
use protocol::endpoints::SEND;

const BUDGET: u64 = 8 << 20;
const SENDERS: [&str; 4] = ["ann", "bob", "carol", "dave"];

/// Sequence and sender of each acknowledged message.
type Acknowledged = Vec<(i64, String)>;

/// Sends one large message; returns its sequence and sender, or the error.
async fn send(client: &Client, user: &str) -> Result<(i64, String), Value> {
    let reply = ask(
        client,
        SEND.subject(&[user, "general"]),
        json!({ "text": "t".repeat(60_000) }),
    )
    .await;
    reply["seq"]
        .as_i64()
        .map(|seq| (seq, user.to_owned()))
        .ok_or_else(|| reply["error"].clone())
}

/// Every sender sends until the stream is full.
async fn fill(client: &Client) -> Acknowledged {
    let until_refused = async |user: &'static str| {
        let mut acknowledged = Acknowledged::new();
        loop {
            match send(client, user).await {
                Ok(sent) => acknowledged.push(sent),
                Err(error) => {
                    assert_eq!(
                        (&error["code"], &error["retryable"]),
                        (&json!(503), &json!(true)),
                        "{error}"
                    );
                    return acknowledged;
                }
            }
            assert!(acknowledged.len() < 200, "the budget is spent by now");
        }
    };
    futures::future::join_all(SENDERS.map(until_refused))
        .await
        .concat()
}

/// Checks `retention.status`, and the gauges in STATS.
async fn check_gauges(world: &World) {
    let budget = status(world).await;
    assert!(
        budget.unstored_part.unwrap() > 0.9 && budget.unstored_bytes <= budget.bytes,
        "{budget:?}"
    );
    assert_eq!(budget.max_bytes, Some(BUDGET));
    assert!(
        budget.bytes_per_second > 0 && budget.seconds_left.is_some(),
        "{budget:?}"
    );
    let operator = world.client("operator").await;
    let stats = ask(
        &operator,
        format!("{}.enforce-retention", base::discovery::DISCOVER_STATS),
        json!({}),
    )
    .await;
    let data = &stats["endpoints"]
        .as_array()
        .unwrap()
        .iter()
        .find(|endpoint| endpoint["name"] == "trim")
        .unwrap()["data"];
    assert_eq!(data["log_max_bytes"], BUDGET);
}

#[tokio::test]
async fn a_full_stream_refuses_and_recovers() {
    let world = World::builder().administrator().start().await;
    let config = world.with_edited_config(|file, object| {
        if file.starts_with(protocol::subject::STREAM) && object.get("max_bytes").is_some() {
            object["max_bytes"] = json!(BUDGET);
        }
    });
    let _bootstrap = world
        .spawn_with("stream-bootstrap", &[("BOOTSTRAP_CONFIG", &config)])
        .await;
    let _send = world
        .spawn_with(
            "send-message",
            &[("SEND_BURST", "10000"), ("SEND_RATE_PER_SECOND", "10000")],
        )
        .await;
    let worker = world.spawn("persist-message").await;
    let running = start(&world, &[SELDOM]).await;
    let client = world.client("publisher").await;
    let mut acknowledged = Acknowledged::new();
    for user in SENDERS {
        acknowledged.push(send(&client, user).await.unwrap());
    }
    settled(&world).await;
    assert!(worker.terminate().await.success());

    acknowledged.extend(fill(&client).await);
    // Trimming what was stored before makes space, once.
    run(&world, false).await;
    acknowledged.extend(fill(&client).await);
    check_gauges(&world).await;
    assert_eq!(
        run(&world, false).await.trimmed,
        0,
        "nothing that is not stored makes room"
    );
    assert_eq!(fill(&client).await, []);
    assert!(
        range(&world).await.0 <= SENDERS.len() as u64 + 1,
        "everything that is not stored is there"
    );

    let _worker = world.spawn("persist-message").await;
    // The settings would keep all of it, by number and by age.
    for user in SENDERS {
        acknowledged.push(
            eventually("there is room again", SOON, async || {
                send(&client, user).await.ok()
            })
            .await,
        );
    }
    settled(&world).await;
    acknowledged.sort();
    let database = world.database().await;
    let stored: Acknowledged = sqlx::query_as("select seq, sender from messages order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(stored, acknowledged, "everything that was acknowledged");
    let (first, last) = range(&world).await;
    assert!(
        first > SENDERS.len() as u64 + 1 && last - first > 50,
        "{first} to {last}: no more is trimmed than makes room"
    );
    running.stop().await.unwrap();
}
