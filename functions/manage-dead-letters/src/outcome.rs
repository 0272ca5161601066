//! The outcome of a dead letter that was appended again.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::dead_letter::DeadLetter;
use base::error::{Error, Result};
use base::seq::Seq;
use protocol::dead_letters::RetryOutcome;
use protocol::message::{Incoming, Limits};
use service::ctx::Ctx;
use timeline::chat::Chat;

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// What is stored under the new sequence: the reason of a dead letter with the same payload; and
/// whether this message, by sender and id, or a change is stored. After the stream was recreated
/// without its sequence guard, another message may have the sequence.
const STORED: &str = "
    select (select again.reason from dead_letters as again
             where again.seq = $1 and again.id <> $2 and again.payload = $6
             order by again.id desc limit 1) as reason,
           exists (select from messages
                    where seq = $1
                      and ($3::text is null or (sender, id, derived) = ($3, $4, $5)))
           or exists (select from changes where seq = $1) as stored";

/// What was observed.
#[derive(Debug)]
pub struct Observed {
    pub outcome: RetryOutcome,
    /// Why the message is a dead letter again.
    pub reason: Option<String>,
}

/// Waits for the outcome, at most until `until`. The message is in the stream and its dead letter
/// is marked by now, so an error here only means that no outcome was observed.
pub async fn observe(
    ctx: &Ctx<Chat>,
    dead_letter: &DeadLetter,
    seq: Seq,
    until: Instant,
) -> Observed {
    let message = parse(dead_letter, seq);
    let mut pause = FIRST_PAUSE;
    loop {
        match check(ctx, dead_letter, message.as_ref(), seq, until).await {
            Ok(Some(observed)) => return observed,
            Ok(None) => {}
            Err(error) => tracing::debug!(
                dead_letter = dead_letter.id.get(), %error,
                "the outcome of a retried dead letter could not be read; trying again while the \
                 request has time"
            ),
        }
        if Instant::now() + pause >= until {
            return Observed {
                outcome: RetryOutcome::Appended,
                reason: None,
            };
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn check(
    ctx: &Ctx<Chat>,
    dead_letter: &DeadLetter,
    message: Option<&Incoming>,
    seq: Seq,
    until: Instant,
) -> Result<Option<Observed>> {
    // Before the tables: what was acknowledged by then was committed before, so the tables have it.
    let stored_through = ctx.stream().stored_through().await?;
    let left = until.saturating_duration_since(Instant::now());
    let found = ctx.database().run(left, async |connection| {
        sqlx::query_as(STORED)
            .bind(seq.as_i64())
            .bind(dead_letter.id.get())
            .bind(message.map(|message| message.user.as_str()))
            .bind(message.map(Incoming::shown_id))
            .bind(message.map(|message| message.id.is_none()))
            .bind(&dead_letter.payload)
            .fetch_one(connection)
            .await
    });
    let (reason, stored): (Option<String>, bool) = found.await.map_err(Error::from)?;
    let outcome = match (&reason, stored) {
        (Some(_), _) => RetryOutcome::DeadLetter,
        (None, true) => RetryOutcome::Stored,
        (None, false) if stored_through >= seq => RetryOutcome::Duplicate,
        (None, false) => return Ok(None),
    };
    Ok(Some(Observed { outcome, reason }))
}

/// The message as `persist-message` parses it, if it is one at all. We do not know how long a text
/// may be there; no text is longer than its payload.
fn parse(dead_letter: &DeadLetter, seq: Seq) -> Option<Incoming> {
    let message_id = dead_letter.message_id();
    let first_id = dead_letter.again(&message_id).first_id().ok()?;
    let limits = Limits {
        text_bytes: dead_letter.payload.len(),
    };
    let parsed = Incoming::parse(
        &dead_letter.subject,
        Some(first_id.as_str()),
        &dead_letter.payload,
        seq,
        0,
        limits,
    );
    parsed.ok()
}
