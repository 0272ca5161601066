-- $1: up to where messages are published; $2: rows; $3: events.
--
-- In the order in which the cursors advanced, except that a row about a message that is not
-- published yet does not hold up the others.
select due.id, created_at, kind, "user", room, through
  from (select id, first_seq, created_at, receipts,
               sum(jsonb_array_length(receipts)) over w - jsonb_array_length(receipts) < $3 as fits
          from (select id, first_seq, created_at, receipts from outbox
                 where receipts is not null and first_seq <= $1 order by id limit $2) as candidate
        window w as (order by id)) as due,
       jsonb_to_recordset(receipts) as receipt (kind text, "user" text, room text, through bigint)
 where fits order by due.id
