//! What one sender writes to one room stands in the order in which it came, whatever way each
//! message goes.

use std::future::Future as _;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio::sync::oneshot;

use super::*;
use crate::committer::Committer;
use crate::outgoing::Outgoing;
use crate::pending::Sent;
use protocol::send::Draft;
use service::ctx::Ctx;
use service::function::Function;
use service::this;
use timeline::chat::Chat;
use timeline::settings::ChatSettings;

/// Whether the message with this number has an id.
type HasId = fn(usize) -> bool;

/// Which messages of a burst come with an id.
const IDS: [(&str, HasId); 4] = [
    ("none", |_| false),
    ("all", |_| true),
    ("the first", |number| number == 0),
    ("every other", |number| number % 2 == 1),
];

/// A committer on the servers of this world, without the service in front of it.
async fn committer(world: &World, min_batch: usize) -> (Arc<Committer>, Running) {
    let (ready, started) = oneshot::channel();
    let ready = std::sync::Mutex::new(Some(ready));
    let function = Function::with(this!(protocol::PROJECT), async move |ctx: Ctx| {
        if let Some(ready) = ready.lock().unwrap().take() {
            let _ = ready.send(Arc::new(Committer::start(
                ctx.with_state(Chat::open(&ctx)?),
                min_batch,
            )));
        }
        Ok(())
    })
    .settings::<ChatSettings>();
    let running = function
        .start(Vars::from_pairs(world.vars("send-message")))
        .await
        .unwrap();
    (started.await.unwrap(), running)
}

fn message(user: &str, room: &str, text: &str, id: Option<String>) -> Outgoing {
    let draft = Draft {
        text: text.to_owned(),
        id,
        timestamp: None,
    };
    let user = protocol::name::User::parse(user).unwrap();
    Outgoing::new(
        user,
        format!("chat.{room}"),
        room.to_owned(),
        draft,
        1_700_000_000_000,
    )
}

/// Sends all of them side by side: each is polled once in this order, and then left to itself.
async fn send_all(
    committer: &Arc<Committer>,
    messages: Vec<Outgoing>,
) -> Vec<base::error::Result<Sent>> {
    let until = tokio::time::Instant::now() + SOON;
    let mut sends = Vec::new();
    for message in messages {
        let committer = committer.clone();
        let mut send = Box::pin(async move { committer.commit(message, until).await });
        // Nothing is awaited in between: whatever is ready by then, the others come behind.
        sends.push(
            match send.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(sent) => tokio::spawn(std::future::ready(sent)),
                Poll::Pending => tokio::spawn(send),
            },
        );
    }
    let mut answers = Vec::new();
    for send in sends {
        answers.push(send.await.unwrap());
    }
    answers
}

fn inversions(sent: &[base::error::Result<Sent>]) -> usize {
    let places: Vec<u64> = sent
        .iter()
        .map(|sent| sent.as_ref().unwrap().seq.get())
        .collect();
    places.windows(2).filter(|pair| pair[0] >= pair[1]).count()
}

#[tokio::test]
async fn messages_of_one_sender_are_appended_in_the_order_in_which_they_came() {
    let world = World::start().await;
    // Of two batches at once, of singles side by side, of both.
    for min_batch in [2, 32, 1_000] {
        let (committer, running) = committer(&world, min_batch).await;
        for (burst, rounds) in [(2, 40), (10, 20), (60, 5)] {
            for (ids, has_id) in IDS {
                let mut inverted = 0;
                for round in 0..rounds {
                    let name = format!("{min_batch}-{burst}-{}-{round}", ids.replace(' ', "-"));
                    let id = |number: usize| has_id(number).then(|| format!("{name}-{number}"));
                    let messages = (0..burst)
                        .map(|number| message(&name, "general", &number.to_string(), id(number)));
                    inverted += usize::from(
                        inversions(&send_all(&committer, messages.collect()).await) > 0,
                    );
                }
                assert_eq!(
                    inverted, 0,
                    "of {rounds} rounds of {burst}, with ids: {ids}, batches from {min_batch}"
                );
            }
        }
        running.stop().await.unwrap();
    }
}

/// The path of a lone sender, taken away while others are there, is free when they are gone.
#[tokio::test]
async fn a_lone_sender_goes_at_once_also_after_others_were_there() {
    let world = World::start().await;
    let (committer, running) = committer(&world, 1_000).await;
    assert!(committer.is_idle());
    for id in [false, true] {
        let messages = (0..40).map(|number| {
            message(
                &format!("user-{number}"),
                "general",
                "x",
                id.then(|| format!("i{number}")),
            )
        });
        assert!(
            send_all(&committer, messages.collect())
                .await
                .iter()
                .all(Result::is_ok)
        );
        assert!(committer.is_idle());
    }
    running.stop().await.unwrap();
}

/// What a batch cannot hold, for its size or because it is known, costs the others neither their
/// place nor their order.
#[tokio::test]
async fn a_batch_that_is_refused_stays_in_order() {
    let (world, _bootstrap) = world_with("max_msg_size", json!(4_000)).await;
    let long = "t".repeat(5_000);
    for min_batch in [2, 1_000] {
        let (committer, running) = committer(&world, min_batch).await;
        for round in 0..5 {
            let name = format!("{min_batch}-{round}");
            let text = |number: usize| {
                if number % 20 == 7 {
                    long.clone()
                } else {
                    number.to_string()
                }
            };
            let id = |number: usize| {
                (!number.is_multiple_of(3)).then(|| format!("{name}-{}", number / 3))
            };
            // Two of three have an id, and share it, with another text: the later one is a
            // conflict.
            let burst: Vec<Outgoing> = (0..60)
                .map(|number| message(&name, "general", &text(number), id(number)))
                .collect();
            let answers = send_all(&committer, burst.clone()).await;
            let sent: Vec<_> = answers
                .iter()
                .filter(|answer| answer.is_ok())
                .cloned()
                .collect();
            assert_eq!(inversions(&sent), 0, "{answers:?}");
            let refused = |code| {
                answers
                    .iter()
                    .filter(|answer| answer.as_ref().is_err_and(|error| error.code == code))
                    .count()
            };
            // 7, 27 and 47 are too long; 8 comes after one that was not stored, and is the first
            // with its id.
            assert_eq!(
                (
                    refused(base::error::Code::TooLarge),
                    refused(base::error::Code::Conflict),
                    sent.len()
                ),
                (3, 18, 39),
                "{answers:?}"
            );
            // Again, without those: each of them stands where it stood, and those without an id
            // stand behind.
            let resent: Vec<usize> = (0..60).filter(|number| answers[*number].is_ok()).collect();
            let again = send_all(
                &committer,
                resent.iter().map(|number| burst[*number].clone()).collect(),
            )
            .await;
            for (number, sent) in resent.iter().zip(&again) {
                let first = answers[*number].as_ref().unwrap();
                let again = sent.as_ref().unwrap();
                assert_eq!(
                    (again.seq, again.duplicate),
                    (first.seq, burst[*number].client_supplied_id),
                    "{number}"
                );
            }
        }
        running.stop().await.unwrap();
    }
}

/// Writes all requests at once on one connection, without waiting for an answer; the places the
/// answers say.
async fn pipelined(world: &World, subject: &str, bodies: &[String]) -> Vec<u64> {
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    let inbox = client.inbox();
    client.subscribe(&format!("{inbox}.*")).await;
    client.flush().await.unwrap();
    let mut bytes = Vec::new();
    for (number, body) in bodies.iter().enumerate() {
        bytes.extend_from_slice(
            format!(
                "PUB {subject} {inbox}.{number} {}\r\n{body}\r\n",
                body.len()
            )
            .as_bytes(),
        );
    }
    client.send(&bytes).await;
    let mut places = vec![0; bodies.len()];
    for _ in bodies {
        let reply = client.next(SOON).await.expect("an answer to each");
        let number: usize = reply.subject.rsplit('.').next().unwrap().parse().unwrap();
        let ack: Value = serde_json::from_slice(&reply.payload).unwrap();
        places[number] = ack["seq"].as_u64().unwrap_or_else(|| panic!("{ack}"));
    }
    places
}

#[tokio::test]
async fn requests_written_back_to_back_are_appended_in_that_order() {
    let world = World::start().await;
    // As configured by default, and as a process: with several threads.
    let _function = world.spawn("send-message").await;
    for (burst, rounds) in [(2, 40), (10, 40), (60, 10)] {
        for (ids, has_id) in IDS {
            let mut inverted = 0;
            for round in 0..rounds {
                let name = format!("u{burst}-{}-{round}", ids.replace(' ', "-"));
                let body = |number: usize| match has_id(number) {
                    true => {
                        json!({"text": number.to_string(), "id": format!("i{number}")}).to_string()
                    }
                    false => json!({"text": number.to_string()}).to_string(),
                };
                let bodies: Vec<String> = (0..burst).map(body).collect();
                let places = pipelined(&world, &SEND.subject(&[&name, "general"]), &bodies).await;
                inverted += usize::from(places.windows(2).any(|pair| pair[0] >= pair[1]));
            }
            assert_eq!(
                inverted, 0,
                "of {rounds} rounds of {burst}, with ids: {ids}"
            );
        }
    }
}
