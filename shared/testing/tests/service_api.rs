//! Every function is found, described and measured through the NATS service API: by name, by id,
//! and with all others.

#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "helpers of tests fail like tests"
)]

#[expect(dead_code, reason = "the endpoints are for other tests")]
mod table;

use std::collections::BTreeSet;
use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use serde_json::Value;

use testing::{SOON, World, eventually};

/// All replies to one discovery request: as many as are wanted, and any that follow soon after.
async fn replies(client: &async_nats::Client, subject: &str, wanted: usize) -> Vec<Value> {
    let inbox = client.new_inbox();
    let mut subscription = client.subscribe(inbox.clone()).await.unwrap();
    client
        .publish_with_reply(subject.to_owned(), inbox, "".into())
        .await
        .unwrap();
    let mut found = Vec::new();
    while let Ok(Some(reply)) = tokio::time::timeout(
        Duration::from_millis(if found.len() < wanted { 5_000 } else { 100 }),
        subscription.next(),
    )
    .await
    {
        found.push(serde_json::from_slice(&reply.payload).expect("JSON"));
    }
    found
}

fn schema(verb: &str) -> jsonschema::Validator {
    let text = match verb {
        "PING" => include_str!("../schemas/micro_v1_ping_response.json"),
        "INFO" => include_str!("../schemas/micro_v1_info_response.json"),
        _ => include_str!("../schemas/micro_v1_stats_response.json"),
    };
    jsonschema::options()
        .should_validate_formats(true)
        .build(&serde_json::from_str(text).unwrap())
        .unwrap()
}

#[tokio::test]
async fn every_replica_of_every_function_answers_by_name_and_by_id() {
    let world = World::start().await;
    let functions = table::functions();
    let mut replicas: Vec<&str> = functions.iter().map(String::as_str).collect();
    replicas.push("get-history");
    let running = join_all(replicas.iter().map(|name| world.spawn(name))).await;
    let operator = world.client("operator").await;
    for verb in ["PING", "INFO", "STATS"] {
        let schema = schema(verb);
        let wanted = replicas.len();
        let all = replies(&operator, &format!("$SRV.{verb}"), wanted).await;
        assert_eq!(all.len(), wanted, "{verb}");
        for reply in &all {
            let wrong: Vec<String> = schema
                .iter_errors(reply)
                .map(|error| error.to_string())
                .collect();
            assert!(wrong.is_empty(), "{verb}: {wrong:?} in {reply}");
            assert_eq!(reply["metadata"]["project"], "scrollback");
        }
        let names: BTreeSet<&str> = all
            .iter()
            .map(|reply| reply["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, functions.iter().map(String::as_str).collect());
        for name in &functions {
            let wanted = if name == "get-history" { 2 } else { 1 };
            let named = replies(&operator, &format!("$SRV.{verb}.{name}"), wanted).await;
            assert_eq!(named.len(), wanted, "{verb} {name}");
            for reply in named {
                let id = reply["id"].as_str().unwrap();
                let by_id = replies(&operator, &format!("$SRV.{verb}.{name}.{id}"), 1).await;
                assert_eq!(by_id.len(), 1);
                assert_eq!(by_id[0]["id"], id);
            }
        }
    }
    drop(running);
}

#[tokio::test]
async fn stats_show_the_work() {
    let world = World::start().await;
    let (_history, _worker) =
        tokio::join!(world.spawn("get-history"), world.spawn("persist-message"));
    let publisher = world.client("publisher").await;
    let operator = world.client("operator").await;
    for text in ["one", "two", "three"] {
        publisher
            .request(
                "chat.general",
                format!(r#"{{"user":"ann","text":"{text}"}}"#).into(),
            )
            .await
            .unwrap();
    }
    publisher
        .request("chat.general", "bad".into())
        .await
        .unwrap();
    let stats = async |name: &str| {
        replies(&operator, &format!("$SRV.STATS.{name}"), 1)
            .await
            .remove(0)["endpoints"][0]
            .clone()
    };
    let store = eventually("the work is counted", SOON, async || {
        let store = stats("persist-message").await;
        (store["num_requests"] == 4).then_some(store)
    })
    .await;
    assert_eq!(
        (&store["num_errors"], &store["last_error"]),
        (&1.into(), &"422:not_json".into())
    );
    assert!(store["processing_time"].as_u64().unwrap() > 0);
    assert_eq!(
        store["average_processing_time"].as_u64().unwrap(),
        store["processing_time"].as_u64().unwrap() / 4
    );

    publisher
        .request("chat.history.general", "".into())
        .await
        .unwrap();
    publisher
        .request("chat.history.general", "[]".into())
        .await
        .unwrap();
    let history = stats("get-history").await;
    assert_eq!(
        (&history["num_requests"], &history["num_errors"]),
        (&2.into(), &1.into())
    );
    assert!(
        history["last_error"]
            .as_str()
            .unwrap()
            .starts_with("400:the body")
    );
}
