-- $1, $2: the reader and room of the last cursor scanned; $3: dry run; $4: cursors; $5: entries.
--
-- Scans the cursors of single conversations in the order of their key, and of each cursor the
-- entries from the lowest on: the keys of both tables have them in this order. Along a cursor the
-- times only increase, so the first entry that is too young ends its scan. The inner limit keeps
-- PostgreSQL from computing the cutoff for each row.
--
-- Nothing else deletes entries and nothing updates them, so a ctid stays valid.
with scanned as materialized (
    select reader, room from receipts
     where (reader, room) > ($1, $2) order by reader, room limit $4
), cursors as (
    select scanned.reader, scanned.room, coalesce(first.seq, 9223372036854775807) as first
      from scanned
      left join rooms on rooms.name = scanned.room
      left join lateral (select seq from messages
                          where (room_id, seq) > (rooms.id, 0)
                            and (room_id, seq) <= (rooms.id, 9223372036854775807)
                          order by room_id, seq limit 1) first on true
), due as materialized (
    select entry.place
      from cursors
     cross join lateral (select place, at
                           from (select ctid as place, at from receipt_moves
                                  where (reader, room) = (cursors.reader, cursors.room)
                                    and through < cursors.first
                                  order by reader, room, through limit $5) candidate
                          where at <= (select cutoff(cursors.room)) limit $5) entry
     limit $5
), deleted as (
    delete from receipt_moves where not $3 and ctid = any(array(select place from due))
)
select (select count(*) from due), last.reader, last.room
  from (select) one
  left join (select reader, room from scanned order by reader desc, room desc limit 1) last on true
