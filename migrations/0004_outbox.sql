-- What relay-outbox has yet to publish as events. One row a batch, not a message: a row a message in the storing
-- statement halves what can be stored. It holds positions in the log and no text, so there is nothing in it to erase.
create table outbox (
    id bigint generated always as identity primary key,
    -- The lowest and the highest of seqs.
    first_seq bigint not null,
    last_seq bigint not null,
    -- Messages that were stored, or changes that were made: in messages or changes under that position.
    seqs bigint[] not null,
    -- The traceparent of those that are sampled: position and header, pair by pair.
    traced bigint[] not null default '{}',
    traceparents text[] not null default '{}',
    created_at timestamptz not null default now()
);
comment on table outbox is 'Stored and not yet published as events; rows leave when they are.';
create index outbox_first_seq_idx on outbox (first_seq, id);

-- How far events are published: everything of the log up to here. The last event in CHAT_EVENTS says the same; this
-- is for when that stream has dropped it for its age.
create table relayed (
    only_row boolean primary key default true check (only_row),
    seq bigint not null
);
insert into relayed (seq) values (0);
