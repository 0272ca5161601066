with moved as (
    insert into receipts (reader, room, read) values ($1, $2, $3)
    on conflict (reader, room) do update set read = excluded.read
), noted as (
    insert into receipt_moves (reader, room, kind, through, at)
    values ($1, $2, 'read', $3, clock_timestamp())
    on conflict do nothing
)
insert into outbox (first_seq, last_seq, seqs, receipts)
values ($3, $3, '{}', jsonb_build_array(jsonb_build_object(
    'kind', 'read', 'user', $1, 'room', $2, 'through', $3)))
