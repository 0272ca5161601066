//! What a user has not read in rooms, as far as it is stored.
//!
//! The user's own messages and tombstones stand among the messages that count, so more has to be
//! considered than is counted. First we consider, in each room, as many messages as are counted at
//! most. Then the rooms in which that did not decide the count share a fixed number of further
//! messages. The newest are considered first, because expired messages that are not deleted yet lie
//! at the other end.

use sqlx::postgres::PgConnection;

use base::seq::Seq;

/// So many messages are considered beyond the first ones of each room, in all rooms together. That
/// takes some 0.2 s.
const BEYOND: i64 = 200_000;

/// For each room: its newest message, how many messages count, and where the next message stands
/// that was not considered, if it may change the count. `$7` messages of each room are considered;
/// the one after them passes the filter as the sign that there is one. PostgreSQL stops where
/// enough is counted.
const COUNT: &str = include_str!("rooms.sql");

/// One room the user reads.
#[derive(Debug)]
pub struct Counted<'a> {
    /// Its name.
    pub room: &'a str,
    /// The read cursor.
    read: Seq,
    /// Its newest message, by any user.
    pub newest: Seq,
    /// Messages of others that are not deleted; `most` or more, when there are so many.
    pub count: i64,
    /// From here on down nothing was considered.
    next: Option<i64>,
}

impl Counted<'_> {
    /// Some messages were not considered that may count.
    pub fn is_cut(&self) -> bool {
        self.next.is_some()
    }
}

/// Counts up to `most` messages in each room of `cursors`, which are rooms and the user's read
/// cursors, up to `stored_through` and without the positions `deleted`. Rooms without a stored
/// message are left out.
///
/// # Errors
/// The database does not answer.
pub async fn count<'a>(
    connection: &mut PgConnection,
    user: &str,
    cursors: &'a [(String, Seq)],
    stored_through: Seq,
    deleted: &[i64],
    most: i64,
) -> Result<Vec<Counted<'a>>, sqlx::Error> {
    let begin = |(room, read): &'a (String, Seq)| Counted {
        room,
        read: *read,
        newest: Seq::ZERO,
        count: 0,
        next: Some(stored_through.as_i64()),
    };
    let mut rooms: Vec<Counted<'a>> = cursors.iter().map(begin).collect();
    let mut considered = most;
    for _ in 0..2 {
        let mut open: Vec<&mut Counted<'a>> = rooms
            .iter_mut()
            .filter(|room| room.is_cut() && room.count < most)
            .collect();
        if open.is_empty() {
            break;
        }
        let rows: Vec<(i64, i64, i64, Option<i64>)> = sqlx::query_as(COUNT)
            .bind(user)
            .bind(most)
            .bind(deleted)
            .bind(open.iter().map(|room| room.room).collect::<Vec<&str>>())
            .bind(
                open.iter()
                    .map(|room| room.read.as_i64())
                    .collect::<Vec<i64>>(),
            )
            .bind(
                open.iter()
                    .map(|room| room.next.unwrap_or_default())
                    .collect::<Vec<i64>>(),
            )
            .bind(considered)
            .fetch_all(&mut *connection)
            .await?;
        for (place, newest, some, next) in rows {
            let Some(room) = usize::try_from(place)
                .ok()
                .and_then(|place| open.get_mut(place.checked_sub(1)?))
            else {
                continue;
            };
            room.newest = Seq::from_i64(newest);
            room.next = next;
            room.count += some;
        }
        rooms.retain(|room| room.newest > Seq::ZERO);
        let open = rooms
            .iter()
            .filter(|room| room.is_cut() && room.count < most)
            .count();
        considered = BEYOND / i64::try_from(open.max(1)).unwrap_or(BEYOND);
    }
    Ok(rooms)
}
