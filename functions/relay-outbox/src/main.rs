//! Moves the outbox to `CHAT_EVENTS`: what was stored, deleted, delivered and read, as events, in the order of the log.

use timeline::chat::Chat;

mod publish;
mod receipts;
mod round;

#[cfg(test)]
mod tests;
mod trouble;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use base::error::Fatal;
use futures::{FutureExt, StreamExt};
use protocol::subject::{EVENTS_STREAM, OUTBOX_WAKE};
use publish::Publisher;
use round::{Next, Round, round};
use service::ctx::Ctx;
use service::function::Function;
use service::meter::Meter;
use service::this;
use trouble::Trouble;

/// The wake comes before the acknowledgements have moved the floor; they take milliseconds.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// While something is stored above the floor, or a server is away.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Covers a wake that was lost, and a copy that died in the middle of its round.
const IDLE_PAUSE: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Chat> {
    Function::with(this!(), async |ctx: Ctx| Chat::open(&ctx)).work(
        "relay",
        EVENTS_STREAM,
        "Publishes what the outbox holds; requests are events, errors are rounds that failed",
        relay_outbox,
    )
}

async fn relay_outbox(ctx: Ctx<Chat>, meter: Meter) -> Result<(), Fatal> {
    let subscribed = ctx.nats().client().subscribe(OUTBOX_WAKE).await;
    let mut wakes = subscribed
        .map_err(|error| Fatal::new(format!("cannot listen to {OUTBOX_WAKE}: {error}")))?;
    let mut publisher = Publisher::new(ctx.nats().clone());
    let (mut pause, mut told) = (FIRST_PAUSE, String::new());
    while !ctx.stop().is_cancelled() {
        // What is in the outbox by now, this round finds.
        while wakes.next().now_or_never().flatten().is_some() {}
        let begun = Instant::now();
        let outcome = round(&ctx, &mut publisher).await;
        let failed = outcome.is_err();
        let wait = match outcome {
            Ok(Round { published, next }) => {
                if !told.is_empty() {
                    tracing::info!("relaying again");
                    told.clear();
                }
                if published > 0 {
                    meter.handled(published, begun.elapsed());
                }
                match next {
                    Next::Again => continue,
                    Next::Waiting => pause,
                    Next::Idle | Next::Elsewhere => IDLE_PAUSE,
                }
            }
            Err(trouble) => {
                publisher.forget();
                meter.refused(trouble.to_string());
                tell_once(&trouble, &mut told);
                if let Some(objection) = ctx.nats().refused() {
                    return Err(Fatal::new(format!(
                        "NATS refuses this user what it needs: {objection}; check nats/accounts.conf"
                    )));
                }
                pause
            }
        };
        pause = (pause * 2).min(LONGEST_PAUSE);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            // What is away does not come back for being called.
            wake = wakes.next(), if !failed => match wake {
                Some(_) => pause = FIRST_PAUSE,
                None => return Err(Fatal::new("the connection to NATS is closed")),
            },
            () = ctx.stop().cancelled() => {}
        }
    }
    Ok(())
}

/// The same trouble is worth one line, however often it is met.
fn tell_once(trouble: &Trouble, told: &mut String) {
    let line = trouble.to_string();
    if *told != line {
        tracing::warn!("not relayed yet; nothing is lost, the outbox keeps it: {line}");
        *told = line;
    }
}
