//! What a user has not read in rooms, as far as the index has it. One's own messages and tombstones stand among those of others, so
//! more has to be looked at than is counted: of each room as much as is counted at most, then of those in which that did not
//! decide it, together, a fixed number. The newest first: what has expired and is not swept yet lies at the other end.

use sqlx::postgres::PgConnection;

use base::seq::Seq;

/// Messages looked at beyond the first ones of each room, in all rooms together: some 0.2 s.
const BEYOND: i64 = 200_000;

/// Of rooms, what was counted, and where the next message that was not looked at stands, if that may change it. `$7` messages of
/// each are looked at; the one after them passes the filter as the sign that there is one. Reading ends where enough is counted.
const COUNT: &str = "
    select asked.place, coalesce(newest.seq, 0), counted.some, counted.next
      from unnest($4::text[], $5::bigint[], $6::bigint[]) with ordinality as asked (name, read, through, place)
      join rooms on rooms.name = asked.name
      left join lateral (select seq from messages
                           where (room_id, seq) > (rooms.id, 0) and (room_id, seq) <= (rooms.id, 9223372036854775807)
                           order by room_id desc, seq desc limit 1) newest on true
     cross join lateral (
        select count(*) filter (where place <= $7) as some, max(seq) filter (where place > $7) as next
          from (select seq, place
                  from (select seq, sender, deleted, received_at, row_number() over (order by room_id desc, seq desc) as place
                          from messages
                         where (room_id, seq) > (rooms.id, asked.read) and (room_id, seq) <= (rooms.id, asked.through)
                         order by room_id desc, seq desc limit $7 + 1) looked
                 where place > $7
                    or sender <> $1 and not deleted and received_at > (select cutoff(asked.name)) and seq not in (select unnest($3))
                 limit $2) found) counted";

/// One room the user reads.
#[derive(Debug)]
pub struct Counted<'a> {
    /// Its name.
    pub room: &'a str,
    /// The mark.
    read: i64,
    /// Its newest message, whoever wrote it.
    pub newest: Seq,
    /// Messages of others, undeleted; the most that is asked for, or more, when there are so many.
    pub count: i64,
    /// Not looked at, from here on down.
    next: Option<i64>,
}

impl Counted<'_> {
    /// Some were not looked at that may count.
    pub fn is_cut(&self) -> bool {
        self.next.is_some()
    }
}

/// Counts up to `most` in each of the rooms of `marks`, which are a room and where its mark stands, up to `floor` and without the
/// positions `gone`. Rooms the index does not know are left out.
///
/// # Errors
/// The database's.
pub async fn count<'a>(
    connection: &mut PgConnection,
    user: &str,
    marks: &'a [(String, i64)],
    floor: Seq,
    gone: &[i64],
    most: i64,
) -> Result<Vec<Counted<'a>>, sqlx::Error> {
    let begin = |(room, read): &'a (String, i64)| Counted {
        room,
        read: *read,
        newest: Seq::ZERO,
        count: 0,
        next: Some(floor.as_i64()),
    };
    let mut rooms: Vec<Counted<'a>> = marks.iter().map(begin).collect();
    let mut looked_at = most;
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
            .bind(gone)
            .bind(open.iter().map(|room| room.room).collect::<Vec<&str>>())
            .bind(open.iter().map(|room| room.read).collect::<Vec<i64>>())
            .bind(
                open.iter()
                    .map(|room| room.next.unwrap_or_default())
                    .collect::<Vec<i64>>(),
            )
            .bind(looked_at)
            .fetch_all(&mut *connection)
            .await?;
        for (place, newest, some, next) in rows {
            let Some(room) = usize::try_from(place)
                .ok()
                .and_then(|place| open.get_mut(place.checked_sub(1)?))
            else {
                continue;
            };
            (room.newest, room.next) = (Seq::from_i64(newest), next);
            room.count += some;
        }
        rooms.retain(|room| room.newest > Seq::ZERO);
        let open = rooms
            .iter()
            .filter(|room| room.is_cut() && room.count < most)
            .count();
        looked_at = BEYOND / i64::try_from(open.max(1)).unwrap_or(BEYOND);
    }
    Ok(rooms)
}
