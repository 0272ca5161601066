insert into messages
       (seq, room_id, sender, recipient, id, derived, text, sent_at, received_at, deleted)
select seq, room_id, sender, recipient, id, derived, '', sent_at, received_at, true
  from unnest($1::bigint[], $2::int[], $3::text[], $4::text[], $5::text[], $6::bool[],
              $7::timestamptz[], $8::timestamptz[])
       as target (seq, room_id, sender, recipient, id, derived, sent_at, received_at)
on conflict on constraint messages_sender_id_key do update set text = '', deleted = true
