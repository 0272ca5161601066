with met as (
    select asked.seq, asked.sender, asked.id, asked.received_at,
           case when found.seq = asked.seq then 'reused'
                when found.deleted
                     or (found.text = asked.text and found.room_id = asked.room_id) then 'duplicate'
                else 'conflict' end as what
      from unnest($1::bigint[], $2::text[], $3::text[], $4::bool[], $5::int[], $6::text[],
                  $7::timestamptz[])
           as asked (seq, sender, id, derived, room_id, text, received_at)
     cross join lateral (
           select seq, room_id, text, deleted, received_at from messages
            where (messages.sender, messages.id, messages.derived)
                  = (asked.sender, asked.id, asked.derived)
           offset 0) as found
     where case when found.seq = asked.seq then found.received_at <> asked.received_at
                else not asked.derived end
), noted as (
    insert into duplicates (seq, sender, id)
    select seq, sender, id from met where what = 'duplicate' order by sender, id, seq
    on conflict do nothing
)
select seq, what from met
 where what <> 'conflict'
    or (select count(*) from dead_letters
         where (dead_letters.seq, reason, dead_letters.received_at)
               = (met.seq, 'id_conflict', met.received_at)) = 0
