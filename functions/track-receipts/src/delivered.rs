//! The mark "delivered": one a user, over all conversations.

use std::collections::HashMap;

use sqlx::postgres::PgConnection;

use crate::mark::alone;
use base::error::Result;
use base::seq::Seq;
use jetstream::stream::Limit;
use protocol::name::User;
use protocol::receipt::ReceiptAck;
use protocol::subject::direct_subjects_to;
use service::ctx::Ctx;
use timeline::chat::Chat;
use timeline::tail::Tail;

/// Messages that are looked at for whose senders are told.
const MESSAGES: usize = 10_000;
/// Of those in the log, so many bytes.
const TAIL_BYTES: usize = 16 << 20;
/// Conversations that are told of one move, those with the newest messages.
const CONVERSATIONS: usize = 1_000;

const STANDING: &str = "select delivered from users where name = $1";

/// Conversations that had something in what was moved over. Bounds of pairs, so that no index is taken but the recipient's; and a
/// subquery for the names, since a join would read every room there is.
pub const CONCERNED: &str = "
    select (select name from rooms where rooms.id = moved.room_id), max(moved.seq)
      from (select room_id, seq from messages
             where recipient is not null and (recipient, seq) > ($1, $2) and (recipient, seq) <= ($1, $3)
             order by recipient desc, seq desc limit $4) moved
     group by moved.room_id";

const MOVE: &str = "
    with moved as (
        update users set delivered = $2 where name = $1
    ), noted as (
        insert into receipt_moves (reader, room, kind, through, at) values ($1, null, 'delivered', $2, clock_timestamp())
        on conflict do nothing
    )
    insert into outbox (first_seq, last_seq, seqs, receipts)
    select $2, $2, '{}', jsonb_agg(jsonb_build_object('kind', 'delivered', 'user', $1, 'room', room, 'through', $2))
      from unnest($3::text[]) as room having count(*) > 0";

/// Moves the mark of `user` to `through`, unless it is there already.
///
/// # Errors
/// 503 when the log or PostgreSQL does not answer.
pub async fn mark(ctx: &Ctx<Chat>, user: &User, through: Seq) -> Result<ReceiptAck> {
    let in_log = not_stored(ctx, user, through).await?;
    alone(ctx.database(), user.as_str(), async |connection| {
        move_to(connection, user.as_str(), through, in_log).await
    })
    .await
}

/// Conversations with messages to `user` that are perhaps not stored yet, and where the last of them stands.
async fn not_stored(ctx: &Ctx<Chat>, user: &User, through: Seq) -> Result<HashMap<String, Seq>> {
    let floor = ctx.stream().stored_through().await?;
    if through <= floor {
        return Ok(HashMap::new());
    }
    let subjects = [direct_subjects_to(user)];
    let limit = Limit::within(MESSAGES, TAIL_BYTES, ctx.settings().request_deadline());
    let tail = Tail::newest(
        ctx.stream(),
        &subjects,
        floor.next(),
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

async fn move_to(
    connection: &mut PgConnection,
    user: &str,
    through: Seq,
    in_log: HashMap<String, Seq>,
) -> Result<ReceiptAck, sqlx::Error> {
    let before: i64 = sqlx::query_scalar(STANDING)
        .bind(user)
        .fetch_one(&mut *connection)
        .await?;
    let before = Seq::from_i64(before);
    if through <= before {
        return Ok(ReceiptAck {
            through: before,
            moved: false,
        });
    }
    let stored: Vec<(String, i64)> = sqlx::query_as(CONCERNED)
        .bind(user)
        .bind(before.as_i64())
        .bind(through.as_i64())
        .bind(MESSAGES as i64)
        .fetch_all(&mut *connection)
        .await?;
    let mut newest = in_log;
    newest.retain(|_, seq| *seq > before);
    for (room, seq) in stored {
        let held = newest.entry(room).or_default();
        *held = Seq::from_i64(seq).max(*held);
    }
    let mut rooms: Vec<(Seq, String)> = newest.into_iter().map(|(room, seq)| (seq, room)).collect();
    rooms.sort_unstable_by(|one, other| other.cmp(one));
    rooms.truncate(CONVERSATIONS);
    let rooms: Vec<String> = rooms.into_iter().map(|(_, room)| room).collect();
    sqlx::query(MOVE)
        .bind(user)
        .bind(through.as_i64())
        .bind(rooms)
        .execute(connection)
        .await?;
    Ok(ReceiptAck {
        through,
        moved: true,
    })
}
