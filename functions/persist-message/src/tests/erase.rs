//! Many texts erased at once: longer than the server waits for an acknowledgement.

use serde_json::{Value, json};

use super::{Duration, count, function, logged, settled};
use service::config::Vars;
use service::function::Running;
use testing::{SOON, World, eventually};

const MANY: usize = 4_000;
/// Long for the database, short for erasing some thousand texts, milliseconds each.
const ACK_WAIT: Duration = Duration::from_secs(8);

/// One that takes large batches; nor does the watchdog take it for stuck.
async fn hurried_worker(world: &World) -> Running {
    let mut vars = world.vars("persist-message");
    vars.extend(
        [
            ("PERSIST_BATCH", "4000"),
            ("PERSIST_STUCK_AFTER_MS", "8000"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned())),
    );
    function().start(Vars::from_pairs(vars)).await.unwrap()
}

#[tokio::test]
async fn erasing_many_texts_brings_no_deletion_again() {
    let world = World::start().await;
    let _bootstrap = world.with_ack_wait(ACK_WAIT).await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let operator = world.client("operator").await;
    for number in 1..=MANY {
        let body = json!({
            "user": "ann", "text": format!("secret {number}"), "id": format!("id-{number}"),
        });
        publisher
            .publish("chat.general", body.to_string().into())
            .await
            .unwrap();
    }
    logged(&operator, MANY).await;
    let worker = hurried_worker(&world).await;
    eventually("the messages are stored", 3 * SOON, async || {
        (count(&database, "select count(*) from messages").await == MANY as i64).then_some(())
    })
    .await;
    let before = settled(&world).await["delivered"]["consumer_seq"]
        .as_u64()
        .unwrap();
    worker.stop().await.unwrap();
    for target in 1..=MANY {
        let body = json!({
            "type": "delete", "target": target, "id": format!("id-{target}"), "user": "ann",
            "derived": false, "timestamp": 1_700_000_000_000_i64, "received": 1, "mode": "hard",
            "by": "ann",
        });
        bootstrap
            .publish("change.chat.general", body.to_string().into())
            .await
            .unwrap();
    }
    logged(&operator, 2 * MANY).await;
    let worker = hurried_worker(&world).await;
    let info = eventually("every deletion is acknowledged", 3 * SOON, async || {
        let info = operator
            .request(protocol::js_api::CONSUMER_INFO, "".into())
            .await
            .unwrap();
        let info: Value = serde_json::from_slice(&info.payload).unwrap();
        (info["ack_floor"]["stream_seq"] == 2 * MANY).then_some(info)
    })
    .await;
    // A machine that stands still for seconds may have a pull or two brought again. Without reports
    // all of it comes at least twice.
    let again = info["delivered"]["consumer_seq"].as_u64().unwrap() - before - MANY as u64;
    assert!(
        again < MANY as u64 / 10,
        "what is worked on is not delivered again: {again} were; {info}"
    );
    let state = bootstrap
        .request(protocol::js_api::STREAM_INFO, "".into())
        .await
        .unwrap();
    let state: Value = serde_json::from_slice(&state.payload).unwrap();
    assert_eq!(
        (&state["state"]["messages"], &state["state"]["first_seq"]),
        (&json!(MANY), &json!(MANY + 1)),
        "the texts are gone: {state}"
    );
    worker.stop().await.unwrap();
}
