//! What became of a letter that was appended again.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::letter::Whole;
use base::error::{Error, Result};
use base::seq::Seq;
use protocol::dead_letters::RetryOutcome;
use protocol::message::{Incoming, Limits};
use service::ctx::Ctx;
use timeline::chat::Chat;

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// What stands under the new position: a letter with the same payload, with its reason; this message, by its sender and
/// id (another one can stand there when the log was made anew without its fence); a change.
const FOUND: &str = "
    select (select again.reason from dead_letters as again
             where again.seq = $1 and again.id <> $2 and again.payload = $6
             order by again.id desc limit 1) as reason,
           exists (select from messages
                    where seq = $1 and ($3::text is null or (sender, id, derived) = ($3, $4, $5)))
           or exists (select from changes where seq = $1) as stored";

/// What was seen.
#[derive(Debug)]
pub struct Fate {
    pub outcome: RetryOutcome,
    pub reason: Option<String>,
}

/// Looks until something became of it, or `until`. It is in the log and marked by now, so trouble while looking only
/// means that nothing was seen.
pub async fn watch(ctx: &Ctx<Chat>, letter: &Whole, seq: Seq, until: Instant) -> Fate {
    let message = message(letter, seq);
    let mut pause = FIRST_PAUSE;
    loop {
        match look(ctx, letter, message.as_ref(), seq, until).await {
            Ok(Some(fate)) => return fate,
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(letter = letter.id.get(), %error, "what became of a dead letter was not seen")
            }
        }
        if Instant::now() + pause >= until {
            return Fate {
                outcome: RetryOutcome::Appended,
                reason: None,
            };
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn look(
    ctx: &Ctx<Chat>,
    letter: &Whole,
    message: Option<&Incoming>,
    seq: Seq,
    until: Instant,
) -> Result<Option<Fate>> {
    // The floor before the tables: what was acknowledged by then had been committed, and has to be seen in them.
    let floor = ctx.stream().stored_through().await?;
    let left = until.saturating_duration_since(Instant::now());
    let found = ctx.database().run(left, async |connection| {
        sqlx::query_as(FOUND)
            .bind(seq.as_i64())
            .bind(letter.id.get())
            .bind(message.map(|message| message.user.as_str()))
            .bind(message.map(Incoming::shown_id))
            .bind(message.map(|message| message.id.is_none()))
            .bind(&letter.payload)
            .fetch_one(connection)
            .await
    });
    let (reason, stored): (Option<String>, bool) = found.await.map_err(Error::from)?;
    let outcome = match (&reason, stored) {
        (Some(_), _) => RetryOutcome::DeadLetter,
        (None, true) => RetryOutcome::Stored,
        (None, false) if floor >= seq => RetryOutcome::Duplicate,
        (None, false) => return Ok(None),
    };
    Ok(Some(Fate { outcome, reason }))
}

/// The message as persist-message reads it, if it can be one at all. Whether its text is short enough there is not
/// ours to know: no text is longer than its payload.
fn message(letter: &Whole, seq: Seq) -> Option<Incoming> {
    let message_id = letter.message_id();
    let first_id = letter.again(&message_id).first_id().ok()?;
    let limits = Limits {
        text_bytes: letter.payload.len(),
    };
    Incoming::parse(
        &letter.subject,
        Some(first_id.as_str()),
        &letter.payload,
        seq,
        0,
        limits,
    )
    .ok()
}
