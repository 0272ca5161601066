//! What a client relies on: acknowledged sending, events, sync, deletion.

use std::time::Duration;

use async_nats::Message as NatsMessage;
use futures::StreamExt;
use runtime::{Connection, Fatal};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};
use wire::{DELETE, Deleted, Endpoint, Room, SEND, SYNC, SendAck, Seq, SyncPage, event_subject, header};

use crate::{ask, now_ms, show};

const USER: &str = "demo";
const TOLD_WITHIN: Duration = Duration::from_secs(30);

/// Sends, waits for the event, syncs, deletes, syncs again.
pub async fn demonstrate(publisher: &Connection, room: &Room) -> Result<(), Fatal> {
    let room = room.as_str();
    let subject = event_subject(room);
    let closed = |error: async_nats::SubscribeError| Fatal::new(format!("{subject}: {error}"));
    let mut events = publisher.client().subscribe(subject.clone()).await.map_err(closed)?;

    println!("4. Send through send-message: it answers when the log has the message, and the same id again is the same message.");
    let body = json!({"text": "Sent once, whatever happens", "id": format!("demo-{}-{}", now_ms(), std::process::id())});
    let ack: SendAck = request(publisher, SEND, &[USER, room], &body, "send-message").await?;
    let again: SendAck = request(publisher, SEND, &[USER, room], &body, "send-message").await?;
    if again.seq != ack.seq || !again.duplicate {
        return Err(Fatal::new("the same id was taken for another message: this should never happen"));
    }
    println!();

    println!("5. Be told when it is stored: relay-outbox publishes events, in order, into a stream of their own.");
    println!("   $ nats sub {subject}");
    let event = until_told(&mut events, ack.seq, &subject).await?;
    println!("   {} {}\n", of(&event, "ce-type"), String::from_utf8_lossy(&event.payload));

    println!("6. Come back after a while: what happened after a cursor.");
    let after = json!({"after": ack.seq.previous(), "limit": 10});
    let page: SyncPage = request(publisher, SYNC, &[room], &after, "sync-messages").await?;
    show::messages(&page.messages);
    println!();

    println!(
        "7. Delete it: a tombstone keeps its place, and whoever syncs is told. \"mode\":\"hard\" erases the text from the disks, too."
    );
    let _: Deleted = request(publisher, DELETE, &[USER, room], &json!({"seq": ack.seq}), "delete-message").await?;
    let after = json!({"after": ack.seq.previous(), "limit": 10});
    let page: SyncPage = request(publisher, SYNC, &[room], &after, "sync-messages").await?;
    show::messages(&page.messages);
    if !page.messages.iter().any(|message| message.seq == ack.seq && message.deleted) || page.changes.is_empty() {
        return Err(Fatal::new("the deletion is not told: this should never happen"));
    }
    println!();
    Ok(())
}

/// Asks, shows question and answer as a person would see them, and reads the answer.
async fn request<Q, R, T: DeserializeOwned>(
    publisher: &Connection,
    endpoint: Endpoint<Q, R>,
    names: &[&str],
    body: &Value,
    who: &str,
) -> Result<T, Fatal> {
    let subject = endpoint.subject(names);
    println!("   $ nats req {subject} '{body}'");
    let span = tracing::info_span!(
        "request",
        otel.name = format!("request {subject}"),
        otel.kind = "client",
        messaging.system = "nats",
        messaging.destination.name = subject,
    );
    let reply = ask(publisher, &subject, &body.to_string(), &span, who).await?;
    if let Some(error) = reply.headers.as_ref().and_then(|headers| headers.get(header::SERVICE_ERROR)) {
        return Err(Fatal::new(format!("{who} answers {}: {error}", of(&reply, header::SERVICE_ERROR_CODE))));
    }
    println!("   {}", String::from_utf8_lossy(&reply.payload));
    serde_json::from_slice(&reply.payload).map_err(|_| Fatal::new(format!("the answer to {subject} is unreadable")))
}

async fn until_told(events: &mut async_nats::Subscriber, seq: Seq, subject: &str) -> Result<NatsMessage, Fatal> {
    let late =
        || Fatal::new(format!("no event for sequence {seq} on {subject} within {} s: does relay-outbox run?", TOLD_WITHIN.as_secs()));
    let deadline = Instant::now() + TOLD_WITHIN;
    loop {
        let event = timeout_at(deadline, events.next()).await.map_err(|_| late())?.ok_or_else(late)?;
        let data: Value = serde_json::from_slice(&event.payload).unwrap_or_default();
        if data.get("seq").and_then(Value::as_u64) == Some(seq.get()) {
            return Ok(event);
        }
    }
}

fn of(message: &NatsMessage, name: &str) -> String {
    message.headers.as_ref().and_then(|headers| headers.get(name)).map(|value| value.as_str().to_owned()).unwrap_or_default()
}
