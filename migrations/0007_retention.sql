-- How long messages are kept, counted from when the log took them.
create table retention (
    -- A room as stored; 'dm.*' for direct messages without a row of their own, '*' for whatever has none. Neither is
    -- the name of a conversation that could have a row of its own.
    room text collate "C" primary key check (room <> ''),
    -- Null: for ever.
    days integer check (days > 0)
);
comment on table retention is 'Days a room''s messages are kept; null is for ever. The row ''*'' is EXPIRE_DAYS of enforce-retention.';
-- enforce-retention writes its EXPIRE_DAYS here when it starts.
insert into retention (room, days) values ('*', 30);

-- What was received at this time or before has expired, whether it was swept already or not. Every reader asks this, so that
-- a message vanishes at its time. Without any row nothing expires: a mistake must not cost messages.
create function cutoff(asked text) returns timestamptz language sql stable parallel safe as $$
    select coalesce(
        (select case when days is null then '-infinity' else now() - days * interval '24 hours' end
           from retention
          where room in (asked, '*') or (room = 'dm.*' and starts_with(asked, 'dm.'))
          order by room = asked desc, room = 'dm.*' desc limit 1),
        '-infinity')
$$;
comment on function cutoff is 'Of a room as stored: what was received then or before has expired.';

-- The same in Unix milliseconds, for what is read from the log; null where nothing expires.
create function cutoff_ms(asked text) returns bigint language sql stable parallel safe as $$
    select case when isfinite(cutoff(asked)) then floor(extract(epoch from cutoff(asked)) * 1000)::bigint end
$$;

-- The highest position that was ever swept. Without it a log made anew after everything expired would give out the
-- positions again, which clients hold as cursors.
create table swept (
    only_row boolean primary key default true check (only_row),
    seq bigint not null
);
insert into swept (seq) values (0);

-- Expired messages are found by position, which is the order of receipt: no index on received_at, which every message
-- that is stored would pay for.

create view expired_messages as
    select rooms.name as room, count(*) as messages, min(seq) as first_seq, max(seq) as last_seq, min(received_at) as oldest
      from (select id, name, cutoff(name) as at from rooms) as rooms
      join messages on room_id = rooms.id and received_at <= rooms.at
     group by rooms.name;
comment on view expired_messages is
    'What has expired and is not swept yet, by room: invisible already, and gone soon. Looks at every message; for now and then.';

create view kept_messages as
    select rooms.name as room, count(*) as messages, min(seq) as first_seq, max(seq) as last_seq,
           min(received_at) as oldest, max(received_at) as newest, nullif(rooms.at, '-infinity') as cutoff
      from (select id, name, cutoff(name) as at from rooms) as rooms
      join messages on room_id = rooms.id and received_at > rooms.at
     group by rooms.name, rooms.at;
comment on view kept_messages is
    'What readers find, by room, and since when; cutoff is null where nothing expires. Looks at every message; for now and then.';
