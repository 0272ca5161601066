-- $1: the sequences of the expired messages.
--
-- Deletes them together with their deletions and with what is known of their duplicates in the
-- stream. The caller erases those duplicates from the stream, because otherwise a replay would
-- store one of them as if it were new.
with gone as (
    delete from messages where seq = any($1)
    returning seq, room_id, sender, id, derived, received_at
), changed as (
    delete from changes using gone
     where changes.target = gone.seq and (changes.sender, changes.id) = (gone.sender, gone.id)
    returning changes.seq
), duplicate as (
    delete from duplicates using gone
     where (duplicates.sender, duplicates.id) = (gone.sender, gone.id) and not gone.derived
    returning duplicates.seq, duplicates.sender, duplicates.id
), noted as (
    update swept set seq = greatest(swept.seq, (select max(gone.seq) from gone),
                                    (select max(changed.seq) from changed),
                                    (select max(duplicate.seq) from duplicate))
)
select (select count(*) from gone), array(select distinct room_id from gone),
       (select floor(extract(epoch from max(received_at)) * 1000)::bigint from gone),
       array(select seq from duplicate order by seq),
       array(select sender from duplicate order by seq),
       array(select id from duplicate order by seq)
