//! A full log: an error, not a loss; and it mends itself.

use super::*;
use wire::SEND;

#[tokio::test]
async fn a_full_log_refuses_and_mends_itself() {
    let world = World::builder().administrator().start().await;
    let config = world.shipped_but(|file, object| {
        if file.starts_with(wire::STREAM) && object.get("max_bytes").is_some() {
            object["max_bytes"] = json!(8 << 20);
        }
    });
    let _bootstrap = world.spawn_with("stream-bootstrap", &[("BOOTSTRAP_CONFIG", &config)]).await;
    let _send = world.spawn_with("send-message", &[("SEND_BURST", "10000"), ("SEND_RATE_PER_SECOND", "10000")]).await;
    let running = start(&world, &[SELDOM]).await;
    let client = world.client("publisher").await;
    let text = "t".repeat(60_000);
    let send = async || {
        let reply = ask(&client, SEND.subject(&["ann", "general"]), json!({ "text": text })).await;
        reply["seq"].as_i64().ok_or_else(|| reply["error"]["code"].as_u64().unwrap())
    };
    let mut acknowledged = Vec::new();
    let refusal = loop {
        match send().await {
            Ok(seq) => acknowledged.push(seq),
            Err(code) => break code,
        }
        assert!(acknowledged.len() < 200, "the budget is spent by now");
    };
    assert_eq!(refusal, 503);
    let budget = status(&world).await;
    assert!(budget.unstored_part.unwrap() > 0.9 && budget.unstored_bytes <= budget.bytes, "{budget:?}");
    assert_eq!(budget.max_bytes, Some(8 << 20));
    assert!(budget.bytes_per_second > 0 && budget.seconds_left.is_some(), "{budget:?}");
    let operator = world.client("operator").await;
    let stats = ask(&operator, format!("{}.enforce-retention", wire::DISCOVER_STATS), json!({})).await;
    let data = &stats["endpoints"].as_array().unwrap().iter().find(|endpoint| endpoint["name"] == "trim").unwrap()["data"];
    assert_eq!(data["log_max_bytes"], 8 << 20);
    assert_eq!(run(&world, false).await.trimmed, 0, "nothing that is not stored makes room");
    assert_eq!(send().await, Err(503));

    let _worker = world.spawn("persist-message").await;
    // All of it is to be kept, by number and by age.
    acknowledged.push(eventually("there is room again", SOON, async || send().await.ok()).await);
    settled(&world).await;
    let database = world.database().await;
    let stored: Vec<i64> = sqlx::query_scalar("select seq from messages order by seq").fetch_all(&database).await.unwrap();
    assert_eq!(stored, acknowledged, "everything that was acknowledged");
    let (first, last) = range(&world).await;
    assert!(first > 1 && last - first > 50, "{first} to {last}: no more is trimmed than makes room");
    running.stop().await.unwrap();
}
