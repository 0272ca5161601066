//! Two users, one of them away: what waits, what is delivered, what is read.
//!
//! Both are new in every run. A cursor never moves back, so for users of an earlier run everything
//! would be delivered before it is sent; and nobody else's inbox is touched.

use serde_json::json;

use crate::request::{Events, request, request_quietly};
use crate::{PAGE, now_ms, report};
use base::error::Fatal;
use base::seq::Seq;
use nats::connection::Connection;
use protocol::change::event_subject;
use protocol::endpoints::{DELIVERED, DM_HISTORY, DM_INBOX, DM_READ, DM_SEND};
use protocol::event::{Event, ReceiptEvent};
use protocol::message::{Message, Status};
use protocol::receipt::ReceiptAck;
use protocol::send::SendAck;
use protocol::sync::SyncPage;

const TEXTS: [&str; 3] = ["Are you there?", "The train is late", "See you at nine"];

/// Alice, bob, and what she sent him.
struct Participants<'a> {
    publisher: &'a Connection,
    alice: String,
    bob: String,
    room: String,
    sent: Vec<Seq>,
}

/// Alice sends while bob is away; he comes back, dies, comes back, confirms, reads.
pub async fn demonstrate(publisher: &Connection) -> Result<(), Fatal> {
    // Runs in the same millisecond differ by their process ids.
    let run = format!("{}-{}", now_ms(), std::process::id());
    let alice = format!("demo-alice-{run}");
    let bob = format!("demo-bob-{run}");
    // A room of direct messages is named by both users, sorted.
    let room = format!("dm.{alice}.{bob}");
    let mut events = Events::subscribe(publisher, event_subject(&room)).await?;
    let mut users = Participants {
        publisher,
        alice,
        bob,
        room,
        sent: Vec::new(),
    };

    println!(
        "8. Two users: bob is away while alice writes to him. History shows her how far her \
         messages came."
    );
    users.send().await?;
    users.expect_history([Status::Sent; 3]).await?;

    println!(
        "9. Bob is back and fetches what waits for him. His client stops before it confirms, \
         starts again, and gets the same."
    );
    users.inbox().await?;
    let through = users.inbox().await?;

    println!("10. He confirms what he received. Alice learns it from an event and from history.");
    let marked = request(
        publisher,
        DELIVERED,
        &[&users.bob],
        &json!({ "through": through }),
        "track-receipts",
    )
    .await?;
    users
        .expect_receipt(&mut events, &marked, through, Event::Delivered)
        .await?;
    users.expect_history([Status::Delivered; 3]).await?;

    println!("11. He reads two of the three.");
    let through = users.sent[1];
    let marked = request(
        publisher,
        DM_READ,
        &[&users.bob, &users.alice],
        &json!({ "through": through }),
        "track-receipts",
    )
    .await?;
    users
        .expect_receipt(&mut events, &marked, through, Event::Read)
        .await?;
    users
        .expect_history([Status::Read, Status::Read, Status::Delivered])
        .await
}

impl Participants<'_> {
    async fn send(&mut self) -> Result<(), Fatal> {
        for (number, text) in (1..).zip(TEXTS) {
            // With an id, so that a retry while something is still starting sends nothing twice.
            let body = json!({"text": text, "id": format!("demo-{number}")});
            let ack: SendAck = request_quietly(
                self.publisher,
                DM_SEND,
                &[&self.alice, &self.bob],
                &body,
                "send-message",
            )
            .await?;
            self.sent.push(ack.seq);
        }
        Ok(())
    }

    async fn expect_history(&self, status: [Status; 3]) -> Result<(), Fatal> {
        let body = json!({ "limit": PAGE });
        let page: Vec<Message> = request_quietly(
            self.publisher,
            DM_HISTORY,
            &[&self.alice, &self.bob],
            &body,
            "get-history",
        )
        .await?;
        report::print_messages(&page);
        println!();
        self.check(&page, status, "history")
    }

    /// What waits for bob; returns the sequence up to which it is complete.
    async fn inbox(&self) -> Result<Seq, Fatal> {
        let page: SyncPage = request_quietly(
            self.publisher,
            DM_INBOX,
            &[&self.bob],
            &json!({ "limit": PAGE }),
            "sync-messages",
        )
        .await?;
        report::print_messages(&page.messages);
        println!("     through {}, more: {}\n", page.through, page.more);
        if page.more || !page.changes.is_empty() {
            return Err(wrong("bob's inbox contains more than alice's messages"));
        }
        self.check(&page.messages, [Status::Sent; 3], "bob's inbox")
            .map(|()| page.through)
    }

    fn check(&self, page: &[Message], status: [Status; 3], what: &str) -> Result<(), Fatal> {
        let shown = page
            .iter()
            .map(|message| (message.seq, message.text.as_str(), message.status));
        let wanted = self
            .sent
            .iter()
            .zip(TEXTS)
            .zip(status)
            .map(|((seq, text), status)| (*seq, text, Some(status)));
        if shown.eq(wanted) {
            Ok(())
        } else {
            Err(wrong(&format!(
                "{what} is not what was sent, delivered and read"
            )))
        }
    }

    /// Bob's cursor is where he set it, and alice gets the event.
    async fn expect_receipt(
        &self,
        events: &mut Events,
        marked: &ReceiptAck,
        through: Seq,
        event: fn(ReceiptEvent) -> Event,
    ) -> Result<(), Fatal> {
        if *marked
            != (ReceiptAck {
                through,
                moved: true,
            })
        {
            return Err(wrong("bob's cursor is not where he set it"));
        }
        events
            .wait_for(
                &event(ReceiptEvent {
                    user: self.bob.clone(),
                    room: self.room.clone(),
                    through,
                })
                .id(),
            )
            .await
    }
}

fn wrong(what: &str) -> Fatal {
    Fatal::new(format!("{what}: this should never happen"))
}
