//! Answers `chat.send.{u}.{room}` and `dm.send.{u}.{peer}`: checks a message, appends it to the log together with
//! whatever else is waiting, and answers when the log has it.

use timeline::chat::Chat;

mod append;
mod commit;
mod index;
mod known;
mod outgoing;
mod rate;
mod secret;
mod sequencer;

#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use base::error::Code;
use base::error::{Error, Fatal, Result};
use base::span::SpanGuard;
use commit::Committer;
use nats::trace::inject_trace;
use outgoing::Outgoing;
use protocol::endpoints::{DM_SEND, SEND};
use protocol::name::{Room, User};
use protocol::send::{Draft, SendAck, SendRequest, SentStatus};
use protocol::subject::{StreamSubject, direct_subject};
use rate::Rate;
use serde::Deserialize;
use service::ctx::Ctx;
use service::function::Function;
use service::request::{Reply, Request};
use service::this;
use tracing::Instrument;

/// What this function reads beyond what every function reads.
#[derive(Debug, Deserialize)]
struct Settings {
    /// `SEND_RATE_PER_SECOND`: messages a second one user may send, lastingly; per copy of this function.
    #[serde(default = "default_rate_per_second")]
    send_rate_per_second: f64,
    /// `SEND_BURST`: messages one user may send at once after a pause; per copy of this function.
    #[serde(default = "default_burst")]
    send_burst: u32,
    /// `SEND_MIN_BATCH`: fewer messages than these go to the log one by one, side by side. For each batch nats-server makes a
    /// file store of its own and removes it, which takes as long as some thirty plain publishes.
    #[serde(default = "default_min_batch")]
    send_min_batch: usize,
}

/// One message every quarter of an hour.
const SLOWEST_RATE: f64 = 0.001;
const FASTEST_RATE: f64 = 1_000_000.0;
const LARGEST_BURST: u32 = 1_000_000;

impl Settings {
    fn check(&self) -> Result<(), Fatal> {
        // Written so that NaN, which is in no range, is refused.
        if !(SLOWEST_RATE..=FASTEST_RATE).contains(&self.send_rate_per_second) {
            return Err(Fatal::new(format!(
                "configuration: SEND_RATE_PER_SECOND must be from {SLOWEST_RATE} to {FASTEST_RATE}"
            )));
        }
        if !(1..=LARGEST_BURST).contains(&self.send_burst) {
            return Err(Fatal::new(format!(
                "configuration: SEND_BURST must be from 1 to {LARGEST_BURST}"
            )));
        }
        Ok(())
    }
}

/// Nobody types faster; a program that does should publish as a trusted publisher.
const fn default_rate_per_second() -> f64 {
    20.0
}
const fn default_burst() -> u32 {
    100
}
const fn default_min_batch() -> usize {
    32
}

/// What requests share.
struct Shared {
    chat: Chat,
    rate: Rate,
    committer: Committer,
}

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Shared> {
    Function::with(this!(), async |ctx: Ctx| {
        let settings: Settings = ctx.vars().read()?;
        settings.check()?;
        let chat = Chat::open(&ctx)?;
        let chat_ctx = ctx.with_state(chat.clone());
        let rate = Rate::new(settings.send_rate_per_second, settings.send_burst);
        Ok(Shared {
            chat,
            rate,
            committer: Committer::start(chat_ctx, settings.send_min_batch.max(2)),
        })
    })
    .settings(
        "
  SEND_RATE_PER_SECOND     messages a second one user may send, lastingly, in one copy (20)
  SEND_BURST               messages one user may send at once after a pause (100)
  SEND_MIN_BATCH           fewer messages than these do not make a batch (32)",
    )
    .answer(SEND, send_to_room)
    .answer(DM_SEND, send_to_user)
}

async fn send_to_room(
    ctx: Ctx<Shared>,
    request: Request<SendRequest<Room>>,
) -> Result<Reply<SendAck>> {
    let SendRequest { user, to, draft } = request.body;
    // The admin room was refused when the request was read, so the name after the subject's last dot is never needed.
    send(ctx, user, to.stream_subject(), draft).await
}

async fn send_to_user(
    ctx: Ctx<Shared>,
    request: Request<SendRequest<User>>,
) -> Result<Reply<SendAck>> {
    let SendRequest { user, to, draft } = request.body;
    let subject = direct_subject(&user, &to);
    send(ctx, user, subject, draft).await
}

async fn send(
    ctx: Ctx<Shared>,
    user: User,
    subject: String,
    draft: Draft,
) -> Result<Reply<SendAck>> {
    if let Err(wait) = ctx.rate.take(user.as_str(), Instant::now()) {
        return Err(Error::new(Code::TooFast, ctx.rate.sentence(wait)));
    }
    let limit = ctx.chat.limits().text_bytes;
    if draft.text.len() > limit {
        return Err(Error::new(
            Code::TooLarge,
            format!("text is longer than {limit} bytes"),
        ));
    }
    let room = StreamSubject::parse(&subject)
        .map_err(Error::internal)?
        .room();
    let span = tracing::info_span!(
        "send",
        otel.name = format!("send {}", protocol::subject::subject_template(&subject)),
        otel.kind = "producer",
        otel.status_code = tracing::field::Empty,
        error.r#type = tracing::field::Empty,
        messaging.system = "nats",
        messaging.operation.name = "send",
        messaging.operation.r#type = "send",
        messaging.destination.name = subject,
        messaging.destination.template = protocol::subject::subject_template(&subject),
        messaging.message.id = tracing::field::Empty,
    );
    let mut message = Outgoing::new(user, subject, room, draft, now_ms());
    inject_trace(&span, &mut message.headers);
    if message.weight() > ctx.nats().client().server_info().max_payload {
        return Err(Error::new(
            Code::TooLarge,
            "this message is larger than the server's max_payload",
        ));
    }
    let message_id = message.id.clone();
    let failing = SpanGuard::new(&span);
    let sent = ctx
        .committer
        .commit(message, give_up(&ctx))
        .instrument(span.clone())
        .await;
    match &sent {
        Ok(sent) => {
            span.record("messaging.message.id", sent.seq.get());
            failing.done();
        }
        Err(error) if error.code == Code::Conflict => failing.done(),
        Err(error) => failing.failed(error.code.number().to_string()),
    }
    let sent = sent?;
    Reply::json(&SendAck {
        message_id,
        seq: sent.seq,
        status: SentStatus::Sent,
        duplicate: sent.duplicate,
    })
}

/// Before the request's deadline: what is wrong shall be said by whoever knows it.
fn give_up(ctx: &Ctx<Shared>) -> tokio::time::Instant {
    tokio::time::Instant::now() + ctx.settings().request_deadline().mul_f64(0.8)
}

/// Unix milliseconds.
fn now_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
