//! The two endpoints: find the message, check who asks, append the deletion, erase the text.

use crate::target::{DeletionState, Target};
use crate::{Shared, find};
use base::error::{Code, Error, Result};
use jetstream::stream::StreamMessage;
use protocol::change::{ChangeType, Deletion, Mode};
use protocol::conversation::{Conversation, Direct};
use protocol::delete::{DeleteRequest, Deleted, DeletedStatus};
use service::ctx::Ctx;
use service::request::{Reply, Request};
use timeline::deletion::append_deletion;
use timeline::message::parse_of_any_length;

pub async fn delete_in_room(
    ctx: Ctx<Shared>,
    request: Request<DeleteRequest>,
) -> Result<Reply<Deleted>> {
    delete(ctx, request.body).await
}

pub async fn delete_direct(
    ctx: Ctx<Shared>,
    request: Request<Direct<DeleteRequest>>,
) -> Result<Reply<Deleted>> {
    let Direct(body) = request.body;
    delete(ctx, body).await
}

async fn delete(ctx: Ctx<Shared>, request: DeleteRequest) -> Result<Reply<Deleted>> {
    let is_moderator = matches!(request.conversation, Conversation::Room(_))
        && ctx.moderators.contains(request.user.as_str());
    let target = find::find(&ctx, &request, is_moderator).await?;
    if target.message.user != request.user.as_str() && !is_moderator {
        return Err(Error::new(
            Code::Forbidden,
            "only its sender, or in a room a moderator, may delete a message",
        ));
    }
    // A message that is deleted in this mode already needs no second deletion.
    if target.state < DeletionState::of(request.mode) {
        let deletion = deletion(&request, &target);
        let room = request.conversation.name();
        let limit = ctx.settings().request_deadline() / 2;
        append_deletion(ctx.nats(), &room, &deletion, limit).await?;
    }
    if request.mode == Mode::Hard {
        erase(&ctx, &target).await?;
    }
    Reply::json(&Deleted {
        seq: target.message.seq,
        status: DeletedStatus::Deleted,
    })
}

fn deletion(request: &DeleteRequest, target: &Target) -> Deletion {
    let message = &target.message;
    Deletion {
        kind: ChangeType::Delete,
        target: message.seq,
        id: message.id.clone(),
        user: message.user.clone(),
        to: message.to.clone(),
        derived: target.derived,
        timestamp: message.timestamp,
        received: target.received_ms,
        mode: request.mode,
        by: request.user.as_str().to_owned(),
    }
}

/// Erases the text from the stream at once. If that fails, or if duplicates stand elsewhere in the
/// stream, `persist-message` erases them when it stores the deletion.
async fn erase(ctx: &Ctx<Shared>, target: &Target) -> Result<()> {
    let is_target = |stored: &StreamMessage| {
        parse_of_any_length(stored).is_ok_and(|stored| {
            stored.user == target.message.user
                && stored.shown_id() == target.message.id
                && stored.id.is_none() == target.derived
        })
    };
    let erased = ctx.chat.stream().erase(target.message.seq, is_target).await;
    erased.map(|_| ()).map_err(|error| {
        Error::new(
            Code::Unavailable,
            "the message is deleted, and its text will leave the stream as soon as the stream \
             answers; ask again to find out",
        )
        .with_detail(error)
    })
}
