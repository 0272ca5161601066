-- $1: the sequences of expired deletions whose message is gone, or never came.
--
-- Returns the same columns as expire_delete.sql.
with gone as (
    delete from changes where seq = any($1) returning seq, room_id, received_at
), noted as (
    update swept set seq = greatest(swept.seq, (select max(gone.seq) from gone))
)
select count(*), array(select distinct room_id from gone),
       floor(extract(epoch from max(received_at)) * 1000)::bigint,
       '{}'::bigint[], '{}'::text[], '{}'::text[]
  from gone
