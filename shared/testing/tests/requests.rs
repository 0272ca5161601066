//! How requests are received and started: in order, fairly, within limits.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::sync::{Arc, Mutex};

use runtime::{Ctx, Function, Identity, Reply, Request, Vars};
use testing::{RawClient, SOON, World, eventually};
use wire::{DM_SEND, Room, SEND, SendRequest, User};

type Seen = Arc<Mutex<Vec<u64>>>;

/// `send-message` as the permissions know it, whose handlers only note the number in the text, before they first wait.
fn noting(seen: &Seen) -> Function<Seen> {
    let seen = seen.clone();
    let identity = Identity { name: "send-message", version: "0.1.0", description: "notes what it is asked" };
    Function::with(identity, async move |_| Ok(seen))
        .answer(SEND, async |ctx: Ctx<Seen>, request: Request<SendRequest<Room>>| {
            note(&ctx, request.ask.draft.text.as_str());
            tokio::task::yield_now().await;
            Ok(Reply::encoded("{}".into(), Vec::new()))
        })
        .answer(DM_SEND, async |ctx: Ctx<Seen>, request: Request<SendRequest<User>>| {
            note(&ctx, request.ask.draft.text.as_str());
            tokio::task::yield_now().await;
            Ok(Reply::encoded("{}".into(), Vec::new()))
        })
}

fn note(ctx: &Ctx<Seen>, number: &str) {
    ctx.lock().unwrap().push(number.parse().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_requests_of_a_caller_are_started_in_the_order_of_their_arrival() {
    const REQUESTS: u64 = 2_000;
    let world = World::bare().await;
    let seen = Seen::default();
    let function = noting(&seen).start(Vars::from_pairs(world.vars("send-message")).unwrap()).await.unwrap();
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    let inbox = client.inbox();
    for number in 0..REQUESTS {
        // Two endpoints in turn: the order is the caller's, not the endpoint's.
        let subject = if number % 3 == 0 { "dm.send.alice.bob" } else { "chat.send.alice.general" };
        let body = format!(r#"{{"text":"{number}"}}"#);
        client.publish_raw(subject, Some(&inbox), None, body.as_bytes()).await;
    }
    client.flush().await.unwrap();
    eventually("all requests are started", SOON, async || (seen.lock().unwrap().len() == REQUESTS as usize).then_some(())).await;
    let started = seen.lock().unwrap().clone();
    assert_eq!(started, (0..REQUESTS).collect::<Vec<_>>());
    function.stop().await.unwrap();
}

#[tokio::test]
async fn with_one_permit_every_endpoint_answers() {
    let world = World::start().await;
    let _history = world.spawn_with("get-history", &[("MAX_CONCURRENT_REQUESTS", "1")]).await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    for _ in 0..3 {
        for subject in ["chat.history.general", "dm.history.alice.bob"] {
            assert_eq!(client.request(subject, None, b"").await.unwrap().payload, b"[]", "{subject}");
        }
    }
}
