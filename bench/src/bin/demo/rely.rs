//! What a client relies on: acknowledged sending, events, sync, deletion.

use serde_json::json;

use crate::ask::{Events, request};
use crate::{now_ms, show};
use base::error::Fatal;
use nats::connection::Connection;
use protocol::change::event_subject;
use protocol::delete::Deleted;
use protocol::endpoints::{DELETE, SEND, SYNC};
use protocol::name::Room;
use protocol::send::SendAck;
use protocol::sync::SyncPage;

const USER: &str = "demo";

/// Sends, waits for the event, syncs, deletes, syncs again.
pub async fn demonstrate(publisher: &Connection, room: &Room) -> Result<(), Fatal> {
    let room = room.as_str();
    let mut events = Events::subscribe(publisher, event_subject(room)).await?;

    println!(
        "4. Send through send-message: it answers when the log has the message, and the same id again is the same message."
    );
    let body = json!({"text": "Sent once, whatever happens", "id": format!("demo-{}-{}", now_ms(), std::process::id())});
    let ack: SendAck = request(publisher, SEND, &[USER, room], &body, "send-message").await?;
    let again: SendAck = request(publisher, SEND, &[USER, room], &body, "send-message").await?;
    if again.seq != ack.seq || !again.duplicate {
        return Err(Fatal::new(
            "the same id was taken for another message: this should never happen",
        ));
    }
    println!();

    println!(
        "5. Be told when it is stored: relay-outbox publishes events, in order, into a stream of their own."
    );
    events.until(&format!("stored:{}", ack.seq)).await?;
    println!();

    println!("6. Come back after a while: what happened after a cursor.");
    let after = json!({"after": ack.seq.previous(), "limit": 10});
    let page: SyncPage = request(publisher, SYNC, &[room], &after, "sync-messages").await?;
    show::messages(&page.messages);
    println!();

    println!(
        "7. Delete it: a tombstone keeps its place, and whoever syncs is told. \"mode\":\"hard\" erases the text from the disks, too."
    );
    let _: Deleted = request(
        publisher,
        DELETE,
        &[USER, room],
        &json!({"seq": ack.seq}),
        "delete-message",
    )
    .await?;
    let after = json!({"after": ack.seq.previous(), "limit": 10});
    let page: SyncPage = request(publisher, SYNC, &[room], &after, "sync-messages").await?;
    show::messages(&page.messages);
    if !page
        .messages
        .iter()
        .any(|message| message.seq == ack.seq && message.deleted)
        || page.changes.is_empty()
    {
        return Err(Fatal::new(
            "the deletion is not told: this should never happen",
        ));
    }
    println!();
    Ok(())
}
