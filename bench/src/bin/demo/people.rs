//! Two people, one of them away: what waits, what is delivered, what is read.
//!
//! They are made for this run. A mark never moves back, so people of an earlier run would have everything delivered before it is
//! sent; and whoever lives here already keeps their inbox as it is.

use serde_json::json;

use crate::ask::{Events, request, request_quietly};
use crate::{PAGE, now_ms, show};
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
struct Two<'a> {
    publisher: &'a Connection,
    alice: String,
    bob: String,
    room: String,
    sent: Vec<Seq>,
}

/// Alice sends while bob is away; he comes back, dies, comes back, confirms, reads.
pub async fn demonstrate(publisher: &Connection) -> Result<(), Fatal> {
    // Two that are shown in the same millisecond are two processes.
    let run = format!("{}-{}", now_ms(), std::process::id());
    let (alice, bob) = (format!("demo-alice-{run}"), format!("demo-bob-{run}"));
    // The names sorted, as they are.
    let room = format!("dm.{alice}.{bob}");
    let mut events = Events::subscribe(publisher, event_subject(&room)).await?;
    let mut two = Two {
        publisher,
        alice,
        bob,
        room,
        sent: Vec::new(),
    };

    println!(
        "8. Two people: bob is away while alice writes to him. History tells her how far her messages came."
    );
    two.send().await?;
    two.history([Status::Sent; 3]).await?;

    println!(
        "9. Bob is back and asks what waits for him. He dies before he confirms it, comes back, and gets the same again."
    );
    two.inbox().await?;
    let through = two.inbox().await?;

    println!("10. He confirms what he holds. Alice is told, by an event and by history.");
    let marked = request(
        publisher,
        DELIVERED,
        &[&two.bob],
        &json!({ "through": through }),
        "track-receipts",
    )
    .await?;
    two.told(&mut events, &marked, through, Event::Delivered)
        .await?;
    two.history([Status::Delivered; 3]).await?;

    println!("11. He reads two of the three.");
    let through = two.sent[1];
    let marked = request(
        publisher,
        DM_READ,
        &[&two.bob, &two.alice],
        &json!({ "through": through }),
        "track-receipts",
    )
    .await?;
    two.told(&mut events, &marked, through, Event::Read).await?;
    two.history([Status::Read, Status::Read, Status::Delivered])
        .await
}

impl Two<'_> {
    async fn send(&mut self) -> Result<(), Fatal> {
        for (number, text) in (1..).zip(TEXTS) {
            // With an id, so that asking again while something still starts sends nothing twice.
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

    async fn history(&self, status: [Status; 3]) -> Result<(), Fatal> {
        let body = json!({ "limit": PAGE });
        let page: Vec<Message> = request_quietly(
            self.publisher,
            DM_HISTORY,
            &[&self.alice, &self.bob],
            &body,
            "get-history",
        )
        .await?;
        show::messages(&page);
        println!();
        self.check(&page, status, "history")
    }

    /// What waits for bob; up to where it is complete.
    async fn inbox(&self) -> Result<Seq, Fatal> {
        let page: SyncPage = request_quietly(
            self.publisher,
            DM_INBOX,
            &[&self.bob],
            &json!({ "limit": PAGE }),
            "sync-messages",
        )
        .await?;
        show::messages(&page.messages);
        println!("     through {}, more: {}\n", page.through, page.more);
        if page.more || !page.changes.is_empty() {
            return Err(wrong("bob's inbox holds more than alice's messages"));
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

    /// Bob's mark is where he put it, and alice hears of it.
    async fn told(
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
            return Err(wrong("bob's mark is not where he put it"));
        }
        events
            .until(
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
