with room as materialized (select id, cutoff from rooms, room_cutoff(name) where name = $1)
select seq, target, sender, id, mode, changed_by from changes
 where (room_id, seq) > ((select id from room), $2)
   and (room_id, seq) <= ((select id from room), $4)
   and (select max(received_at) from messages
         where (messages.sender, messages.id) = (changes.sender, changes.id))
       > (select cutoff from room)
 order by room_id, seq limit $3
