//! The mark "read": one a user and conversation.

use sqlx::postgres::PgConnection;

use crate::mark::alone;
use base::error::{Code, Error, Result};
use base::seq::Seq;
use jetstream::stream::Limit;
use protocol::receipt::{ReadRequest, ReceiptAck};
use service::ctx::Ctx;
use timeline::chat::Chat;

const STANDING: &str = "
    select coalesce((select read from receipts where (reader, room) = ($1, $2)), 0), exists (select from rooms where name = $2)";

const MOVE: &str = "
    with moved as (
        insert into receipts (reader, room, read) values ($1, $2, $3)
        on conflict (reader, room) do update set read = excluded.read
    ), noted as (
        insert into receipt_moves (reader, room, kind, through, at) values ($1, $2, 'read', $3, clock_timestamp())
        on conflict do nothing
    )
    insert into outbox (first_seq, last_seq, seqs, receipts)
    values ($3, $3, '{}', jsonb_build_array(jsonb_build_object('kind', 'read', 'user', $1, 'room', $2, 'through', $3)))";

/// Moves the mark to `through`, unless it is there already.
///
/// # Errors
/// 404 where nobody has written yet, so that nobody fills the table with names; 503 when the log or PostgreSQL does not answer.
pub async fn mark(ctx: &Ctx<Chat>, ask: &ReadRequest, through: Seq) -> Result<ReceiptAck> {
    let (user, room) = (ask.user.as_str(), ask.conversation.name());
    let attempt = async |known: bool| {
        alone(ctx.database(), user, async |connection| {
            move_to(connection, user, &room, through, known).await
        })
        .await
    };
    if let Some(marked) = attempt(false).await? {
        return Ok(marked);
    }
    if !written(ctx, ask).await? {
        return Err(Error::new(
            Code::NotFound,
            "nobody has written anything here yet",
        ));
    }
    attempt(true)
        .await?
        .ok_or_else(|| Error::internal("a conversation that is known is not"))
}

/// Whether the log holds a message of the conversation. Asked only when the index knows of none.
async fn written(ctx: &Ctx<Chat>, ask: &ReadRequest) -> Result<bool> {
    let limit = Limit::within(1, 1, ctx.settings().request_deadline());
    for subject in ask.conversation.stream_subjects() {
        if !ctx
            .stream()
            .first(&subject, Seq::ZERO.next(), limit)
            .await?
            .messages
            .is_empty()
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `None` for a conversation the index does not know, unless it is `known` otherwise.
async fn move_to(
    connection: &mut PgConnection,
    user: &str,
    room: &str,
    through: Seq,
    known: bool,
) -> Result<Option<ReceiptAck>, sqlx::Error> {
    let (before, stored): (i64, bool) = sqlx::query_as(STANDING)
        .bind(user)
        .bind(room)
        .fetch_one(&mut *connection)
        .await?;
    let before = Seq::from_i64(before);
    if !stored && !known {
        return Ok(None);
    }
    if through <= before {
        return Ok(Some(ReceiptAck {
            through: before,
            moved: false,
        }));
    }
    sqlx::query(MOVE)
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
