//! A letter back into the log, and what became of it.

use std::time::Duration;

use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use tokio::time::Instant;

use crate::fate::{self, Fate};
use crate::letter::Whole;
use crate::{missing, patience};
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::append::AppendError;
use protocol::dead_letters::{DeadLetterId, Retried, RetryDeadLetter};
use service::ctx::Ctx;
use service::request::{Reply, Request};
use timeline::append_again::append_again;
use timeline::chat::Chat;

/// The part of a request's time in which the log has to acknowledge; what is left is for marking the letter.
const APPEND_SHARE: f64 = 0.6;
/// However long a request may take: PostgreSQL ends a transaction that stands still for 20 seconds.
const LONGEST_APPEND: Duration = Duration::from_secs(10);

/// Held until the log has it: whoever erases a letter waits for us, and then knows where its text is now; or we wait, and
/// find nothing left to append.
const HOLD: &str = "
    select subject, headers, payload, reason, outcome, outcome_seq,
           encode(sha256(sha256(headers) || sha256(payload)), 'hex') as digest
      from dead_letters where id = $1
       for update";

const MARK: &str = "
    update dead_letters set outcome = 'retried', outcome_at = now(), outcome_seq = $2 where id = $1 and outcome is null";

pub async fn retry(ctx: Ctx<Chat>, request: Request<RetryDeadLetter>) -> Result<Reply<Retried>> {
    let RetryDeadLetter(id) = request.body;
    let begun = Instant::now();
    let append_by = begun + ctx.settings().request_deadline().mul_f64(APPEND_SHARE);
    let appended = ctx.database().run(patience(&ctx), async |connection| {
        append(&ctx, connection, id, append_by).await
    });
    let (letter, seq) = appended.await??;
    tracing::info!(
        letter = id.get(),
        seq = seq.get(),
        "a dead letter was appended again"
    );
    let Fate { outcome, reason } = fate::watch(&ctx, &letter, seq, begun + patience(&ctx)).await;
    Reply::json(&Retried {
        id,
        seq,
        outcome,
        reason,
    })
}

/// Appends the letter and marks it. Whatever fails in between leaves it as it was, and the same again finishes it.
async fn append(
    ctx: &Ctx<Chat>,
    connection: &mut PgConnection,
    id: DeadLetterId,
    until: Instant,
) -> Result<Result<(Whole, Seq)>, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let appended = match sqlx::query(HOLD)
        .bind(id.get())
        .fetch_optional(&mut *transaction)
        .await?
    {
        Some(row) => send(ctx, Whole::read(id, &row)?, until).await,
        None => Err(missing(id)),
    };
    match &appended {
        Ok((_, seq)) => {
            sqlx::query(MARK)
                .bind(id.get())
                .bind(seq.as_i64())
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await?;
        }
        Err(_) => transaction.rollback().await?,
    }
    Ok(appended)
}

async fn send(ctx: &Ctx<Chat>, letter: Whole, until: Instant) -> Result<(Whole, Seq)> {
    if let Some(refusal) = letter.refusal() {
        return Err(refusal);
    }
    let limit = until
        .saturating_duration_since(Instant::now())
        .clamp(Duration::from_millis(1), LONGEST_APPEND);
    let appended = append_again(ctx.nats(), letter.again(&letter.message_id()), limit).await;
    let seq = appended.map_err(|error| refused(letter.id, error))?;
    Ok((letter, seq))
}

fn refused(id: DeadLetterId, error: AppendError) -> Error {
    let unavailable = |what: &str| {
        Error::new(
            Code::Unavailable,
            format!("{what}; dead letter {id} is unchanged"),
        )
    };
    let answer = match &error {
        AppendError::MalformedHeaders(_) => Error::new(
            Code::Conflict,
            format!(
                "dead letter {id} has headers that cannot be sent again; look at it with show, drop it"
            ),
        ),
        AppendError::TooLarge(_) => {
            let reason = "with the headers a retry adds, this is larger than the server's max_payload or the log takes; raise the limit first";
            Error::new(Code::TooLarge, reason)
        }
        AppendError::Full(_) => unavailable("the log is full: make room and try again"),
        AppendError::Refused(_) => {
            unavailable("the log refuses the message; the operator's log says why")
        }
        AppendError::NoStream => {
            unavailable("the log is not there: JetStream is away, or being set up; try again")
        }
        AppendError::Unanswered(_) => {
            let reason = "the log does not acknowledge; it may have taken the message all the same: try again, it is appended once";
            Error::new(Code::Unavailable, reason)
        }
    };
    if matches!(error, AppendError::Refused(_)) {
        tracing::warn!(letter = id.get(), %error, "the log refuses a dead letter");
    }
    answer.with_detail(error)
}
