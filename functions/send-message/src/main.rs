//! Answers `chat.send.{u}.{room}` and `dm.send.{u}.{peer}`: checks a message, appends it to the log together with
//! whatever else is waiting, and answers when the log has it.

use timeline::chat::Chat;
use timeline::settings::ChatSettings;

mod append;
mod commit;
mod index;
mod known;
mod outgoing;
mod rate;
mod secret;
mod sequencer;

mod settings;

#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use base::error::Code;
use base::error::{Error, Result};
use base::span::SpanGuard;
use commit::Committer;
use nats::trace::inject_trace;
use outgoing::Outgoing;
use protocol::endpoints::{DM_SEND, SEND};
use protocol::name::{Room, User};
use protocol::send::{Draft, SendAck, SendRequest, SentStatus};
use protocol::subject::{StreamSubject, direct_subject};
use rate::Rate;
use service::ctx::Ctx;
use service::function::Function;
use service::request::{Reply, Request};
use service::this;
use settings::Settings;
use tracing::Instrument;

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
    Function::with(this!(protocol::PROJECT), async |ctx: Ctx| {
        let settings: Settings = ctx.read_settings()?;
        let chat = Chat::open(&ctx)?;
        let chat_ctx = ctx.with_state(chat.clone());
        let rate = Rate::new(settings.send_rate_per_second, settings.send_burst);
        Ok(Shared {
            chat,
            rate,
            committer: Committer::start(chat_ctx, settings.send_min_batch.max(2)),
        })
    })
    .settings::<ChatSettings>()
    .settings::<Settings>()
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
