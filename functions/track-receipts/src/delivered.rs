//! The delivered cursor: one for each user, over all direct messages.

use std::collections::HashMap;

use sqlx::postgres::PgConnection;

use crate::store::with_user_lock;
use base::error::Result;
use base::seq::Seq;
use jetstream::stream::Limit;
use protocol::name::User;
use protocol::receipt::ReceiptAck;
use protocol::subject::direct_subjects_to;
use service::ctx::Ctx;
use timeline::chat::Chat;
use timeline::cursors::delivered;
use timeline::tail::Tail;

/// So many messages are read to find out whose senders get a receipt.
const MESSAGES: usize = 10_000;
/// Of those in the stream, so many bytes.
const TAIL_BYTES: usize = 16 << 20;
/// A move of the cursor sends a receipt to so many conversations, those with the newest messages.
const CONVERSATIONS: usize = 1_000;

/// The conversations that have a message to `$1` after `$2` and up to `$3`, and where the last one
/// stands; at most `$4` messages are read. Bounds of pairs, so that only the recipient's index has
/// the order; and a subquery for the names, because a join would read all rooms.
pub const PASSED: &str = "
    select (select name from rooms where rooms.id = passed.room_id), max(passed.seq)
      from (select room_id, seq from messages
             where recipient is not null
               and (recipient, seq) > ($1, $2) and (recipient, seq) <= ($1, $3)
             order by recipient desc, seq desc limit $4) passed
     group by passed.room_id";

/// Moves the cursor to `$2`, adds that to the receipt history and puts a receipt for each of the
/// rooms `$3` into the outbox.
const ADVANCE: &str = include_str!("delivered_advance.sql");

/// Moves the cursor of `user` to `through`, unless it stands there or beyond.
///
/// # Errors
/// 503 when the stream or PostgreSQL does not answer.
pub async fn advance(ctx: &Ctx<Chat>, user: &User, through: Seq) -> Result<ReceiptAck> {
    let unstored = load_unstored(ctx, user, through).await?;
    with_user_lock(ctx.database(), user.as_str(), async |connection| {
        advance_to(connection, user.as_str(), through, unstored).await
    })
    .await
}

/// The conversations with messages to `user` that may not be stored yet, and where the last one
/// stands.
async fn load_unstored(ctx: &Ctx<Chat>, user: &User, through: Seq) -> Result<HashMap<String, Seq>> {
    let stored_through = ctx.stream().stored_through().await?;
    if through <= stored_through {
        return Ok(HashMap::new());
    }
    let limit = Limit::within(MESSAGES, TAIL_BYTES, ctx.settings().request_deadline());
    let tail = Tail::newest(
        ctx.stream(),
        &[direct_subjects_to(user)],
        stored_through.next(),
        through.next(),
        limit,
        ctx.limits(),
    )
    .await?;
    Ok(tail
        .messages
        .into_iter()
        .map(|message| (message.room, message.seq))
        .collect())
}

async fn advance_to(
    connection: &mut PgConnection,
    user: &str,
    through: Seq,
    unstored: HashMap<String, Seq>,
) -> Result<ReceiptAck, sqlx::Error> {
    let current = delivered(connection, user).await?;
    if through <= current {
        return Ok(ReceiptAck {
            through: current,
            moved: false,
        });
    }
    let stored: Vec<(String, i64)> = sqlx::query_as(PASSED)
        .bind(user)
        .bind(current.as_i64())
        .bind(through.as_i64())
        .bind(MESSAGES as i64)
        .fetch_all(&mut *connection)
        .await?;
    let mut last = unstored;
    last.retain(|_, seq| *seq > current);
    for (room, seq) in stored {
        let known = last.entry(room).or_default();
        *known = Seq::from_i64(seq).max(*known);
    }
    sqlx::query(ADVANCE)
        .bind(user)
        .bind(through.as_i64())
        .bind(newest_rooms(last))
        .execute(connection)
        .await?;
    Ok(ReceiptAck {
        through,
        moved: true,
    })
}

fn newest_rooms(last: HashMap<String, Seq>) -> Vec<String> {
    let mut rooms: Vec<(Seq, String)> = last.into_iter().map(|(room, seq)| (seq, room)).collect();
    rooms.sort_unstable_by(|one, other| other.cmp(one));
    rooms.truncate(CONVERSATIONS);
    rooms.into_iter().map(|(_, room)| room).collect()
}
