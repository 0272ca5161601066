//! Which message is meant, as far as it is stored.

use std::time::Duration;

use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::types::time::OffsetDateTime;

use crate::found::{Found, State};
use base::seq::Seq;
use postgres::database::Database;
use postgres::error::DatabaseError;
use protocol::delete::{DeleteRequest, MessageKey};
use protocol::message::Message;

/// A key is looked up in a millisecond; a database that takes this long is away.
const DEADLINE: Duration = Duration::from_millis(1_500);

const BY_SEQ: &str = "
    select seq, rooms.name as room, sender, recipient, messages.id, derived, sent_at, received_at, deleted,
           exists (select from changes
                    where target = messages.seq and (changes.sender, changes.id, mode) = (messages.sender, messages.id, 'hard')) as erased
      from messages join rooms on rooms.id = room_id
     where seq = $1 and rooms.name = $2";

/// The asker's own.
const BY_ID: &str = "
    select seq, rooms.name as room, sender, recipient, messages.id, derived, sent_at, received_at, deleted,
           exists (select from changes
                    where target = messages.seq and (changes.sender, changes.id, mode) = (messages.sender, messages.id, 'hard')) as erased
      from messages join rooms on rooms.id = room_id
     where (sender, messages.id, derived) = ($1, $2, false)";

/// Anybody's, for moderators. There is no index for it, for it would cost every message something: the room is searched
/// from its end.
const ANYBODYS: &str = "
    select sender from messages
     where room_id = (select id from rooms where name = $1) and id = $2 and not derived
     order by seq desc limit 2";

/// What the index has.
#[derive(Debug)]
pub enum Rows {
    /// Nothing.
    None,
    /// The message.
    One(Box<Found>),
    /// Messages of several people, all with the id a moderator gave.
    Several,
}

/// Looks the message up; `None` while PostgreSQL is away.
///
/// # Errors
/// The deployment's fault, such as a missing table.
pub async fn find(
    database: &Database,
    ask: &DeleteRequest,
    moderates: bool,
) -> Result<Option<Rows>, DatabaseError> {
    database
        .run_if_there(DEADLINE, async |connection| {
            look(connection, ask, moderates).await
        })
        .await
}

async fn look(
    connection: &mut PgConnection,
    ask: &DeleteRequest,
    moderates: bool,
) -> Result<Rows, sqlx::Error> {
    let room = ask.conversation.name();
    let one = |row: Option<PgRow>| match row {
        Some(row) => Ok(Rows::One(Box::new(found(&row)?))),
        None => Ok(Rows::None),
    };
    let id = match &ask.key {
        MessageKey::Seq(seq) => {
            return one(sqlx::query(BY_SEQ)
                .bind(seq.as_i64())
                .bind(&room)
                .fetch_optional(connection)
                .await?);
        }
        MessageKey::Id(id) => id,
    };
    let own = sqlx::query(BY_ID)
        .bind(ask.user.as_str())
        .bind(id)
        .fetch_optional(&mut *connection)
        .await?;
    if let Some(own) = own
        .as_ref()
        .map(found)
        .transpose()?
        .filter(|own| own.message.room == room)
    {
        return Ok(Rows::One(Box::new(own)));
    }
    if let Some(seq) = id
        .strip_prefix("seq:")
        .and_then(|seq| seq.parse::<i64>().ok())
    {
        let at = sqlx::query(BY_SEQ)
            .bind(seq)
            .bind(&room)
            .fetch_optional(&mut *connection)
            .await?;
        if let Some(at) = at
            .as_ref()
            .map(found)
            .transpose()?
            .filter(|at| at.derived && at.message.id == *id)
        {
            return Ok(Rows::One(Box::new(at)));
        }
    }
    if !moderates {
        return Ok(Rows::None);
    }
    let senders: Vec<String> = sqlx::query_scalar(ANYBODYS)
        .bind(&room)
        .bind(id)
        .fetch_all(&mut *connection)
        .await?;
    match &senders[..] {
        [] => Ok(Rows::None),
        [sender] => one(sqlx::query(BY_ID)
            .bind(sender)
            .bind(id)
            .fetch_optional(connection)
            .await?),
        _ => Ok(Rows::Several),
    }
}

/// The stored message with the same sender and id as `found`, which was read from the log; `None` where there is none, and while
/// PostgreSQL is away.
///
/// # Errors
/// The deployment's fault, such as a missing table.
pub async fn first_of(database: &Database, found: &Found) -> Result<Option<Found>, DatabaseError> {
    if found.derived {
        return Ok(None);
    }
    let (sender, id) = (&found.message.user, &found.message.id);
    let row = database.run_if_there(DEADLINE, async |connection| {
        let row = sqlx::query(BY_ID)
            .bind(sender)
            .bind(id)
            .fetch_optional(connection)
            .await?;
        row.as_ref().map(self::found).transpose()
    });
    Ok(row.await?.flatten())
}

fn found(row: &PgRow) -> Result<Found, sqlx::Error> {
    let unix_ms = |at: OffsetDateTime| {
        i64::try_from(at.unix_timestamp_nanos() / 1_000_000).unwrap_or_default()
    };
    let deleted = row.try_get("deleted")?;
    let state = match (deleted, row.try_get("erased")?) {
        (_, true) => State::Hard,
        (true, false) => State::Soft,
        (false, false) => State::There,
    };
    let message = Message {
        id: row.try_get("id")?,
        seq: Seq::from_i64(row.try_get("seq")?),
        room: row.try_get("room")?,
        user: row.try_get("sender")?,
        text: String::new(),
        timestamp: unix_ms(row.try_get("sent_at")?),
        to: row.try_get("recipient")?,
        status: None,
        delivered_at: None,
        read_at: None,
        deleted,
    };
    Ok(Found {
        message,
        derived: row.try_get("derived")?,
        received_ms: unix_ms(row.try_get("received_at")?),
        state,
    })
}
