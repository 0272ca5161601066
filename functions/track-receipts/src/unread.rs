//! What a user has not read, by conversation: the union of log and index, counted.
//!
//! Up to the ack floor the index has everything, and counts it. What lies above is in few rows: those are read, and united with the log
//! as a page is. The marks are read before the floor; they only grow, so an old one counts what was read meanwhile, and never less
//! than there is.

use std::collections::HashMap;

use sqlx::postgres::PgConnection;

use crate::mark::look;
use crate::rooms;
use base::error::Result;
use base::seq::Seq;
use jetstream::stream::Limit;
use protocol::change::Change;
use protocol::conversation::Conversation;
use protocol::message::Message;
use protocol::name::{Room, User};
use protocol::receipt::{Unread, UnreadRoom};
use protocol::subject::{direct_change_subjects, direct_subjects_to};
use service::ctx::Ctx;
use timeline::chat::Chat;
use timeline::tail::{Tail, few_changes, own_changes};
use timeline::union::{Cutoffs, Key, Union};

/// Exact up to here.
const EXACT: u64 = 999;
/// Counted in one conversation: when there are so many, there may be more.
const MOST: i64 = 1_000;
/// Conversations in a reply.
const LISTED: usize = 500;
/// Conversations looked at: of two people those begun last, of rooms those with the highest marks.
const WALKED: i64 = 10_000;
/// Messages of the log looked at above the floor.
const TAIL: usize = 5_000;
const TAIL_BYTES: usize = 8 << 20;

/// Rooms the user reads, which are those with a mark. First those that have news, the newest first: a quiet room's mark is low, and
/// so is what is new in it. Then the others, the highest mark first, for what is in the log only. Of each room one look at an index.
pub const MARKS: &str = r"
    select room, read
      from (select room, read from receipts where reader = $1 and room not like 'dm.%' order by read desc limit $3) marks
      left join lateral (select id from rooms where name = marks.room limit 1) rooms on true
      left join lateral (select seq from messages
                          where (room_id, seq) > (rooms.id, marks.read) and (room_id, seq) <= (rooms.id, 9223372036854775807)
                          order by room_id desc, seq desc limit 1) newest on true
     order by newest.seq desc nulls last, read desc limit $2";

/// A limit in the subquery, as in [`KNOWN`], makes every plan go from one key to the next: one that was made while the table was empty
/// would otherwise read all of it.
pub const DIRECT_MARKS: &str = "
    select asked.room, marks.read
      from (select distinct room from unnest($2::text[]) as asked (room)) asked
     cross join lateral (select read from receipts where (reader, receipts.room) = ($1, asked.room) limit 1) marks";

pub const KNOWN: &str = "
    select asked.sender, asked.id, stored.seq
      from (select distinct * from unnest($1::text[], $2::text[]) as asked (sender, id)) asked
     cross join lateral (select seq from messages
                          where (messages.sender, messages.id) = (asked.sender, asked.id) and not derived limit 1) stored";

/// Conversations of two people with something unread, from one to the next by the index. The walk ends after `$5` of them. Ranges are
/// bounds of rows and not equalities: then no other index has the order that is asked for, and none is taken. One's own messages
/// and tombstones are not in it, and what has expired and is not swept yet lies at its end: nothing else is looked at than counts,
/// but for what was deleted a moment ago.
const DIRECT: &str = "
    with recursive walk (room_id, place) as (
        (select room_id, 1 from messages
          where recipient is not null and not deleted and (recipient, room_id) <= ($1, 2147483647) and (recipient, room_id) >= ($1, 0)
          order by recipient desc, room_id desc limit 1)
        union all
        select (select room_id from messages
                 where recipient is not null and not deleted
                   and (recipient, room_id) < ($1, walk.room_id) and (recipient, room_id) >= ($1, 0)
                 order by recipient desc, room_id desc limit 1), place + 1
          from walk where room_id is not null and place <= $5
    ), unread as (
        select walk.room_id, rooms.name, newest.seq, coalesce(receipts.read, 0) as read
          from walk
          join rooms on rooms.id = walk.room_id
          left join receipts on (receipts.reader, receipts.room) = ($1, rooms.name)
         cross join lateral (select seq from messages
                              where recipient is not null and not deleted
                                and (recipient, room_id, seq) > ($1, walk.room_id, 0)
                                and (recipient, room_id, seq) <= ($1, walk.room_id, 9223372036854775807)
                              order by recipient desc, room_id desc, seq desc limit 1) newest
         where newest.seq > coalesce(receipts.read, 0) and walk.place <= $5 and rooms.name <> $7
         order by newest.seq desc limit $6
    )
    select walked.through, name, coalesce(seq, 0), coalesce(counted.some, 0)
      from (select coalesce(max(place), 0)::bigint as through from walk where room_id is not null) walked
      left join unread on true
      left join lateral (
        select count(*) as some
          from (select from (select seq, received_at from messages
                              where recipient is not null and not deleted
                                and (recipient, room_id, seq) > ($1, unread.room_id, unread.read)
                                and (recipient, room_id, seq) <= ($1, unread.room_id, $2)
                              order by recipient desc, room_id desc, seq desc limit $4 + cardinality($3)) looked
                 where received_at > (select cutoff(unread.name)) and seq not in (select unnest($3)) limit $4) found) counted on true";

/// What is stored above the floor: no more than workers may hold unacknowledged. With an upper bound PostgreSQL takes that for a
/// part of the table and not for a third of it; and with subqueries and no join it is a range of an index, and not every room there is.
pub const ABOVE: &str = "
    select seq, (select name from rooms where rooms.id = room_id), sender, recipient, id, deleted from messages
     where seq > $1 and seq <= 9223372036854775807
       and (recipient = $2 or room_id = any(array(select rooms.id from rooms where name = any($3))))
       and received_at > (select cutoff(name) from rooms where rooms.id = room_id)";

const CUTOFFS: &str = "select name, cutoff_ms(name) from unnest($1::text[]) as asked (name)";

/// Counts.
///
/// # Errors
/// 503 when the log or PostgreSQL does not answer: only PostgreSQL knows the marks.
pub async fn count(ctx: &Ctx<Chat>, user: &User) -> Result<Unread> {
    let (log, name) = (ctx.stream(), user.as_str());
    let mut marks = look(ctx.database(), async |connection| {
        marks(connection, name).await
    })
    .await?;
    let rooms_cut = marks.len() > LISTED;
    marks.truncate(LISTED);
    let floor = log.stored_through().await?;
    let mut subjects = vec![direct_subjects_to(user)];
    if log.range().await?.1 > floor {
        subjects.extend(
            marks
                .iter()
                .filter_map(|(room, _)| Some(Room::parse(room).ok()?.stream_subject())),
        );
    }
    let limit = Limit::within(TAIL, TAIL_BYTES, ctx.settings().request_deadline());
    let tail = Tail::oldest(log, &subjects, floor.next(), limit, ctx.limits()).await?;
    let above = match few_changes(log, floor.next(), limit.until).await? {
        Some(few) => few,
        // Other conversations' deletions cost this user nothing.
        None => {
            own_changes(
                log,
                &change_subjects(user, &marks),
                floor.next(),
                limit.until,
            )
            .await?
        }
    };
    let asked = Asked {
        user,
        floor,
        marks: &marks,
        tail,
        above: above.iter().collect(),
    };
    let tail_cut = !asked.tail.complete;
    let asked = &asked;
    let counted = look(ctx.database(), async |connection| {
        asked.count(connection).await
    })
    .await?;
    Ok(listed(counted, rooms_cut, tail_cut))
}

/// Where the deletions of what the user reads are appended.
fn change_subjects(user: &User, marks: &[(String, i64)]) -> Vec<String> {
    let rooms = marks
        .iter()
        .filter_map(|(room, _)| Some(Conversation::Room(Room::parse(room).ok()?).change_subject()));
    direct_change_subjects(user)
        .into_iter()
        .chain(rooms)
        .collect()
}

async fn marks(
    connection: &mut PgConnection,
    user: &str,
) -> Result<Vec<(String, i64)>, sqlx::Error> {
    sqlx::query_as(MARKS)
        .bind(user)
        .bind(LISTED as i64 + 1)
        .bind(WALKED)
        .fetch_all(connection)
        .await
}

/// What is known before the index is read.
struct Asked<'a> {
    user: &'a User,
    floor: Seq,
    /// Rooms the user reads, and up to where.
    marks: &'a [(String, i64)],
    /// Of those, and of the user's direct messages, what lies above the floor.
    tail: Tail,
    above: Vec<&'a Change>,
}

/// One conversation.
#[derive(Debug, Default)]
struct Counted {
    count: u64,
    more: bool,
    newest: Seq,
}

/// Every conversation, and whether some were not looked at.
struct All {
    rooms: HashMap<String, Counted>,
    cut: bool,
}

/// Conversations walked; and of one of them, if there is one, its name, newest position, and what was counted.
type CountRow = (i64, Option<String>, i64, i64);

impl Asked<'_> {
    async fn count(&self, connection: &mut PgConnection) -> Result<All, sqlx::Error> {
        let keys = Union::keys(std::slice::from_ref(&self.tail), &self.above);
        let known = known(connection, &keys).await?;
        // Deleted above the floor, perhaps not yet in the index: by position, and where else a copy is stored.
        let deleted = self.above.iter().map(|change| change.tombstone());
        let gone: Vec<i64> = deleted
            .flat_map(|grave| [Some(grave.seq), known.get(&(grave.user, grave.id)).copied()])
            .flatten()
            .map(Seq::as_i64)
            .collect();
        let rows: Vec<CountRow> = sqlx::query_as(DIRECT)
            .bind(self.user.as_str())
            .bind(self.floor.as_i64())
            .bind(&gone)
            .bind(MOST)
            .bind(WALKED)
            .bind(LISTED as i64 + 1)
            .bind(self.own_conversation())
            .fetch_all(&mut *connection)
            .await?;
        let cut = rows.iter().any(|row| row.0 > WALKED);
        let mut rooms: HashMap<String, Counted> = HashMap::new();
        for (_, room, newest, some) in rows {
            let Some(room) = room else { continue };
            rooms.insert(
                room,
                Counted {
                    count: some.unsigned_abs(),
                    more: false,
                    newest: Seq::from_i64(newest),
                },
            );
        }
        for room in rooms::count(
            connection,
            self.user.as_str(),
            self.marks,
            self.floor,
            &gone,
            MOST,
        )
        .await?
        {
            let counted = Counted {
                count: room.count.unsigned_abs(),
                more: room.is_cut(),
                newest: room.newest,
            };
            rooms.insert(room.room.to_owned(), counted);
        }
        let names: Vec<&str> = self.marks.iter().map(|(room, _)| room.as_str()).collect();
        for (room, seq) in self.above_the_floor(connection, known, &names).await? {
            let counted = rooms.entry(room).or_default();
            counted.count += 1;
            counted.newest = counted.newest.max(seq);
        }
        Ok(All { rooms, cut })
    }

    /// What somebody notes for themselves is nothing unread.
    fn own_conversation(&self) -> String {
        Conversation::direct(self.user.clone(), self.user.clone()).name()
    }

    /// Where unread messages stand above the floor, and in which conversations.
    async fn above_the_floor(
        &self,
        connection: &mut PgConnection,
        known: HashMap<Key, Seq>,
        names: &[&str],
    ) -> Result<Vec<(String, Seq)>, sqlx::Error> {
        type Row = (i64, String, String, Option<String>, String, bool);
        let rows: Vec<Row> = sqlx::query_as(ABOVE)
            .bind(self.floor.as_i64())
            .bind(self.user.as_str())
            .bind(names)
            .fetch_all(&mut *connection)
            .await?;
        let rows = rows
            .into_iter()
            .map(|(seq, room, user, to, id, deleted)| Message {
                id,
                seq: Seq::from_i64(seq),
                room,
                user,
                text: String::new(),
                timestamp: 0,
                to,
                status: None,
                delivered_at: None,
                read_at: None,
                deleted,
            });
        let no_graves = Seq::MAX..=Seq::ZERO;
        let in_log: Vec<&str> = self
            .tail
            .messages
            .iter()
            .map(|message| message.room.as_str())
            .collect();
        let cutoffs_ms: Vec<(String, Option<i64>)> = sqlx::query_as(CUTOFFS)
            .bind(in_log)
            .fetch_all(&mut *connection)
            .await?;
        let cutoffs: Cutoffs = cutoffs_ms.into_iter().collect();
        let union = Union::new(
            known,
            self.above.clone(),
            cutoffs,
            std::slice::from_ref(&self.tail),
        );
        let merged = union.merge(
            rows.collect(),
            &self.tail,
            &(self.floor.next()..=Seq::MAX),
            &no_graves,
        );
        let others: Vec<Message> = merged
            .messages
            .into_values()
            .filter(|message| !message.deleted && message.user != self.user.as_str())
            .collect();
        let direct: Vec<&str> = others
            .iter()
            .filter(|message| message.to.is_some())
            .map(|message| message.room.as_str())
            .collect();
        let read: Vec<(String, i64)> = sqlx::query_as(DIRECT_MARKS)
            .bind(self.user.as_str())
            .bind(direct)
            .fetch_all(connection)
            .await?;
        let read: HashMap<&str, i64> = read
            .iter()
            .chain(self.marks)
            .map(|(room, read)| (room.as_str(), *read))
            .collect();
        let unread = |message: &Message| {
            message.seq.as_i64() > read.get(message.room.as_str()).copied().unwrap_or_default()
        };
        Ok(others
            .into_iter()
            .filter(|message| unread(message))
            .map(|message| (message.room, message.seq))
            .collect())
    }
}

async fn known(
    connection: &mut PgConnection,
    keys: &[Key],
) -> Result<HashMap<Key, Seq>, sqlx::Error> {
    if keys.is_empty() {
        return Ok(HashMap::new());
    }
    let (senders, ids): (Vec<&str>, Vec<&str>) = keys
        .iter()
        .map(|(sender, id)| (sender.as_str(), id.as_str()))
        .unzip();
    let known: Vec<(String, String, i64)> = sqlx::query_as(KNOWN)
        .bind(senders)
        .bind(ids)
        .fetch_all(connection)
        .await?;
    Ok(known
        .into_iter()
        .map(|(sender, id, seq)| ((sender, id), Seq::from_i64(seq)))
        .collect())
}

/// The reply: the newest first, and no more than are listed.
fn listed(all: All, rooms_cut: bool, tail_cut: bool) -> Unread {
    let mut rooms: Vec<(String, Counted)> = all
        .rooms
        .into_iter()
        .filter(|(_, counted)| counted.count > 0 || counted.more)
        .collect();
    rooms.sort_unstable_by(|(one, a), (other, b)| {
        b.newest.cmp(&a.newest).then_with(|| one.cmp(other))
    });
    let cut = all.cut || rooms_cut || tail_cut || rooms.len() > LISTED;
    rooms.truncate(LISTED);
    let entry = |(room, counted): (String, Counted)| UnreadRoom {
        room,
        count: counted.count.min(EXACT),
        more: counted.more || counted.count > EXACT || tail_cut,
    };
    let unread: Vec<UnreadRoom> = rooms.into_iter().map(entry).collect();
    let more = cut || unread.iter().any(|room| room.more);
    Unread {
        total: unread.iter().map(|room| room.count).sum(),
        unread,
        more,
    }
}
