with recursive scan (room_id, place) as (
    (select room_id, 1 from messages
      where recipient is not null and not deleted
        and (recipient, room_id) <= ($1, 2147483647) and (recipient, room_id) >= ($1, 0)
      order by recipient desc, room_id desc limit 1)
    union all
    select (select room_id from messages
             where recipient is not null and not deleted
               and (recipient, room_id) < ($1, scan.room_id) and (recipient, room_id) >= ($1, 0)
             order by recipient desc, room_id desc limit 1), place + 1
      from scan where room_id is not null and place <= $5
), unread as (
    select scan.room_id, rooms.name, newest.seq, coalesce(receipts.read, 0) as read
      from scan
      join rooms on rooms.id = scan.room_id
      left join receipts on (receipts.reader, receipts.room) = ($1, rooms.name)
     cross join lateral (select seq from messages
                          where recipient is not null and not deleted
                            and (recipient, room_id, seq) > ($1, scan.room_id, 0)
                            and (recipient, room_id, seq)
                                <= ($1, scan.room_id, 9223372036854775807)
                          order by recipient desc, room_id desc, seq desc limit 1) newest
     where newest.seq > coalesce(receipts.read, 0) and scan.place <= $5 and rooms.name <> $7
     order by newest.seq desc limit $6
)
select scanned.conversations, name, coalesce(seq, 0), coalesce(counted.some, 0)
  from (select coalesce(max(place), 0)::bigint as conversations
          from scan where room_id is not null) scanned
  left join unread on true
  left join lateral (
    select count(*) as some
      from (select from (select seq, received_at from messages
                          where recipient is not null and not deleted
                            and (recipient, room_id, seq) > ($1, unread.room_id, unread.read)
                            and (recipient, room_id, seq) <= ($1, unread.room_id, $2)
                          order by recipient desc, room_id desc, seq desc
                          limit $4 + cardinality($3)) considered
             where received_at > (select cutoff(unread.name))
               and seq not in (select unnest($3))
             limit $4) found) counted on true
