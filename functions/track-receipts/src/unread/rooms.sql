select asked.place, coalesce(newest.seq, 0), counted.some, counted.next
  from unnest($4::text[], $5::bigint[], $6::bigint[])
       with ordinality as asked (name, read, through, place)
  join rooms on rooms.name = asked.name
  left join lateral (select seq from messages
                      where (room_id, seq) > (rooms.id, 0)
                        and (room_id, seq) <= (rooms.id, 9223372036854775807)
                      order by room_id desc, seq desc limit 1) newest on true
 cross join lateral (
    select count(*) filter (where place <= $7) as some,
           max(seq) filter (where place > $7) as next
      from (select seq, place
              from (select seq, sender, deleted, received_at,
                           row_number() over (order by room_id desc, seq desc) as place
                      from messages
                     where (room_id, seq) > (rooms.id, asked.read)
                       and (room_id, seq) <= (rooms.id, asked.through)
                     order by room_id desc, seq desc limit $7 + 1) considered
             where place > $7
                or sender <> $1 and not deleted
                   and received_at > (select cutoff(asked.name))
                   and seq not in (select unnest($3))
             limit $2) found) counted
