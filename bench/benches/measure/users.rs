//! Who writes to whom: two logs of direct messages, a short one and a long one, that end with the
//! same 10,000 messages.
//!
//! A message is known by its age, how many came after it. The age alone says who wrote it to whom,
//! so a longer stream is a shorter one with more before it, and the same users ask for the same
//! pages in both.

use std::collections::HashMap;

use sqlx::PgPool;

use crate::ingest::text;
use crate::numbers::scattered;
use protocol::message::Message;

/// Everybody but [`DESK`].
pub const USERS: u64 = 10_000;
/// So many of the newest wait for their recipients, and are not read.
pub const WAITING: u64 = 10_000;
/// Somebody to whom more is written than they fetch: all of it waits.
pub const DESK: &str = "desk";

/// Everybody talks with those so many places further on, and so many back: ten conversations each,
/// the nearer the livelier.
const APART: [u64; 5] = [1, 7, 53, 401, 2_903];
/// Half of the messages belong to talks: two users who exchange 50 messages within 10,000.
const TALKS: u64 = 100;
/// Of so many messages, one is to the desk, from one of so many users.
const DESK_EVERY: u64 = 66;
const DESK_CALLERS: u64 = 40;
/// Seconds between two messages.
const SECONDS_APART: f64 = 2.0;
/// Rows in one statement.
const CHUNK: u64 = 10_000;

/// The newest was received now, and none has expired.
const INSERT: &str = "
    insert into messages (seq, room_id, sender, recipient, id, derived, text, sent_at, received_at)
    select seq, room_id, sender, recipient, 'm-' || seq, false, text, at, at
      from (select *, now() - age * $7 * interval '1 second' as at
              from unnest($1::bigint[], $2::int[], $3::text[], $4::text[], $5::text[], $6::bigint[])
                as asked (seq, room_id, sender, recipient, text, age)) as dated";

/// Everything but what waits was delivered and read, each conversation with one move of its cursor.
const MARKS: &str = "
    with recipients as (
        insert into users (name, delivered)
        select name, case when name = $2 then 0 else $1 end from unnest($3::text[]) as asked (name)
    ), marked as (
        insert into receipts (reader, room, read)
        select distinct recipient, rooms.name, $1 from messages join rooms on rooms.id = room_id
         where seq <= $1 and recipient <> $2
        returning reader, room
    )
    insert into receipt_moves (reader, room, kind, through, at)
    select reader, room, 'read', $1, now() from marked
    union all
    select name, null, 'delivered', $1, now() from unnest($3::text[]) as asked (name)
     where $1 > 0 and name <> $2";

/// A log of direct messages, at the positions from 1 on.
#[derive(Debug, Clone, Copy)]
pub struct Directs {
    /// How many.
    pub messages: u64,
}

/// What can be requested, and what the reply contains: positions, oldest first.
pub struct Newest {
    /// Of everybody, what waits.
    pub waiting: HashMap<String, Vec<u64>>,
    /// Of the talks of late, everything.
    pub conversations: HashMap<String, Vec<u64>>,
}

impl Directs {
    /// Up to here everything was delivered and read.
    pub fn cursor(self) -> u64 {
        self.messages - WAITING
    }

    fn age(self, seq: u64) -> u64 {
        self.messages - seq
    }

    /// Stores all of it as persist-message and track-receipts would have.
    pub async fn store(self, database: &PgPool) {
        let rooms = self.rooms(database).await;
        for first in (1..=self.messages).step_by(CHUNK as usize) {
            let seqs = first..(first + CHUNK).min(self.messages + 1);
            let pairs: Vec<(String, String)> = seqs
                .clone()
                .map(|seq| participants(self.age(seq)))
                .collect();
            sqlx::query(INSERT)
                .bind(seqs.clone().map(|seq| seq as i64).collect::<Vec<i64>>())
                .bind(
                    pairs
                        .iter()
                        .map(|(from, to)| rooms[&room(from, to)])
                        .collect::<Vec<i32>>(),
                )
                .bind(
                    pairs
                        .iter()
                        .map(|(from, _)| from.as_str())
                        .collect::<Vec<&str>>(),
                )
                .bind(
                    pairs
                        .iter()
                        .map(|(_, to)| to.as_str())
                        .collect::<Vec<&str>>(),
                )
                .bind(
                    seqs.clone()
                        .map(|seq| text(self.age(seq)))
                        .collect::<Vec<String>>(),
                )
                .bind(seqs.map(|seq| self.age(seq) as i64).collect::<Vec<i64>>())
                .bind(SECONDS_APART)
                .execute(database)
                .await
                .expect("rows");
        }
        let names: Vec<String> = (0..USERS).map(user).chain([DESK.to_owned()]).collect();
        sqlx::query(MARKS)
            .bind(self.cursor() as i64)
            .bind(DESK)
            .bind(names)
            .execute(database)
            .await
            .expect("cursors");
        // One by one: two statements in one string are one transaction, in which nothing is
        // vacuumed.
        for settled in ["vacuum analyze", "checkpoint"] {
            sqlx::raw_sql(settled)
                .execute(database)
                .await
                .expect("PostgreSQL answers");
        }
    }

    async fn rooms(self, database: &PgPool) -> HashMap<String, i32> {
        let mut names: Vec<String> = (0..self.messages)
            .map(participants)
            .map(|(from, to)| room(&from, &to))
            .collect();
        names.sort_unstable();
        names.dedup();
        let made = "insert into rooms (name) select unnest($1::text[]) returning name, id";
        let rooms: Vec<(String, i32)> = sqlx::query_as(made)
            .bind(names)
            .fetch_all(database)
            .await
            .expect("rooms");
        rooms.into_iter().collect()
    }

    /// In which conversation the message at that position stands.
    pub fn room(self, seq: u64) -> String {
        let (from, to) = participants(self.age(seq));
        room(&from, &to)
    }

    /// What is requested.
    pub fn newest(self) -> Newest {
        let mut newest = Newest {
            waiting: HashMap::new(),
            conversations: HashMap::new(),
        };
        newest.conversations.extend(
            talks()
                .into_iter()
                .map(|(one, other)| (room(&one, &other), Vec::new())),
        );
        for seq in 1..=self.messages {
            let (from, to) = participants(self.age(seq));
            if let Some(conversation) = newest.conversations.get_mut(&room(&from, &to)) {
                conversation.push(seq);
            }
            if seq > self.cursor() || to == DESK {
                newest.waiting.entry(to).or_default().push(seq);
            }
        }
        newest
    }

    /// The answer has to hold these messages, and no others.
    pub fn check(self, what: &str, messages: &[Message], seqs: &[u64]) {
        assert_eq!(
            messages
                .iter()
                .map(|message| message.seq.get())
                .collect::<Vec<u64>>(),
            seqs,
            "{what}"
        );
        for Message {
            seq,
            user,
            to,
            text: shown,
            deleted,
            ..
        } in messages
        {
            let (from, recipient) = participants(self.age(seq.get()));
            let right = *user == from
                && to.as_deref() == Some(&recipient)
                && *shown == text(self.age(seq.get()))
                && !deleted;
            assert!(right, "{what}: another message stands at {seq}");
        }
    }
}

/// The talks of late.
pub fn talks() -> Vec<(String, String)> {
    (0..TALKS).map(|talk| participants(2 * talk)).collect()
}

/// The nth user.
pub fn user(n: u64) -> String {
    format!("user-{}", n % USERS)
}

/// A conversation's name.
pub fn room(one: &str, other: &str) -> String {
    format!("dm.{}.{}", one.min(other), one.max(other))
}

/// Who wrote the message of that age, and to whom.
fn participants(age: u64) -> (String, String) {
    let chance = scattered(age);
    if age % DESK_EVERY == DESK_EVERY / 2 {
        return (
            user(chance % DESK_CALLERS * (USERS / DESK_CALLERS)),
            DESK.to_owned(),
        );
    }
    let (place, apart) = if age.is_multiple_of(2) {
        let talk = scattered(age / WAITING * TALKS + age / 2 % TALKS);
        (talk, (talk >> 32) % 5)
    } else {
        (chance, ((chance >> 32) % 5).min((chance >> 40) % 5))
    };
    let one = user(place % USERS);
    let other = user(place % USERS + APART[apart as usize]);
    if chance >> 63 == 0 {
        (one, other)
    } else {
        (other, one)
    }
}
