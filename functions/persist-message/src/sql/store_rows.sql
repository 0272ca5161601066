with letters as (
    insert into dead_letters
           (seq, subject, headers, payload, reason, detail, received_at, sender, message_id)
    select * from unnest($10::bigint[], $11::text[], $12::bytea[], $13::bytea[], $14::text[],
                         $15::text[], $16::timestamptz[], $19::text[], $20::text[])
    on conflict do nothing
), stored as (
    insert into messages
           (seq, room_id, sender, recipient, id, derived, text, sent_at, received_at)
    select * from unnest($1::bigint[], $2::int[], $3::text[], $4::text[], $5::text[], $6::bool[],
                         $7::text[], $8::timestamptz[], $9::timestamptz[])
    on conflict on constraint messages_sender_id_key do update
       set seq = excluded.seq, room_id = excluded.room_id, recipient = excluded.recipient,
           text = case when messages.deleted then '' else excluded.text end,
           sent_at = excluded.sent_at, received_at = excluded.received_at
     where messages.seq > excluded.seq and messages.received_at >= excluded.received_at
    returning seq, deleted
), noted as (
    insert into outbox (first_seq, last_seq, seqs, traced, traceparents)
    select min(seq), max(seq), array_agg(seq), $17::bigint[], $18::text[]
      from stored having count(*) > 0
)
select count(*), coalesce(array_agg(seq) filter (where deleted), '{}') from stored
