//! The read cursor: one for each user and conversation.

use sqlx::postgres::PgConnection;

use crate::store::with_user_lock;
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::stream::Limit;
use protocol::receipt::{ReadRequest, ReceiptAck};
use service::ctx::Ctx;
use timeline::chat::Chat;

/// Where the cursor of user `$1` in room `$2` stands, and whether the room has a stored message.
const CURRENT: &str = "
    select coalesce((select read from receipts where (reader, room) = ($1, $2)), 0),
           exists (select from rooms where name = $2)";

/// Moves the cursor to `$3`, adds that to the receipt history and puts the receipt into the outbox.
const ADVANCE: &str = include_str!("read_advance.sql");

/// Moves the cursor to `through`, unless it stands there or beyond.
///
/// # Errors
/// 404 where nobody has written yet, so that nobody fills the table with names of rooms;
/// 503 when the stream or PostgreSQL does not answer.
pub async fn advance(ctx: &Ctx<Chat>, request: &ReadRequest, through: Seq) -> Result<ReceiptAck> {
    let user = request.user.as_str();
    let room = request.conversation.name();
    let attempt = async |is_known: bool| {
        with_user_lock(ctx.database(), user, async |connection| {
            advance_to(connection, user, &room, through, is_known).await
        })
        .await
    };
    if let Some(ack) = attempt(false).await? {
        return Ok(ack);
    }
    if !is_in_stream(ctx, request).await? {
        return Err(Error::new(
            Code::NotFound,
            "nobody has written anything here yet",
        ));
    }
    attempt(true)
        .await?
        .ok_or_else(|| Error::internal("the conversation is in the stream, so its cursor moves"))
}

/// Whether the stream holds a message of the conversation. Called only when no message of it is
/// stored.
async fn is_in_stream(ctx: &Ctx<Chat>, request: &ReadRequest) -> Result<bool> {
    let one = Limit::within(1, 1, ctx.settings().request_deadline());
    for subject in request.conversation.stream_subjects() {
        let window = ctx.stream().first(&subject, Seq::ZERO.next(), one).await?;
        if !window.messages.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `None` for a conversation without a stored message, unless the caller knows that it exists.
async fn advance_to(
    connection: &mut PgConnection,
    user: &str,
    room: &str,
    through: Seq,
    is_known: bool,
) -> Result<Option<ReceiptAck>, sqlx::Error> {
    let (current, is_stored): (i64, bool) = sqlx::query_as(CURRENT)
        .bind(user)
        .bind(room)
        .fetch_one(&mut *connection)
        .await?;
    if !is_stored && !is_known {
        return Ok(None);
    }
    let current = Seq::from_i64(current);
    if through <= current {
        return Ok(Some(ReceiptAck {
            through: current,
            moved: false,
        }));
    }
    sqlx::query(ADVANCE)
        .bind(user)
        .bind(room)
        .bind(through.as_i64())
        .execute(connection)
        .await?;
    Ok(Some(ReceiptAck {
        through,
        moved: true,
    }))
}
