select asked.sender, asked.id, asked.derived, found.seq
  from unnest($1::text[], $2::text[], $3::bool[]) as asked (sender, id, derived)
 cross join lateral (
       select seq from messages
        where (messages.sender, messages.id, messages.derived)
              = (asked.sender, asked.id, asked.derived)
       union all
       select seq from duplicates
        where (duplicates.sender, duplicates.id) = (asked.sender, asked.id) and not asked.derived
       offset 0) as found
