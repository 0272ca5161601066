//! Malformed and hostile input as raw protocol: it costs the sender's own request, and nobody else
//! anything.

use std::time::Duration;

use serde_json::json;

use testing::{RawClient, RawMessage, World};

/// Header blocks that async-nats 0.51 panics on (the first) or gives its connection up for.
const MALFORMED: &[(&str, &[u8])] = &[
    ("a lone CR", b"NATS/1.0\r\nX-A: a\rb\r\n\r\n"),
    ("no colon", b"NATS/1.0\r\nno colon\r\n\r\n"),
    ("invalid UTF-8", b"NATS/1.0\r\nX-A: \xff\r\n\r\n"),
    ("a space in a name", b"NATS/1.0\r\nX A: b\r\n\r\n"),
    ("a wrong version", b"NATS/9.9\r\nX-A: b\r\n\r\n"),
];

/// One second of the input that found the fault.
const PACE: Duration = Duration::from_millis(50);

fn is_refused_with_400(reply: &RawMessage) -> bool {
    let headers = String::from_utf8_lossy(&reply.headers);
    headers.contains("Nats-Service-Error-Code: 400") && headers.contains("malformed headers")
}

#[tokio::test]
async fn malformed_headers_cost_their_own_request_and_nothing_else() {
    let world = World::start().await;
    let history = world.spawn("get-history").await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    let mut operator = RawClient::connect(world.nats(), "operator").await;
    for (what, block) in MALFORMED {
        let reply = client
            .request("chat.history.general", Some(block), b"")
            .await;
        let reply = reply.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(is_refused_with_400(&reply), "{what}: {reply:?}");
        let found = operator
            .request("$SRV.PING.get-history", Some(block), b"")
            .await;
        let found = found.unwrap_or_else(|error| panic!("$SRV.PING with {what}: {error}"));
        assert!(
            String::from_utf8_lossy(&found.payload).contains("ping_response"),
            "{what}: {found:?}"
        );
        let page = client.request("chat.history.general", None, b"").await;
        let page = page.unwrap_or_else(|error| panic!("after {what}: {error}"));
        assert_eq!(page.payload, b"[]", "after {what}: {page:?}");
    }
    // Also without a reply subject, and with one that is no inbox.
    for (_, block) in MALFORMED {
        client
            .publish_raw("chat.history.general", None, Some(block), b"")
            .await;
        client
            .publish_raw(
                "chat.history.general",
                Some("chat.general"),
                Some(block),
                b"",
            )
            .await;
    }
    client.send(b"PUB chat.history.\xff 0\r\n\r\n").await;
    client.flush().await.unwrap();
    assert_eq!(
        client
            .request("chat.history.general", None, b"")
            .await
            .unwrap()
            .payload,
        b"[]"
    );
    assert!(history.is_running());
}

#[tokio::test]
async fn malformed_headers_twenty_times_a_second_hold_up_nobody() {
    let world = World::start().await;
    let history = world.spawn("get-history").await;
    let mut attacker = RawClient::connect(world.nats(), "publisher").await;
    let attack = async {
        for round in 0..60 {
            let (_, block) = MALFORMED[round % MALFORMED.len()];
            attacker
                .publish_raw("chat.history.general", None, Some(block), b"")
                .await;
            tokio::time::sleep(PACE).await;
        }
    };
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    let mut answered = 0;
    let requests = async {
        loop {
            let page = client.request("chat.history.general", None, b"").await;
            assert_eq!(
                page.unwrap_or_else(|error| panic!("after {answered} answers: {error}"))
                    .payload,
                b"[]"
            );
            answered += 1;
        }
    };
    tokio::select! {
        () = attack => {}
        () = requests => {}
    }
    assert!(answered > 60, "{answered} answers in three seconds");
    assert!(history.is_running());
}

#[tokio::test]
async fn one_connection_takes_so_much_of_the_server_and_no_more() {
    let world = World::bare().await;
    // A signed token may be long.
    let mut client =
        RawClient::connect_with(world.nats(), "publisher", json!({"jwt": "x".repeat(6_000)})).await;
    client.flush().await.expect("6 kB in CONNECT are taken");
    let lines: String = (0..=10_000)
        .map(|sid| format!("SUB _INBOX.publisher.{sid} {sid}\r\n"))
        .collect();
    client.send(lines.as_bytes()).await;
    let refused = client
        .flush()
        .await
        .expect_err("there is a limit to subscriptions");
    assert!(
        refused.to_lowercase().contains("maximum subscriptions"),
        "{refused}"
    );
}
