with room as materialized (select id, cutoff from rooms, room_cutoff(name) where name = $1)
select seq, sender, recipient, id, text, sent_at, deleted from messages
 where (room_id, seq) < ((select id from room), $2)
   and (room_id, seq) <= ((select id from room), $4)
   and (room_id, seq) > ((select id from room), 0) and received_at > (select cutoff from room)
 order by room_id desc, seq desc limit $3
