-- How far behind every step is that PostgreSQL knows of, in one place. What the log holds and nobody stored yet is not here: the log
-- knows, and retention.status says.

-- What has expired waits for nobody; the view is from before messages expired.
create or replace view undelivered as
    select recipient, count(*) as messages, min(received_at) as oldest
      from (select id, cutoff(name) as at from rooms where starts_with(name, 'dm.')) as rooms
      join messages on room_id = rooms.id and received_at > rooms.at
      left join users on users.name = recipient
     where recipient is not null and not deleted and seq > coalesce(users.delivered, 0)
     group by recipient;

create view lag as
    select stage, waiting, oldest, now() - oldest as behind
      from (
        select 'events' as stage, coalesce(sum(cardinality(seqs) + coalesce(jsonb_array_length(receipts), 0)), 0)::bigint as waiting,
               min(created_at) as oldest
          from outbox
        union all
        select 'delivery', coalesce(sum(messages), 0)::bigint, min(oldest) from undelivered
        union all
        select 'dead letters', count(*), min(stored_at) from dead_letters where outcome is null
      ) as stages;
comment on view lag is
    'What waits to be told by relay-outbox, to be delivered to people, to be looked at by an operator; since when. Reads what undelivered reads.';
