with moved as (
    update users set delivered = $2 where name = $1
), noted as (
    insert into receipt_moves (reader, room, kind, through, at)
    values ($1, null, 'delivered', $2, clock_timestamp())
    on conflict do nothing
)
insert into outbox (first_seq, last_seq, seqs, receipts)
select $2, $2, '{}', jsonb_agg(jsonb_build_object(
    'kind', 'delivered', 'user', $1, 'room', room, 'through', $2))
  from unnest($3::text[]) as room having count(*) > 0
