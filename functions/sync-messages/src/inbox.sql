select seq, (select name from rooms where rooms.id = room_id) as room,
       sender, recipient, id, text, sent_at, deleted
  from (select *,
               sum(octet_length(text)) over (order by seq rows unbounded preceding)
               - octet_length(text) < $4 as fits
          from (select seq, room_id, sender, recipient, id, text, sent_at, deleted
                  from messages
                 where recipient is not null and (recipient, seq) > ($1, $2)
                   and (recipient, seq) <= ($1, $5)
                   and received_at > (
                       select case when name in (select room from retention
                                                  where room >= 'dm.' and room < 'dm/')
                                   then cutoff(name)
                                   else (select cutoff('dm.')) end
                         from rooms where rooms.id = room_id)
                 order by recipient, seq limit $3) page) sized
 where fits order by seq
