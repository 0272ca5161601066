-- $1: the user; $2, $3: the id and kind of id after which to continue.
--
-- The user's next messages by id, an order that the unique key provides. It includes tombstones,
-- because a soft deletion leaves the text in the stream.
select seq, rooms.name as room, recipient, messages.id, derived,
       floor(extract(epoch from sent_at) * 1000)::bigint as sent_ms,
       floor(extract(epoch from received_at) * 1000)::bigint as received_ms
  from messages join rooms on rooms.id = room_id
 where sender = $1 and (messages.id, derived) > ($2, $3)
   and not exists (select from changes
                    where target = messages.seq
                      and (changes.sender, changes.id, mode)
                          = (messages.sender, messages.id, 'hard'))
 order by sender, messages.id, derived limit 1000
