//! A function's binary as a process: started, called, and stopped in every way.

use std::time::Duration;

use serde_json::Value;

use testing::{SOON, World, eventually};

#[tokio::test]
async fn replicas_of_a_function_have_different_ids() {
    let world = World::start().await;
    let (one, other) = tokio::join!(world.spawn("get-history"), world.spawn("get-history"));
    assert_ne!(one.id(), other.id());
    assert_ne!(one.instance(), other.instance());
    let operator = world.client("operator").await;
    for function in [&one, &other] {
        let info = operator
            .request(
                format!("$SRV.INFO.get-history.{}", function.instance().unwrap()),
                "".into(),
            )
            .await
            .unwrap();
        let info: Value = serde_json::from_slice(&info.payload).unwrap();
        assert_eq!(info["name"], "get-history");
    }
    one.kill().await;
    assert!(other.terminate().await.success());
}

#[tokio::test]
async fn a_paused_function_goes_on() {
    let world = World::start().await;
    let function = world.spawn("get-history").await;
    let operator = world.client("operator").await;
    let ping = async || {
        let subject = format!("$SRV.PING.get-history.{}", function.instance().unwrap());
        tokio::time::timeout(
            Duration::from_millis(100),
            operator.request(subject, "".into()),
        )
        .await
        .is_ok()
    };
    assert!(ping().await);
    function.pause().await;
    assert!(!ping().await);
    assert!(function.is_running());
    function.resume();
    eventually("it answers again", SOON, async || {
        ping().await.then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_wrong_configuration_ends_a_function() {
    let world = World::bare().await;
    let output = world
        .command("get-history")
        .env("NATS_URL", "not a url")
        .output()
        .await
        .unwrap();
    assert!(!output.status.success());
    assert!(!output.stderr.is_empty());
}
