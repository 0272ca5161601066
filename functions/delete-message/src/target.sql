select seq, rooms.name as room, sender, recipient, messages.id, derived, '' as text, sent_at,
       received_at, deleted,
       exists (select from changes
                where target = messages.seq
                  and (changes.sender, changes.id, mode)
                    = (messages.sender, messages.id, 'hard')) as erased
  from messages join rooms on rooms.id = room_id
