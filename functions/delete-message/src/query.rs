//! Finds the message that a request means, as far as it is stored.

use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgRow};

use crate::target::{DeletionState, Target};
use base::time::unix_ms;
use postgres::database::Database;
use postgres::error::DatabaseError;
use postgres::span::query_span;
use protocol::delete::{DeleteRequest, MessageKey};
use timeline::query::{DEADLINE, message};

/// The message at sequence `$1` of room `$2`.
const BY_SEQ: &str = concat!(
    include_str!("target.sql"),
    " where seq = $1 and rooms.name = $2"
);

/// The message of sender `$1` with the client-supplied id `$2`, in any room.
const BY_ID: &str = concat!(
    include_str!("target.sql"),
    " where (sender, messages.id, derived) = ($1, $2, false)"
);

/// Whose messages in room `$1` have the id `$2`, for moderators. There is no index for it, because
/// it would make every insert dearer: the room is searched from its end.
const SENDERS: &str = "
    select sender from messages
     where room_id = (select id from rooms where name = $1) and id = $2 and not derived
     order by seq desc limit 2";

/// What the projection has.
#[derive(Debug)]
pub enum Lookup {
    /// Nothing.
    None,
    /// The message.
    One(Box<Target>),
    /// Messages of several users, all with the id that a moderator supplied.
    Several,
}

impl Lookup {
    fn of(row: Option<PgRow>) -> Result<Lookup, sqlx::Error> {
        match row {
            Some(row) => Ok(Lookup::One(Box::new(target(&row)?))),
            None => Ok(Lookup::None),
        }
    }
}

/// Looks the message up; `None` while PostgreSQL is away.
///
/// # Errors
/// The deployment's fault, such as a missing table.
pub async fn find(
    database: &Database,
    request: &DeleteRequest,
    is_moderator: bool,
) -> Result<Option<Lookup>, DatabaseError> {
    let query = async |connection: &mut PgConnection| {
        let lookup = look_up(connection, request, is_moderator);
        query_span("select", "messages", lookup).await
    };
    database.run_if_there(DEADLINE, query).await
}

async fn look_up(
    connection: &mut PgConnection,
    request: &DeleteRequest,
    is_moderator: bool,
) -> Result<Lookup, sqlx::Error> {
    let room = request.conversation.name();
    let id = match &request.key {
        MessageKey::Seq(seq) => {
            return Lookup::of(by_seq(connection, seq.as_i64(), &room).await?);
        }
        MessageKey::Id(id) => id,
    };
    // The requesting user's own message comes first.
    if let Some(row) = by_id(connection, request.user.as_str(), id).await? {
        let own = target(&row)?;
        if own.message.room == room {
            return Ok(Lookup::One(Box::new(own)));
        }
    }
    let derived_from = id
        .strip_prefix("seq:")
        .and_then(|seq| seq.parse::<i64>().ok());
    if let Some(seq) = derived_from
        && let Some(row) = by_seq(connection, seq, &room).await?
    {
        let target = target(&row)?;
        if target.derived && target.message.id == *id {
            return Ok(Lookup::One(Box::new(target)));
        }
    }
    if !is_moderator {
        return Ok(Lookup::None);
    }
    let senders: Vec<String> = sqlx::query_scalar(SENDERS)
        .bind(&room)
        .bind(id)
        .fetch_all(&mut *connection)
        .await?;
    match &senders[..] {
        [] => Ok(Lookup::None),
        [sender] => Lookup::of(by_id(connection, sender, id).await?),
        _ => Ok(Lookup::Several),
    }
}

/// The stored message with the same sender and id as `duplicate`, which was read from the stream;
/// `None` where there is none, and while PostgreSQL is away.
///
/// # Errors
/// The deployment's fault, such as a missing table.
pub async fn find_first(
    database: &Database,
    duplicate: &Target,
) -> Result<Option<Target>, DatabaseError> {
    if duplicate.derived {
        return Ok(None);
    }
    let sender = &duplicate.message.user;
    let id = &duplicate.message.id;
    let query = async |connection: &mut PgConnection| {
        let row = query_span("select", "messages", by_id(connection, sender, id)).await?;
        row.as_ref().map(target).transpose()
    };
    Ok(database.run_if_there(DEADLINE, query).await?.flatten())
}

async fn by_seq(
    connection: &mut PgConnection,
    seq: i64,
    room: &str,
) -> Result<Option<PgRow>, sqlx::Error> {
    sqlx::query(BY_SEQ)
        .bind(seq)
        .bind(room)
        .fetch_optional(connection)
        .await
}

async fn by_id(
    connection: &mut PgConnection,
    sender: &str,
    id: &str,
) -> Result<Option<PgRow>, sqlx::Error> {
    sqlx::query(BY_ID)
        .bind(sender)
        .bind(id)
        .fetch_optional(connection)
        .await
}

fn target(row: &PgRow) -> Result<Target, sqlx::Error> {
    let message = message(row, row.try_get("room")?)?;
    let is_erased = row.try_get("erased")?;
    let state = match (message.deleted, is_erased) {
        (_, true) => DeletionState::Hard,
        (true, false) => DeletionState::Soft,
        (false, false) => DeletionState::Present,
    };
    Ok(Target {
        message,
        derived: row.try_get("derived")?,
        received_ms: unix_ms(row.try_get("received_at")?),
        state,
    })
}
