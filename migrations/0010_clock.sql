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

-- The newest message carries NATS' time, too: should enforce-retention stand still, expiry goes on as far as people write.
create function believed_now() returns timestamptz language plpgsql stable parallel safe as $$
begin
    return coalesce(
        (select least(now(), tolerance + greatest(at, (select received_at from messages order by seq desc limit 1))) from log_clock),
        now());
end $$;
comment on function believed_now is 'PostgreSQL''s time, but no more than a tolerance beyond NATS''.';

-- In PL/pgSQL, which keeps its plans for the session: a function in SQL that is not inlined is planned at every call, which
-- was half of the time of a page.
create or replace function cutoff(asked text) returns timestamptz language plpgsql stable parallel safe as $$
begin
    return coalesce(
        (select case when days is null then '-infinity' else believed_now() - days * interval '24 hours' end
           from retention
          where room in (asked, '*') or (room = 'dm.*' and starts_with(asked, 'dm.'))
          order by room = asked desc, room = 'dm.*' desc limit 1),
        '-infinity');
end $$;

create or replace function cutoff_ms(asked text) returns bigint language plpgsql stable parallel safe as $$
declare
    at timestamptz := cutoff(asked);
begin
    return case when isfinite(at) then floor(extract(epoch from at) * 1000)::bigint end;
end $$;
