//! Many texts erased at once: longer than the server waits for an acknowledgement.

use serde_json::{Value, json};
use testing::{World, eventually};

use super::{Duration, Vars, count, function, settled};

const MANY: usize = 4_000;
/// Long for the database, short for erasing some thousand texts, milliseconds each.
const ACK_WAIT: Duration = Duration::from_secs(8);
const LONG: Duration = Duration::from_secs(120);

#[tokio::test]
async fn erasing_many_texts_brings_no_deletion_again() {
    let world = World::start().await;
    let config = world.shipped_but(|_, object| {
        if let Some(ack_wait) = object.get_mut("ack_wait") {
            *ack_wait = json!(ACK_WAIT.as_nanos() as u64);
        }
    });
    let _bootstrap = world.spawn_with("stream-bootstrap", &[("BOOTSTRAP_CONFIG", &config)]).await;
    let (publisher, bootstrap, database) =
        (world.client("publisher").await, world.client("stream-bootstrap").await, world.database().await);
    let operator = world.client("operator").await;
    for number in 1..=MANY {
        let body = json!({"user": "ann", "text": format!("secret {number}"), "id": format!("id-{number}")});
        publisher.publish("chat.general", body.to_string().into()).await.unwrap();
    }
    publisher.flush().await.unwrap();
    let mut vars = world.vars("persist-message");
    vars.insert("PERSIST_BATCH".to_owned(), "4000".to_owned());
    // Nor does the watchdog take it for stuck.
    vars.insert("PERSIST_STUCK_AFTER_MS".to_owned(), "8000".to_owned());
    let worker = function().start(Vars::from_pairs(vars).unwrap()).await.unwrap();
    eventually("the messages are stored", LONG, async || {
        (count(&database, "select count(*) from messages").await == MANY as i64).then_some(())
    })
    .await;
    let before = settled(&world).await["delivered"]["consumer_seq"].as_u64().unwrap();
    for target in 1..=MANY {
        let body = json!({"type": "delete", "target": target, "id": format!("id-{target}"), "user": "ann", "derived": false,
                          "timestamp": 1_700_000_000_000_i64, "received": 1, "mode": "hard", "by": "ann"});
        bootstrap.publish("change.chat.general", body.to_string().into()).await.unwrap();
    }
    bootstrap.flush().await.unwrap();
    let info = eventually("every deletion is acknowledged", LONG, async || {
        let info = operator.request(wire::jetstream::CONSUMER_INFO, "".into()).await.unwrap();
        let info: Value = serde_json::from_slice(&info.payload).unwrap();
        (info["ack_floor"]["stream_seq"] == 2 * MANY).then_some(info)
    })
    .await;
    // A machine that stands still for seconds may have a pull or two brought again. Without reports all of it comes at least twice.
    let again = info["delivered"]["consumer_seq"].as_u64().unwrap() - before - MANY as u64;
    assert!(again < MANY as u64 / 10, "what is worked on is not delivered again: {again} were; {info}");
    let state = bootstrap.request(wire::jetstream::STREAM_INFO, "".into()).await.unwrap();
    let state: Value = serde_json::from_slice(&state.payload).unwrap();
    assert_eq!(
        (&state["state"]["messages"], &state["state"]["first_seq"]),
        (&json!(MANY), &json!(MANY + 1)),
        "the texts are gone: {state}"
    );
    worker.stop().await.unwrap();
}
