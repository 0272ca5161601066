//! Functions stop within one deadline, whatever is unavailable, and at once on a second signal.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

#[expect(dead_code, reason = "the endpoints are for other tests")]
mod table;

use std::time::{Duration, Instant};

use service::config::Vars;
use service::ctx::Ctx;
use service::function::{Function, Identity};
use testing::{RawClient, SOON, World, eventually};

/// The deadline of a function. Compose and `dev` kill after 30 s.
const STOP_LIMIT: Duration = Duration::from_secs(25);

#[tokio::test]
async fn with_nats_away_a_function_stops_within_its_deadline() {
    let world = World::start().await;
    let functions = table::functions();
    let running = futures::future::join_all(functions.iter().map(|name| world.spawn(name))).await;
    world.nats().kill().await;
    let begun = Instant::now();
    for function in &running {
        function.signal("TERM");
    }
    for (name, function) in functions.iter().zip(&running) {
        let status = function.exited(SOON).await;
        let took = begun.elapsed();
        println!("{name} ended after {took:?} with {status}");
        assert!(
            status.success(),
            "{name} ended with {status}\n{}",
            function.stderr()
        );
        assert!(
            took < STOP_LIMIT + Duration::from_secs(5),
            "{name} took {took:?} to stop\n{}",
            function.stderr()
        );
    }
}

#[tokio::test]
async fn a_second_signal_ends_a_function_at_once() {
    let world = World::with_own_postgres().await;
    let deadline = [("REQUEST_DEADLINE_MS", "60000")];
    let function = world.spawn_with("track-receipts", &deadline).await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    client
        .request("chat.unread.alice", None, b"")
        .await
        .unwrap();
    // The request hangs for as long as PostgreSQL does.
    world.postgres().pause().await;
    let inbox = client.inbox();
    client
        .publish_raw("chat.unread.alice", Some(&inbox), None, b"")
        .await;
    client.flush().await.unwrap();
    let operator = world.client("operator").await;
    let subject = format!("$SRV.PING.track-receipts.{}", function.instance().unwrap());
    operator.request(subject, "".into()).await.unwrap();
    function.signal("TERM");
    eventually("it is stopping", SOON, async || {
        function.stderr().contains("asked to stop").then_some(())
    })
    .await;
    let signalled = Instant::now();
    function.signal("INT");
    let status = function.exited(SOON).await;
    println!("ended {:?} after the second signal", signalled.elapsed());
    assert_eq!(status.code(), Some(1), "{}", function.stderr());
    assert!(
        function.stderr().contains("leaving at once"),
        "{}",
        function.stderr()
    );
}

/// Work that never ends, and then a connection that is never closed: with a limit for each step
/// instead of one deadline for all, this would take 17 and 5 seconds.
#[tokio::test]
async fn the_steps_of_stopping_share_one_deadline_whatever_hangs() {
    let world = World::bare().await;
    let identity = Identity {
        project: protocol::PROJECT,
        name: "get-history",
        version: "0.1.0",
        description: "never ends",
    };
    let function = Function::with(identity, async |ctx: Ctx| {
        ctx.on_stop(std::future::pending());
        Ok(())
    })
    .work("hangs", "nothing", "Never ends", async |_, _| {
        std::future::pending().await
    });
    let vars = Vars::from_pairs(world.vars("get-history"));
    let running = function.start(vars).await.unwrap();
    let begun = Instant::now();
    running.stop().await.unwrap();
    let took = begun.elapsed();
    assert!(took > Duration::from_secs(15), "work may finish: {took:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
}

#[tokio::test]
async fn a_typo_in_rust_log_is_named_at_start() {
    let world = World::start().await;
    let function = world
        .spawn_with("get-history", &[("RUST_LOG", "info,async_nats=wran")])
        .await;
    let named = async || {
        let log = function.stderr();
        (log.contains("RUST_LOG: async_nats=wran") && log.contains("ready")).then_some(())
    };
    eventually(
        "the typo is named, and the rest of the filter holds",
        SOON,
        named,
    )
    .await;
}

#[tokio::test]
async fn a_panic_in_a_loop_of_its_own_ends_a_function() {
    let world = World::bare().await;
    let identity = Identity {
        project: protocol::PROJECT,
        name: "get-history",
        version: "0.1.0",
        description: "panics beside its work",
    };
    let function = Function::with(identity, async |ctx: Ctx| {
        ctx.spawn_essential("counts sheep", async { panic!("one too many") });
        Ok(())
    });
    let running = function
        .start(Vars::from_pairs(world.vars("get-history")))
        .await
        .unwrap();
    let fatal = running.ended().await.unwrap_err().to_string();
    assert!(fatal.contains("counts sheep panicked"), "{fatal}");
}
