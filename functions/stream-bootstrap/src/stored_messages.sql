-- A message is stored when its own row exists, or a row with the same sender and client-supplied
-- id. Its own row has the same sequence, author and time of receipt. The text is not compared: it
-- may have been erased since, and must not come back. And somebody who wrote "hello" at the same
-- sequence of the lost stream and of this one wrote it twice.
--
-- A message is stored as well when its deletion is. A message with a client-supplied id leaves a
-- tombstone, which is a row; for the others, `changes` has the sequence of what was deleted.
select candidate.seq
  from unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::bool[], $6::timestamptz[])
       as candidate (seq, room, sender, id, derived, received_at)
 where exists (
           select from messages join rooms on rooms.id = messages.room_id
            where messages.seq = candidate.seq and rooms.name = candidate.room
              and messages.received_at = candidate.received_at
              and (messages.sender, messages.id, messages.derived)
                  = (candidate.sender, candidate.id, candidate.derived))
    or not candidate.derived and exists (
           select from messages
            where (messages.sender, messages.id, messages.derived)
                  = (candidate.sender, candidate.id, false))
    or candidate.derived and exists (
           select from changes join rooms on rooms.id = changes.room_id
            where (changes.target, changes.sender, changes.id, rooms.name)
                  = (candidate.seq, candidate.sender, candidate.id, candidate.room))
       and not exists (
           select from messages
            where messages.seq = candidate.seq and messages.received_at <> candidate.received_at)
