//! Many unstored messages: a page reads a bounded part of them, and pages of other rooms none.
//!
//! `SCROLLBACK_MANY=30000` (messages) and `SCROLLBACK_MANY_DELETIONS=100000` run them in full.

use std::time::Instant;

use super::*;

fn many(variable: &str, usual: u64) -> u64 {
    std::env::var(variable)
        .ok()
        .and_then(|many| many.parse().ok())
        .unwrap_or(usual)
}

/// Resident memory of a process, in bytes.
fn resident(id: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{id}/statm")).unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4_096
}

/// Appends many messages, and waits for the acknowledgement of each thousandth only.
async fn flood(client: &Client, subject: &str, bodies: impl Iterator<Item = String>) {
    for (number, body) in bodies.enumerate() {
        if number % 1_000 == 999 {
            publish_body(client, subject, &body).await;
        } else {
            client
                .publish(subject.to_owned(), body.into())
                .await
                .unwrap();
        }
    }
    client.flush().await.unwrap();
}

/// The slowest of some pages of a room.
async fn slowest(client: &Client, room: &str, pages: u32) -> Duration {
    let mut slowest = Duration::ZERO;
    for number in 0..pages {
        let asked = Instant::now();
        // No two are alike, because identical requests may share one page.
        let got = ask(client, room, json!({"limit": 10 + number})).await;
        assert!(!got.messages.is_empty());
        slowest = slowest.max(asked.elapsed());
    }
    slowest
}

#[tokio::test]
async fn one_malformed_message_among_many_costs_its_room_no_page() {
    let world = World::start().await;
    let function = world.spawn("get-history").await;
    let client = world.client("publisher").await;
    let mut raw = RawClient::connect(world.nats(), "publisher").await;
    let half = many("SCROLLBACK_MANY", 12_000) / 2;
    let text = |number: u64| json!({"user": "ann", "text": number.to_string()}).to_string();
    publish(&client, "quiet", "hello").await;
    flood(&client, "chat.loud", (1..half).map(text)).await;
    publish(&client, "loud", &half.to_string()).await;
    for header in [
        &b"NATS/1.0\r\nA: b\rc\r\n\r\n"[..],
        b"NATS/1.0\r\nno colon\r\n\r\n",
    ] {
        raw.publish_raw(
            "chat.loud",
            None,
            Some(header),
            br#"{"user":"ann","text":"malformed"}"#,
        )
        .await;
        raw.flush().await.unwrap();
    }
    flood(&client, "chat.loud", (half + 1..2 * half).map(text)).await;
    let last = publish(&client, "loud", &(2 * half).to_string()).await;
    let begun = resident(function.id());
    // Across the malformed message in both directions, and far away from it.
    let got = ask(&client, "loud", json!({"limit": 20, "before": half + 14})).await;
    let numbers = |range: std::ops::RangeInclusive<u64>| {
        range.map(|number| number.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(got.texts(), numbers(half - 9..=half + 10));
    let got = ask(&client, "loud", json!({"limit": 20, "after": half - 9})).await;
    assert_eq!(got.texts(), numbers(half - 9..=half + 10));
    let got = ask(&client, "loud", json!({"limit": 5})).await;
    assert_eq!(got.texts(), numbers(2 * half - 4..=2 * half));
    assert_eq!(got.through, last);
    let loud = slowest(&client, "loud", 10).await;
    let quiet = slowest(&client, "quiet", 10).await;
    let grown = resident(function.id()).saturating_sub(begun);
    eprintln!(
        "{} waiting: loud {loud:?}, quiet {quiet:?}, memory +{grown}",
        2 * half
    );
    assert!(
        loud < SOON / 20 && quiet < SOON / 20,
        "loud {loud:?}, quiet {quiet:?}"
    );
    assert!(grown < 128 << 20, "{grown} bytes more");
}

#[tokio::test]
async fn deletions_of_one_room_that_wait_cost_no_other_room() {
    let world = World::start().await;
    let function = world.spawn("get-history").await;
    let client = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let deletions = many("SCROLLBACK_MANY_DELETIONS", 10_500);
    publish(&client, "quiet", "hello").await;
    let target = publish(&client, "loud", "secret").await;
    let gone = publish(&client, "quiet", "secret").await;
    let deletion = |target: u64| {
        json!({
            "type": "delete", "target": target, "id": format!("seq:{target}"), "user": "ann",
            "derived": true, "mode": "soft", "timestamp": 0, "received": 4_000_000_000_000_i64,
            "by": "ann",
        })
        .to_string()
    };
    flood(
        &bootstrap,
        "change.chat.loud",
        (1..500).map(|_| deletion(target)),
    )
    .await;
    publish_body(&bootstrap, "change.chat.loud", &deletion(target)).await;
    // More than a few, and not too many: each room reads its own.
    assert!(ask(&client, "loud", json!({})).await.messages[0].deleted);
    publish_body(&bootstrap, "change.chat.quiet", &deletion(gone)).await;
    flood(
        &bootstrap,
        "change.chat.loud",
        (500..deletions).map(|_| deletion(target)),
    )
    .await;
    publish_body(&bootstrap, "change.chat.loud", &deletion(target)).await;
    let begun = resident(function.id());
    let got = ask(&client, "quiet", json!({})).await;
    assert_eq!(
        (got.messages[0].deleted, got.messages[1].deleted),
        (false, true)
    );
    // Too many: the error says so, because otherwise a deleted text might be shown.
    let (code, reason) = ask_raw(&client, HISTORY.subject(&["loud"]), "")
        .await
        .unwrap_err();
    assert!(
        code == 503 && reason.contains("waits to be stored"),
        "{code} {reason}"
    );
    let quiet = slowest(&client, "quiet", 10).await;
    let grown = resident(function.id()).saturating_sub(begun);
    eprintln!("{deletions} deletions: quiet {quiet:?}, memory +{grown}");
    assert!(quiet < SOON / 20, "{quiet:?}");
    assert!(grown < 128 << 20, "{grown} bytes more");
}
