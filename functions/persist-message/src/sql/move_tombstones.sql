update messages
   set seq = target.seq, room_id = target.room_id, recipient = target.recipient,
       sent_at = target.sent_at, received_at = target.received_at
  from unnest($1::bigint[], $2::int[], $3::text[], $4::text[], $5::text[], $6::bool[],
              $7::timestamptz[], $8::timestamptz[])
       as target (seq, room_id, sender, recipient, id, derived, sent_at, received_at)
 cross join lateral (
       select ctid as place from messages
        where (messages.sender, messages.id, messages.derived)
              = (target.sender, target.id, target.derived)
       offset 0) as found
 where messages.ctid = found.place
   and messages.seq > target.seq and messages.received_at >= target.received_at
   and (select count(*) from messages as other where other.seq = target.seq) = 0
