//! What a client relies on in a room: acknowledged sending, events, sync, deletion.

use serde_json::json;

use crate::request::{Events, request};
use crate::{now_ms, report};
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
        "4. Send through send-message: it replies when the stream has the message, and the same \
         id again is the same message."
    );
    let id = format!("demo-{}-{}", now_ms(), std::process::id());
    let body = json!({"text": "Sent once, whatever happens", "id": id});
    let ack: SendAck = request(publisher, SEND, &[USER, room], &body, "send-message").await?;
    let again: SendAck = request(publisher, SEND, &[USER, room], &body, "send-message").await?;
    if again.seq != ack.seq || !again.duplicate {
        return Err(Fatal::new(
            "the same id was accepted as another message: this should never happen",
        ));
    }
    println!();

    println!(
        "5. Get an event when it is stored: relay-outbox publishes events, in order, into a \
         stream of their own."
    );
    events.wait_for(&format!("stored:{}", ack.seq)).await?;
    println!();

    println!("6. Come back after a while: everything that happened after a cursor.");
    let after = json!({"after": ack.seq.previous(), "limit": 10});
    let page: SyncPage = request(publisher, SYNC, &[room], &after, "sync-messages").await?;
    report::print_messages(&page.messages);
    println!();

    println!(
        "7. Delete it: a tombstone keeps its place, and every sync reports it. \"mode\":\"hard\" \
         erases the text from the disks, too."
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
    report::print_messages(&page.messages);
    if !page
        .messages
        .iter()
        .any(|message| message.seq == ack.seq && message.deleted)
        || page.changes.is_empty()
    {
        return Err(Fatal::new(
            "sync does not report the deletion: this should never happen",
        ));
    }
    println!();
    Ok(())
}
