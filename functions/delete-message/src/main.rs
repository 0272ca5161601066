//! Answers `chat.delete.{u}.{room}` and `dm.delete.{u}.{peer}`: finds the message, checks who asks, appends the deletion to the log,
//! and answers when the log has it. `persist-message` does the rest, whenever it can.

use protocol::subject::STREAM;
use timeline::chat::Chat;
use timeline::message::parse_of_any_length;
use timeline::settings::ChatSettings;

mod find;
mod found;
mod index;

mod settings;

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::process::ExitCode;

use async_nats::HeaderMap;
use base::error::Code;
use base::error::{Error, Fatal, Result};
use base::span::SpanGuard;
use found::{Found, State};
use jetstream::append::append;
use nats::trace::inject_trace;
use protocol::change::{ChangeType, Deletion, Mode};
use protocol::conversation::{Conversation, Direct};
use protocol::delete::{DeleteRequest, Deleted, DeletedStatus};
use protocol::endpoints::{DELETE, DM_DELETE};
use protocol::header;
use protocol::name::User;
use service::ctx::Ctx;
use service::function::Function;
use service::request::{Reply, Request};
use service::this;
use settings::Settings;
use tracing::Instrument;

/// What requests share.
struct Shared {
    chat: Chat,
    moderators: HashSet<String>,
}

fn main() -> ExitCode {
    function().run()
}

fn function() -> Function<Shared> {
    Function::with(this!(), async |ctx: Ctx| {
        let settings: Settings = ctx.read_settings()?;
        let names = settings
            .delete_moderators
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty());
        let moderators = names
            .map(moderator)
            .collect::<Result<HashSet<String>, Fatal>>()?;
        Ok(Shared {
            chat: Chat::open(&ctx)?,
            moderators,
        })
    })
    .settings::<ChatSettings>()
    .settings::<Settings>()
    .answer(DELETE, delete_in_room)
    .answer(DM_DELETE, delete_direct)
}

fn moderator(name: &str) -> Result<String, Fatal> {
    let wrong = |_| {
        Fatal::new(format!(
            "configuration: DELETE_MODERATORS names {name:?}, and a user is 1 to 64 of A-Z a-z 0-9 _ -"
        ))
    };
    User::parse(name)
        .map(|user| user.as_str().to_owned())
        .map_err(wrong)
}

async fn delete_in_room(
    ctx: Ctx<Shared>,
    request: Request<DeleteRequest>,
) -> Result<Reply<Deleted>> {
    delete(ctx, request.body).await
}

async fn delete_direct(
    ctx: Ctx<Shared>,
    request: Request<Direct<DeleteRequest>>,
) -> Result<Reply<Deleted>> {
    let Direct(ask) = request.body;
    delete(ctx, ask).await
}

async fn delete(ctx: Ctx<Shared>, ask: DeleteRequest) -> Result<Reply<Deleted>> {
    let moderates = matches!(ask.conversation, Conversation::Room(_))
        && ctx.moderators.contains(ask.user.as_str());
    let found = find::find(&ctx, &ask, moderates).await?;
    if found.message.user != ask.user.as_str() && !moderates {
        return Err(Error::new(
            Code::Forbidden,
            "only its sender, or in a room a moderator, may delete a message",
        ));
    }
    // A delete of a delete: what was asked for is so already.
    if found.state < State::of(ask.mode) {
        append_deletion(&ctx, &ask, &found).await?;
    }
    if ask.mode == Mode::Hard {
        erase(&ctx, &found).await?;
    }
    Reply::json(&Deleted {
        seq: found.message.seq,
        status: DeletedStatus::Deleted,
    })
}

async fn append_deletion(ctx: &Ctx<Shared>, ask: &DeleteRequest, found: &Found) -> Result<()> {
    let message = &found.message;
    let deletion = Deletion {
        kind: ChangeType::Delete,
        target: message.seq,
        id: message.id.clone(),
        user: message.user.clone(),
        to: message.to.clone(),
        derived: found.derived,
        timestamp: message.timestamp,
        received: found.received_ms,
        mode: ask.mode,
        by: ask.user.as_str().to_owned(),
    };
    let subject = ask.conversation.change_subject();
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
    );
    let mut headers = HeaderMap::new();
    // Asked again, it is appended once. send-message's ids begin with a user and a colon, so nobody can take this one.
    headers.insert(
        header::MESSAGE_ID,
        format!(
            "/delete/{}/{}/{}",
            message.seq,
            found.received_ms,
            ask.mode.as_str()
        )
        .as_str(),
    );
    inject_trace(&span, &mut headers);
    let payload = serde_json::to_vec(&deletion).map_err(Error::internal)?;
    let limit = ctx.settings().request_deadline() / 2;
    let failing = SpanGuard::new(&span);
    let appended = append(ctx.nats(), STREAM, &subject, headers, payload.into(), limit)
        .instrument(span)
        .await;
    match &appended {
        Ok(_) => failing.done(),
        Err(_) => failing.failed("append"),
    }
    appended?;
    Ok(())
}

/// Takes the text out of the log at once. Should it fail, or other copies stand elsewhere in the log: `persist-message` does
/// the same for the deletion it finds there.
async fn erase(ctx: &Ctx<Shared>, found: &Found) -> Result<()> {
    // Whatever the limits are today: a text that was once too long is a text.
    let is = |stored: &jetstream::stream::StreamMessage| {
        parse_of_any_length(stored).is_ok_and(|read| {
            read.user == found.message.user
                && read.shown_id() == found.message.id
                && read.id.is_none() == found.derived
        })
    };
    ctx.chat.stream().erase(found.message.seq, is).await.map(|_| ()).map_err(|error| {
        let reason = "the message is deleted, and its text will leave the log as soon as the log answers; ask again to be told";
        Error::new(Code::Unavailable, reason).with_detail(error)
    })
}
