//! The job: one round after another, woken when something was stored.

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
/// While something is stored above the ack floor, or a server is away.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Covers a wake-up that was lost, and a replica that died in the middle of its round.
const IDLE_PAUSE: Duration = Duration::from_secs(3);
/// A net below the limits that a round sets itself for PostgreSQL and for each request to NATS.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Relays the outbox to the stream of events.
pub struct Relay {
    publisher: Publisher,
}

impl Job<Chat> for Relay {
    const DESCRIPTION: Description = Description {
        name: "relay",
        subject: EVENTS_STREAM,
        about: "Publishes what the outbox holds; requests are events, errors are rounds that failed",
        failing: "not relayed yet; nothing is lost, the outbox keeps it",
        recovered: "relaying again",
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
        // Forgotten beforehand: a round that is given up in the middle does not get to do so.
        let mut publisher =
            std::mem::replace(&mut self.publisher, Publisher::new(ctx.nats().clone()));
        let done = round(ctx, &mut publisher).await.map_err(Failure::retry)?;
        self.publisher = publisher;
        Ok(done)
    }
}
