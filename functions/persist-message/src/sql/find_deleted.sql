select asked.sender, asked.id, asked.derived, found.received_at,
       (select count(*) > 0
          from (select from changes
                 where (changes.sender, changes.id) = (asked.sender, asked.id) and mode = 'hard'
                 limit 1) as hard) as hard
  from unnest($1::text[], $2::text[], $3::bool[]) as asked (sender, id, derived)
 cross join lateral (
       select deleted, received_at from messages
        where (messages.sender, messages.id, messages.derived)
              = (asked.sender, asked.id, asked.derived)
       offset 0) as found
 where found.deleted
