//! The job: runs rounds, and is woken when something was stored.

use std::time::Duration;

use crate::publish::Publisher;
use crate::round::round;
use protocol::subject::{EVENTS_STREAM, OUTBOX_WAKE};
use service::ctx::Ctx;
use service::job::{Description, Done, Failure, Job, Schedule, WakeUp};
use service::meter::Meter;
use timeline::chat::Chat;

/// The wake-up comes before the acknowledgements have moved the consumer's ack floor; they take
/// milliseconds.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// While something is stored above the ack floor, or a server is down.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Covers a wake-up that was lost, and a replica that died in the middle of its round.
const IDLE_PAUSE: Duration = Duration::from_secs(3);
/// A round has its own limits for PostgreSQL and for each request to NATS; this is beyond them.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Relays the outbox to the stream of events.
pub struct Relay {
    publisher: Publisher,
}

impl Job<Chat> for Relay {
    const DESCRIPTION: Description = Description {
        name: "relay",
        subject: EVENTS_STREAM,
        about: "Publishes what the outbox holds; requests are events, errors are rounds that \
                failed",
        failing: "events are not relayed yet; nothing is lost, the outbox keeps them; trying again \
                  within a second; if this stays, look at the server that the error names",
        recovered: "events are relayed again",
    };

    fn start(ctx: &Ctx<Chat>) -> (Relay, Schedule) {
        let publisher = Publisher::new(ctx.nats().clone());
        let schedule = Schedule::every(IDLE_PAUSE)
            .retry(FIRST_PAUSE, LONGEST_PAUSE)
            .timeout(TIMEOUT)
            .wake_up(WakeUp::Subject(OUTBOX_WAKE));
        (Relay { publisher }, schedule)
    }

    async fn run(&mut self, ctx: &Ctx<Chat>, _: &Meter) -> Result<Done, Failure> {
        // A fresh publisher reads the stream's state again. It is put in place before the round,
        // because a round that times out is dropped and could not do so.
        let mut publisher =
            std::mem::replace(&mut self.publisher, Publisher::new(ctx.nats().clone()));
        let done = round(ctx, &mut publisher).await.map_err(Failure::retry)?;
        self.publisher = publisher;
        Ok(done)
    }
}
