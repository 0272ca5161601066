//! Appends a dead letter to the stream again, and reports its outcome.

use std::time::Duration;

use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use tokio::time::Instant;

use crate::dead_letter::{DeadLetter, not_found};
use crate::outcome::{Observed, observe};
use crate::time_limit;
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::append::AppendError;
use protocol::dead_letters::{DeadLetterId, Retried, RetryDeadLetter};
use service::ctx::Ctx;
use service::request::{Reply, Request};
use timeline::append_again::append_again;
use timeline::chat::Chat;

/// The part of a request's time in which the stream has to acknowledge; the rest is for marking the
/// dead letter.
const APPEND_SHARE: f64 = 0.6;
/// However long a request may take: PostgreSQL ends a transaction that is idle for 20 seconds.
const LONGEST_APPEND: Duration = Duration::from_secs(10);

/// Locked until the stream has acknowledged. Either an erasure waits for us and then knows where
/// the text is now, or we wait for the erasure and find nothing left to append.
const LOCK: &str = "
    select subject, headers, payload, reason, outcome, outcome_seq,
           encode(sha256(sha256(headers) || sha256(payload)), 'hex') as digest
      from dead_letters where id = $1
       for update";

const MARK: &str = "
    update dead_letters set outcome = 'retried', outcome_at = now(), outcome_seq = $2
     where id = $1 and outcome is null";

/// `deadletters.retry`
pub async fn retry(ctx: Ctx<Chat>, request: Request<RetryDeadLetter>) -> Result<Reply<Retried>> {
    let RetryDeadLetter(id) = request.body;
    let begun = Instant::now();
    let append_by = begun + ctx.settings().request_deadline().mul_f64(APPEND_SHARE);
    let appended = ctx.database().run(time_limit(&ctx), async |connection| {
        append_and_mark(&ctx, connection, id, append_by).await
    });
    let (dead_letter, seq) = appended.await??;
    tracing::info!(
        dead_letter = id.get(),
        seq = seq.get(),
        "an operator had a dead letter appended again"
    );
    let until = begun + time_limit(&ctx);
    let Observed { outcome, reason } = observe(&ctx, &dead_letter, seq, until).await;
    Reply::json(&Retried {
        id,
        seq,
        outcome,
        reason,
    })
}

/// Appends the dead letter and marks it. A failure in between leaves it as it was, and another
/// retry finishes it.
async fn append_and_mark(
    ctx: &Ctx<Chat>,
    connection: &mut PgConnection,
    id: DeadLetterId,
    until: Instant,
) -> Result<Result<(DeadLetter, Seq)>, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let locked = sqlx::query(LOCK).bind(id.get());
    let appended = match locked.fetch_optional(&mut *transaction).await? {
        Some(row) => append(ctx, DeadLetter::from_row(id, &row)?, until).await,
        None => Err(not_found(id)),
    };
    match &appended {
        Ok((_, seq)) => {
            let mark = sqlx::query(MARK).bind(id.get()).bind(seq.as_i64());
            mark.execute(&mut *transaction).await?;
            transaction.commit().await?;
        }
        Err(_) => transaction.rollback().await?,
    }
    Ok(appended)
}

async fn append(
    ctx: &Ctx<Chat>,
    dead_letter: DeadLetter,
    until: Instant,
) -> Result<(DeadLetter, Seq)> {
    if let Some(refusal) = dead_letter.refusal() {
        return Err(refusal);
    }
    let left = until.saturating_duration_since(Instant::now());
    let limit = left.clamp(Duration::from_millis(1), LONGEST_APPEND);
    let message_id = dead_letter.message_id();
    match append_again(ctx.nats(), dead_letter.again(&message_id), limit).await {
        Ok(seq) => Ok((dead_letter, seq)),
        Err(error) => Err(not_appended(dead_letter.id, error)),
    }
}

fn not_appended(id: DeadLetterId, error: AppendError) -> Error {
    let unavailable = |what: &str| {
        let reason = format!("{what}; dead letter {id} is unchanged");
        Error::new(Code::Unavailable, reason)
    };
    let reply = match &error {
        AppendError::MalformedHeaders(_) => {
            let reason = format!(
                "dead letter {id} has headers that cannot be sent again; look at it with show, \
                 drop it"
            );
            Error::new(Code::Conflict, reason)
        }
        AppendError::TooLarge(_) => Error::new(
            Code::TooLarge,
            "with the headers a retry adds, this is larger than the server's max_payload or the \
             stream takes; raise the limit first",
        ),
        AppendError::Full(_) => unavailable("the stream is full: make room and try again"),
        AppendError::Refused(_) => {
            tracing::warn!(
                dead_letter = id.get(), %error,
                "the stream refused a dead letter, which is unchanged. If this stays, compare the \
                 stream's configuration with the one in nats/streams"
            );
            unavailable("the stream refuses the message; the operator's log says why")
        }
        AppendError::NoStream => {
            unavailable("the stream is not there: JetStream is away, or being set up; try again")
        }
        AppendError::Unanswered(_) => Error::new(
            Code::Unavailable,
            "the stream does not acknowledge; it may have stored the message all the same: try \
             again, it is appended once",
        ),
    };
    reply.with_detail(error)
}
