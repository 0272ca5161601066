with made as (
    insert into changes
           (seq, room_id, target, sender, id, mode, changed_by, received_at, recipient)
    select * from unnest($1::bigint[], $2::int[], $3::bigint[], $4::text[], $5::text[], $6::text[],
                         $7::text[], $8::timestamptz[], $11::text[])
    on conflict (seq) do nothing
    returning seq
), noted as (
    insert into outbox (first_seq, last_seq, seqs, traced, traceparents)
    select min(seq), max(seq), array_agg(seq), $9::bigint[], $10::text[]
      from made having count(*) > 0
)
select count(*) from made
