//! Requests are started in order, fairly, and within limits.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use protocol::endpoints::{DM_SEND, SEND};
use protocol::name::{Room, User};
use protocol::send::SendRequest;
use service::config::Vars;
use service::ctx::Ctx;
use service::function::{Function, Identity};
use service::request::{Reply, Request};
use testing::{RawClient, SOON, World, eventually};

type Seen = Arc<Mutex<Vec<u64>>>;

/// A function with the user of `send-message`. Its handlers only note the number in the text,
/// before their first await.
fn noting(seen: &Seen) -> Function<Seen> {
    let seen = seen.clone();
    let identity = Identity {
        project: protocol::PROJECT,
        name: "send-message",
        version: "0.1.0",
        description: "notes what it is asked",
    };
    Function::with(identity, async move |_| Ok(seen))
        .answer(
            SEND,
            async |ctx: Ctx<Seen>, request: Request<SendRequest<Room>>| {
                note(&ctx, request.body.draft.text.as_str());
                tokio::task::yield_now().await;
                Ok(Reply::encoded("{}".into(), Vec::new()))
            },
        )
        .answer(
            DM_SEND,
            async |ctx: Ctx<Seen>, request: Request<SendRequest<User>>| {
                note(&ctx, request.body.draft.text.as_str());
                tokio::task::yield_now().await;
                Ok(Reply::encoded("{}".into(), Vec::new()))
            },
        )
}

fn note(ctx: &Ctx<Seen>, number: &str) {
    ctx.lock().unwrap().push(number.parse().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_requests_of_a_caller_are_started_in_the_order_of_their_arrival() {
    const REQUESTS: u64 = 2_000;
    let world = World::bare().await;
    let seen = Seen::default();
    let function = noting(&seen)
        .start(Vars::from_pairs(world.vars("send-message")))
        .await
        .unwrap();
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    let inbox = client.inbox();
    for number in 0..REQUESTS {
        // Two endpoints in turn: the order is kept for each caller, not for each endpoint.
        let subject = if number % 3 == 0 {
            "dm.send.alice.bob"
        } else {
            "chat.send.alice.general"
        };
        let body = format!(r#"{{"text":"{number}"}}"#);
        client
            .publish_raw(subject, Some(&inbox), None, body.as_bytes())
            .await;
    }
    client.flush().await.unwrap();
    eventually("all requests are started", SOON, async || {
        (seen.lock().unwrap().len() == REQUESTS as usize).then_some(())
    })
    .await;
    let started = seen.lock().unwrap().clone();
    assert_eq!(started, (0..REQUESTS).collect::<Vec<_>>());
    function.stop().await.unwrap();
}

#[tokio::test]
async fn with_one_permit_every_endpoint_answers() {
    let world = World::start().await;
    let _history = world
        .spawn_with("get-history", &[("MAX_CONCURRENT_REQUESTS", "1")])
        .await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    for _ in 0..3 {
        // Twice each: the first request would free a permit that an idle endpoint held.
        for subject in [
            "chat.history.general",
            "chat.history.general",
            "dm.history.alice.bob",
            "dm.history.alice.bob",
        ] {
            assert_eq!(
                client.request(subject, None, b"").await.unwrap().payload,
                b"[]",
                "{subject}"
            );
        }
    }
}

const FLOOD: usize = 20_000;

/// The replies to a flood, counted by code; 200 is a page.
async fn answers(flooder: &mut RawClient) -> BTreeMap<u16, usize> {
    let mut codes = BTreeMap::new();
    for _ in 0..FLOOD {
        let Some(answer) = flooder.next(SOON).await else {
            break;
        };
        let headers = String::from_utf8_lossy(&answer.headers).into_owned();
        let code = headers
            .split_once("Nats-Service-Error-Code: ")
            .and_then(|(_, rest)| rest.lines().next()?.parse().ok());
        *codes.entry(code.unwrap_or(200)).or_default() += 1;
    }
    codes
}

/// The peak memory of a process, in MB.
fn peak_megabytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_one_client_is_refused_and_holds_up_nobody_else() {
    let world = World::start().await;
    // Only the limits of the queue may refuse requests, not the deadline, however slow the machine.
    let deadline = [
        ("REQUEST_DEADLINE_MS", "60000"),
        ("MAX_CONCURRENT_REQUESTS", "16"),
    ];
    let history = world.spawn_with("get-history", &deadline).await;
    let mut flooder = RawClient::connect(world.nats(), "publisher").await;
    flooder.subscribe("_INBOX.publisher.flood.>").await;
    flooder.flush().await.unwrap();
    let flood: String = (0..FLOOD)
        .map(|n| format!("PUB chat.history.room-{n} _INBOX.publisher.flood.{n} 0\r\n\r\n"))
        .collect();
    let begun = Instant::now();
    flooder.send(flood.as_bytes()).await;
    // The server has received the whole flood before the other client asks.
    flooder.flush().await.unwrap();
    let operator = world.client("operator").await;
    let asked = Instant::now();
    let reply = operator
        .request("chat.history.general", "".into())
        .await
        .unwrap();
    let waited = asked.elapsed();
    assert_eq!(&reply.payload[..], b"[]");
    let codes = answers(&mut flooder).await;
    let all = begun.elapsed();
    println!(
        "one other request {waited:?}, the flood {all:?}: {codes:?}, {} MB",
        peak_megabytes(history.id())
    );
    assert_eq!(
        codes.values().sum::<usize>(),
        FLOOD,
        "every request of the flood has an answer: {codes:?}"
    );
    assert_eq!(
        codes.keys().copied().collect::<Vec<_>>(),
        [200, 503],
        "{codes:?}"
    );
    assert!(
        waited * 4 < all,
        "another client waited {waited:?} while the flood took {all:?}"
    );
    assert!(
        peak_megabytes(history.id()) < 200,
        "{} MB",
        peak_megabytes(history.id())
    );

    let stats = operator
        .request(
            format!("$SRV.STATS.get-history.{}", history.instance().unwrap()),
            "".into(),
        )
        .await
        .unwrap();
    let stats: serde_json::Value = serde_json::from_slice(&stats.payload).unwrap();
    let data = &stats["endpoints"][0]["data"];
    assert_eq!(
        (data["overloaded"].as_u64(), data["waiting"].as_u64()),
        (codes.get(&503).map(|n| *n as u64), Some(0)),
        "{stats}"
    );
}

#[tokio::test]
async fn a_request_that_waited_longer_than_its_deadline_is_dropped() {
    let world = World::start().await;
    let limits = [
        ("REQUEST_DEADLINE_MS", "300"),
        ("MAX_CONCURRENT_REQUESTS", "1"),
    ];
    let history = world.spawn_with("get-history", &limits).await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    client.subscribe("_INBOX.publisher.flood.>").await;
    let requests: String = (0..3_000)
        .map(|n| format!("PUB chat.history.room-{n} _INBOX.publisher.flood.{n} 0\r\n\r\n"))
        .collect();
    client.send(requests.as_bytes()).await;
    let mut late = 0;
    for _ in 0..3_000 {
        let answer = client.next(SOON).await.unwrap();
        late +=
            usize::from(String::from_utf8_lossy(&answer.headers).contains("this waited too long"));
    }
    let operator = world.client("operator").await;
    let stats = operator
        .request(
            format!("$SRV.STATS.get-history.{}", history.instance().unwrap()),
            "".into(),
        )
        .await
        .unwrap();
    let stats: serde_json::Value = serde_json::from_slice(&stats.payload).unwrap();
    assert!(late > 0, "3,000 pages one after the other within 300 ms?");
    assert_eq!(stats["endpoints"][0]["data"]["late"], late, "{stats}");
}
