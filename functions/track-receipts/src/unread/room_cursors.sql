select room, read
  from (select room, read from receipts
         where reader = $1 and room not like 'dm.%' order by read desc limit $3) cursors
  left join lateral (select id from rooms where name = cursors.room limit 1) rooms on true
  left join lateral (select seq from messages
                      where (room_id, seq) > (rooms.id, cursors.read)
                        and (room_id, seq) <= (rooms.id, 9223372036854775807)
                      order by room_id desc, seq desc limit 1) newest on true
 order by newest.seq desc nulls last, read desc limit $2
