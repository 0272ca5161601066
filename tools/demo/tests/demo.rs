//! `demo` against the running functions, as `./dev up` runs it.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::HashMap;

use tokio::process::Command;

use testing::{OtlpReceiver, SOON, World};

fn demo(world: &World, extra: &[(&str, &str)]) -> Command {
    let operator = world.vars("operator");
    let mut vars: HashMap<String, String> = world.vars("publisher");
    vars.remove("DATABASE_URL");
    vars.insert("OPERATOR_USER".to_owned(), operator["NATS_USER"].clone());
    vars.insert("OPERATOR_PASS".to_owned(), operator["NATS_PASS"].clone());
    let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
    command
        .env_clear()
        .envs(vars)
        .envs(extra.iter().copied())
        .kill_on_drop(true);
    command
}

/// What it shows, once it has shown all of it.
async fn shown(mut demo: Command) -> String {
    let output = demo.output().await.unwrap();
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{shown}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    shown
}

/// How far each direct message came, in the order of the lines that say so.
fn statuses(shown: &str) -> Vec<&str> {
    let words = shown.lines().filter_map(|line| line.rsplit_once("  "));
    words
        .map(|(_, word)| word)
        .filter(|word| ["sent", "delivered", "read"].contains(word))
        .collect()
}

#[tokio::test]
async fn a_demonstration_one_can_read_in_one_trace() {
    let (world, receiver) = tokio::join!(World::start(), OtlpReceiver::start());
    let telemetry = receiver.vars();
    let _functions = tokio::join!(
        world.spawn_with("persist-message", &telemetry),
        world.spawn_with("get-history", &telemetry),
        world.spawn_with("get-history", &telemetry),
        world.spawn("send-message"),
        world.spawn("sync-messages"),
        world.spawn("delete-message"),
        world.spawn("track-receipts"),
        world.spawn("relay-outbox")
    );
    let shown = shown(demo(&world, &telemetry)).await;
    assert!(
        shown.contains("acknowledged: sequence 1 of CHAT_MESSAGES"),
        "{shown}"
    );
    assert!(
        shown.contains("$ ./dev nats --as publisher req chat.history.general '{\"limit\":10}'"),
        "{shown}"
    );
    assert!(
        shown.contains("Hello from the demonstration")
            && shown.contains("Scrollback-Source: index"),
        "{shown}"
    );
    assert!(
        shown.contains("\"seq\":2,\"status\":\"sent\",\"duplicate\":true"),
        "{shown}"
    );
    assert!(
        shown.contains("scrollback.message.stored") && shown.contains("(deleted)"),
        "{shown}"
    );
    let history: Vec<&str> = shown
        .lines()
        .find(|line| line.trim_start().starts_with("get-history"))
        .unwrap()
        .split_whitespace()
        .collect();
    assert_eq!(history[2], "2", "{shown}");
    assert!(!shown.contains('\u{1b}'), "{shown}");
    // History, the inbox before bob dies and after; history when it is delivered; and when two of
    // three are read.
    let (sent, delivered, read) = (["sent"; 9], ["delivered"; 3], ["read", "read", "delivered"]);
    assert_eq!(
        statuses(&shown),
        [&sent[..], &delivered, &read].concat(),
        "{shown}"
    );
    assert!(
        shown.contains("scrollback.receipt.delivered") && shown.contains("scrollback.receipt.read"),
        "{shown}"
    );

    let names = [
        "demo",
        "send chat.{room}",
        "process chat.{room}",
        "request get-history",
        "get-history chat.history.>",
    ];
    let spans = receiver
        .wait_for("sent, stored and read", SOON, |spans| {
            names
                .iter()
                .all(|name| spans.iter().any(|span| span.name == *name))
        })
        .await;
    let of = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    assert_eq!(of("send chat.{room}").kind, "producer");
    for name in names {
        assert_eq!(of(name).trace_id, of("demo").trace_id, "{name}");
    }
}

#[tokio::test]
async fn a_wrong_room_is_refused() {
    let output = Command::new(env!("CARGO_BIN_EXE_demo"))
        .arg("a.b")
        .output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("a room is 1 to 64"));
}

#[tokio::test]
async fn it_can_be_shown_again_and_by_two_at_once() {
    let world = World::start().await;
    let _functions = futures::future::join_all(
        [
            "persist-message",
            "get-history",
            "send-message",
            "sync-messages",
            "delete-message",
            "track-receipts",
            "relay-outbox",
        ]
        .map(|name| world.spawn(name)),
    )
    .await;
    let first = shown(demo(&world, &[])).await;
    let (second, third) = tokio::join!(shown(demo(&world, &[])), shown(demo(&world, &[])));
    for shown in [second, third] {
        assert_eq!(statuses(&shown), statuses(&first), "{shown}");
    }
}
