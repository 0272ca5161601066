//! A letter back into the log, and what became of it.

use std::time::Duration;

use runtime::{Again, AppendError, Ctx, Error, Reply, Request, Result, append_again};
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Connection as _, Row};
use tokio::time::Instant;
use wire::{Code, LetterId, Reason, Retried, RetryLetter, Seq, is_in_log};

use crate::fate::{self, Fate};
use crate::{missing, patience, settled};

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

/// A letter, whole.
#[derive(Debug)]
pub struct Whole {
    pub id: LetterId,
    pub subject: String,
    pub headers: Vec<u8>,
    pub payload: Vec<u8>,
    reason: String,
    outcome: Option<String>,
    outcome_seq: Option<i64>,
    digest: String,
}

impl Whole {
    fn read(id: LetterId, row: &PgRow) -> Result<Whole, sqlx::Error> {
        Ok(Whole {
            id,
            subject: row.try_get("subject")?,
            headers: row.try_get("headers")?,
            payload: row.try_get("payload")?,
            reason: row.try_get("reason")?,
            outcome: row.try_get("outcome")?,
            outcome_seq: row.try_get("outcome_seq")?,
            digest: row.try_get("digest")?,
        })
    }

    /// The same for the same letter, so that a retry that died before the letter was marked appends nothing twice. It
    /// begins with what no user's name holds: nobody gets it through send-message.
    pub fn message_id(&self) -> String {
        format!("/retry/{}/{}", self.id, self.digest)
    }

    /// As it goes to the log. JetStream forgets an id after two minutes, the index never: so a message that came
    /// without one gets this, and is stored once however late a retry is repeated.
    pub fn again<'a>(&'a self, message_id: &'a str) -> Again<'a> {
        Again { subject: &self.subject, headers: &self.headers, payload: &self.payload, message_id, unnamed: message_id }
    }

    /// Why it cannot be appended, however often that is tried.
    fn refusal(&self) -> Option<Error> {
        let conflict = |what: String| Some(Error::new(Code::Conflict, format!("dead letter {} {what}", self.id)));
        let unknown_subject = [Reason::MalformedSubject, Reason::NulInSubject].iter().any(|reason| reason.as_str() == self.reason);
        if let Some(outcome) = &self.outcome {
            Some(settled(self.id, outcome, self.outcome_seq))
        } else if self.reason == Reason::BelowFence.as_str() {
            conflict("waits below the fence: stream-bootstrap appends it by itself".to_owned())
        } else if self.reason == Reason::MalformedHeaders.as_str() {
            conflict("has headers that cannot be sent again; look at it with show, publish what is worth keeping, drop it".to_owned())
        } else if unknown_subject
            || self.subject.contains(|c: char| c == char::REPLACEMENT_CHARACTER || c.is_whitespace() || c.is_control())
        {
            conflict("has a subject that cannot be published to; look at it with show, publish what is worth keeping, drop it".to_owned())
        } else if !is_in_log(&self.subject) {
            conflict("has a subject the log does not take in; look at it with show, publish what is worth keeping, drop it".to_owned())
        } else {
            None
        }
    }
}

pub async fn retry(ctx: Ctx, request: Request<RetryLetter>) -> Result<Reply<Retried>> {
    let RetryLetter(id) = request.ask;
    let begun = Instant::now();
    let append_by = begun + ctx.settings().request_deadline().mul_f64(APPEND_SHARE);
    let appended = ctx.database().run(patience(&ctx), async |connection| append(&ctx, connection, id, append_by).await);
    let (letter, seq) = appended.await??;
    tracing::info!(letter = id.get(), seq = seq.get(), "a dead letter was appended again");
    let Fate { outcome, reason } = fate::watch(&ctx, &letter, seq, begun + patience(&ctx)).await;
    Reply::json(&Retried { id, seq, outcome, reason })
}

/// Appends the letter and marks it. Whatever fails in between leaves it as it was, and the same again finishes it.
async fn append(ctx: &Ctx, connection: &mut PgConnection, id: LetterId, until: Instant) -> Result<Result<(Whole, Seq)>, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let appended = match sqlx::query(HOLD).bind(id.get()).fetch_optional(&mut *transaction).await? {
        Some(row) => send(ctx, Whole::read(id, &row)?, until).await,
        None => Err(missing(id)),
    };
    match &appended {
        Ok((_, seq)) => {
            sqlx::query(MARK).bind(id.get()).bind(seq.as_i64()).execute(&mut *transaction).await?;
            transaction.commit().await?;
        }
        Err(_) => transaction.rollback().await?,
    }
    Ok(appended)
}

async fn send(ctx: &Ctx, letter: Whole, until: Instant) -> Result<(Whole, Seq)> {
    if let Some(refusal) = letter.refusal() {
        return Err(refusal);
    }
    let limit = until.saturating_duration_since(Instant::now()).clamp(Duration::from_millis(1), LONGEST_APPEND);
    let appended = append_again(ctx.nats(), letter.again(&letter.message_id()), limit).await;
    let seq = appended.map_err(|error| refused(letter.id, error))?;
    Ok((letter, seq))
}

fn refused(id: LetterId, error: AppendError) -> Error {
    let unavailable = |what: &str| Error::new(Code::Unavailable, format!("{what}; dead letter {id} is unchanged"));
    let answer = match &error {
        AppendError::MalformedHeaders(_) => {
            Error::new(Code::Conflict, format!("dead letter {id} has headers that cannot be sent again; look at it with show, drop it"))
        }
        AppendError::TooLarge(_) => {
            let reason =
                "with the headers a retry adds, this is larger than the server's max_payload or the log takes; raise the limit first";
            Error::new(Code::TooLarge, reason)
        }
        AppendError::Full(_) => unavailable("the log is full: make room and try again"),
        AppendError::Refused(_) => unavailable("the log refuses the message; the operator's log says why"),
        AppendError::NoStream => unavailable("the log is not there: JetStream is away, or being set up; try again"),
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
