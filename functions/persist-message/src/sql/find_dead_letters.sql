select found.id, seq, subject, headers, payload, received_at
  from unnest($1::text[], $2::text[]) as asked (sender, message_id)
 cross join lateral (
       select id, seq, subject, headers, payload, received_at from dead_letters
        where (dead_letters.sender, dead_letters.message_id) = (asked.sender, asked.message_id)
          and outcome is distinct from 'erased' and dead_letters.sender <> '' and id > $3
       offset 0) as found
 order by found.id limit $4
