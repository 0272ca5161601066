//! Checks a request to send, has the message appended, and replies.

use std::time::{Instant, SystemTime};

use tracing::{Instrument, Span};

use crate::Shared;
use crate::outgoing::Outgoing;
use base::error::{Code, Error, Result};
use base::span::SpanGuard;
use base::time::system_time_ms;
use nats::span::send_span;
use nats::trace::inject_trace;
use protocol::name::{Room, User};
use protocol::send::{Draft, SendAck, SendRequest, SentStatus};
use protocol::subject::{StreamSubject, direct_subject, subject_template};
use service::ctx::Ctx;
use service::request::{Reply, Request};

/// The part of a request's time in which the stream has to acknowledge: if it does not, our own
/// reply says what is wrong, before the framework's deadline ends the request.
const COMMIT_SHARE: f64 = 0.8;

/// `chat.send.{u}.{room}`
pub async fn send_to_room(
    ctx: Ctx<Shared>,
    request: Request<SendRequest<Room>>,
) -> Result<Reply<SendAck>> {
    let SendRequest { user, to, draft } = request.body;
    // Parsing the request refused the admin room, so the name after the subject's last dot is never
    // needed.
    send(ctx, user, to.stream_subject(), draft).await
}

/// `dm.send.{u}.{peer}`
pub async fn send_to_user(
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
    if let Err(wait) = ctx.rate_limit.take(user.as_str(), Instant::now()) {
        return Err(Error::new(Code::TooFast, ctx.rate_limit.message(wait)));
    }
    let limit = ctx.chat.limits().text_bytes;
    if draft.text.len() > limit {
        let reason = format!("text is longer than {limit} bytes");
        return Err(Error::new(Code::TooLarge, reason));
    }
    let room = StreamSubject::parse(&subject)
        .map_err(Error::internal)?
        .room();
    let span = send_span(&Span::current(), &subject, subject_template(&subject));
    let now_ms = system_time_ms(SystemTime::now());
    let mut message = Outgoing::new(user, subject, room, draft, now_ms);
    inject_trace(&span, &mut message.headers);
    if message.max_wire_size() > ctx.nats().client().server_info().max_payload {
        return Err(Error::new(
            Code::TooLarge,
            "this message is larger than the server's max_payload",
        ));
    }
    let message_id = message.id.clone();
    let guard = SpanGuard::new(&span);
    let until =
        tokio::time::Instant::now() + ctx.settings().request_deadline().mul_f64(COMMIT_SHARE);
    let sent = ctx
        .committer
        .commit(message, until)
        .instrument(span.clone())
        .await;
    match &sent {
        Ok(sent) => {
            span.record("messaging.message.id", sent.seq.get());
            guard.done();
        }
        // The client's mistake, not a failure.
        Err(error) if error.code == Code::Conflict => guard.done(),
        Err(error) => guard.failed(error.code.number().to_string()),
    }
    let sent = sent?;
    Reply::json(&SendAck {
        message_id,
        seq: sent.seq,
        status: SentStatus::Sent,
        duplicate: sent.duplicate,
    })
}
