select seq, target, sender, id, mode, changed_by from changes
 where recipient is not null and (recipient, seq) > ($1, $2) and (recipient, seq) <= ($1, $4)
   and (select max(received_at) from messages
         where (messages.sender, messages.id) = (changes.sender, changes.id))
       > (select case when name in (select room from retention where room >= 'dm.' and room < 'dm/')
                      then cutoff(name)
                      else (select cutoff('dm.')) end
            from rooms where rooms.id = room_id)
 order by recipient, seq limit $3
