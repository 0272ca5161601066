//! Sweeping the moves of marks that nobody can ask about any more.
//!
//! A message was delivered, or read, when the mark first reached it. So a move may go when nothing it reached is left: it was made
//! before what its conversations keep began, so that all of it has expired, stored or not; and nothing at or below it is stored.
//! What lies above it has a later move. The marks themselves stay.

use sqlx::postgres::PgConnection;

use crate::alone::refused;
use base::error::Result;

/// Moves deleted in one transaction; and looked at, of one mark.
const STEP: i64 = 5_000;
/// Marks looked at in one transaction.
const MARKS: i64 = 500;

/// From one mark to the next, in the order of their keys, and of each the moves from the lowest on: the key of both tables has them
/// in this order. With time they only go up, so the first that is too young ends it. Nothing else than this deletes
/// moves, and nothing updates them: a row stays where it is. The inner limit keeps PostgreSQL from asking for the cutoff at each row.
const READ: &str = "
    with walked as materialized (
        select reader, room from receipts where (reader, room) > ($1, $2) order by reader, room limit $4
    ), marks as (
        select walked.reader, walked.room, coalesce(first.seq, 9223372036854775807) as first
          from walked
          left join rooms on rooms.name = walked.room
          left join lateral (select seq from messages
                              where (room_id, seq) > (rooms.id, 0) and (room_id, seq) <= (rooms.id, 9223372036854775807)
                              order by room_id, seq limit 1) first on true
    ), due as materialized (
        select moved.place
          from marks
         cross join lateral (select place, at
                               from (select ctid as place, at from receipt_moves
                                      where (reader, room) = (marks.reader, marks.room) and through < marks.first
                                      order by reader, room, through limit $5) looked
                              where at <= (select cutoff(marks.room)) limit $5) moved
         limit $5
    ), gone as (
        delete from receipt_moves where not $3 and ctid = any(array(select place from due))
    )
    select (select count(*) from due), last.reader, last.room
      from (select) one left join (select reader, room from walked order by reader desc, room desc limit 1) last on true";

/// The same of the mark over all conversations: what the longest keeps, of those that have days of their own, it keeps.
const DELIVERED: &str = "
    with walked as materialized (
        select name as reader from users where name > $1 and delivered > 0 and $2 = '' order by name limit $4
    ), own as materialized (
        select split_part(room, '.', 2) as one, split_part(room, '.', 3) as other, cutoff(room) as cutoff
          from retention where starts_with(room, 'dm.') and room <> 'dm.*'
    ), marks as (
        select walked.reader, coalesce(first.seq, 9223372036854775807) as first
          from walked
          left join lateral (select seq from messages
                              where recipient is not null and (recipient, seq) > (walked.reader, 0)
                                and (recipient, seq) <= (walked.reader, 9223372036854775807)
                              order by recipient, seq limit 1) first on true
    ), due as materialized (
        select moved.place
          from marks
         cross join lateral (select place, at
                               from (select ctid as place, at from receipt_moves
                                      where reader = marks.reader and room is null and through < marks.first
                                      order by reader, room, through limit $5) looked
                              where at <= (select least(cutoff('dm.*'), min(cutoff)) from own
                                            where marks.reader in (one, other)) limit $5) moved
         limit $5
    ), gone as (
        delete from receipt_moves where not $3 and ctid = any(array(select place from due))
    )
    select (select count(*) from due), last.reader, ''
      from (select) one left join (select reader from walked order by reader desc limit 1) last on true";

/// How far a walk over all marks has come.
#[derive(Debug, Clone, Default)]
pub struct Moves {
    /// Those of conversations are done.
    delivered: bool,
    reader: String,
    room: String,
}

impl Moves {
    /// Sweeps the moves of the next marks, or in a dry run counts them; how many, and whether those were the last marks.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn step(
        &mut self,
        connection: &mut PgConnection,
        dry_run: bool,
    ) -> Result<(u64, bool)> {
        let sql = if self.delivered { DELIVERED } else { READ };
        let limit = if dry_run { MARKS * STEP } else { STEP };
        let (due, reader, room): (i64, Option<String>, Option<String>) = sqlx::query_as(sql)
            .bind(&self.reader)
            .bind(&self.room)
            .bind(dry_run)
            .bind(MARKS)
            .bind(limit)
            .fetch_one(connection)
            .await
            .map_err(refused)?;
        let mut done = false;
        match (reader, room) {
            // There may be more of the same marks.
            _ if due >= limit && !dry_run => {}
            (Some(reader), Some(room)) => (self.reader, self.room) = (reader, room),
            _ if self.delivered => done = true,
            _ => {
                *self = Moves {
                    delivered: true,
                    ..Moves::default()
                }
            }
        }
        Ok((due.unsigned_abs(), done))
    }
}
