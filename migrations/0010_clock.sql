-- What expires is decided by one clock, and that clock may be wrong: a host that comes back weeks ahead would expire everything in
-- one pass. So PostgreSQL's time counts only as far as NATS' clock, which gives every message its time of receipt, bears it out.

create table log_clock (
    only_row boolean primary key default true check (only_row),
    -- What NATS said last.
    at timestamptz not null,
    -- How far PostgreSQL's clock is believed beyond it.
    tolerance interval not null check (tolerance > interval '0')
);
comment on table log_clock is 'NATS'' clock, as enforce-retention read it last. Empty until it runs: then PostgreSQL''s clock is believed.';

-- Both functions below are written so that PostgreSQL puts their bodies into the query that has them in FROM, and plans all of it
-- together, once for a prepared statement: in SQL, stable, returning a table. As a function of its own the cutoff cost a page as
-- much as half of what reading its rows does.

-- The newest message carries NATS' time, too: should enforce-retention stand still, expiry goes on as far as people write.
create function believed_now() returns table (at timestamptz) language sql stable parallel safe as $$
    select coalesce(
        (select least(now(), tolerance + greatest(log_clock.at, (select received_at from messages order by seq desc limit 1)))
           from log_clock where only_row),
        now())
$$;
comment on function believed_now is 'PostgreSQL''s time, but no more than a tolerance beyond NATS''.';

create function room_cutoff(asked text) returns table (cutoff timestamptz) language sql stable parallel safe as $$
    select coalesce(
        (select case when days is null then '-infinity'
                     else (select believed.at from believed_now() as believed) - days * interval '24 hours' end
           from retention
          where room = any(array[asked, '*', case when starts_with(asked, 'dm.') then 'dm.*' end])
          order by room = asked desc, room = 'dm.*' desc limit 1),
        '-infinity')
$$;
comment on function room_cutoff is
    'Of a room as stored: what was received then or before has expired. For FROM: select … from rooms, room_cutoff(rooms.name).';

-- The same as a single value. In PL/pgSQL, which keeps its plans for the session: a function in SQL that cannot be put into the
-- query is planned at every call.
create or replace function cutoff(asked text) returns timestamptz language plpgsql stable parallel safe as $$
begin
    return (select room_cutoff.cutoff from room_cutoff(asked));
end $$;

create or replace function cutoff_ms(asked text) returns bigint language plpgsql stable parallel safe as $$
declare
    at timestamptz := cutoff(asked);
begin
    return case when isfinite(at) then floor(extract(epoch from at) * 1000)::bigint end;
end $$;
