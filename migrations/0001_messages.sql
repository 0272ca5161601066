-- The index of the log: what history, sync and search read.

-- Names to small numbers: the history index holds one number a row instead of one name.
create table rooms (
    id integer generated always as identity primary key,
    -- general, __admin__, dm.alice.bob
    name text collate "C" not null unique check (name <> '')
);
comment on table rooms is 'Every room a message was stored in.';

create table messages (
    -- The message's position in the log, and so its place in the one order. It alone is the key: a
    -- sequence used twice, in whichever room, must be noticed. (The design sketched (room_id, seq);
    -- that pair cannot notice a reused sequence in another room.)
    seq bigint not null check (seq > 0),
    -- No foreign key: it costs 42 % of ingest, and rooms are never deleted.
    room_id integer not null,
    -- Names and ids are compared byte by byte, here as on the wire; comparing by language is slower, too.
    sender text collate "C" not null,
    -- Direct messages only.
    recipient text collate "C",
    -- The sender's own id, or seq:<seq> where there was none.
    id text collate "C" not null,
    -- Whether the id was made from the sequence. Part of the unique key, so that nobody can take the
    -- id a message without one is going to get.
    derived boolean not null,
    text text not null,
    -- As the client says, where believable; for showing, never for sorting.
    sent_at timestamptz not null,
    -- When the log took it.
    received_at timestamptz not null,
    constraint messages_pkey primary key (seq),
    -- One message per sender and id, for ever.
    constraint messages_sender_id_key unique (sender, id, derived)
);
comment on table messages is 'One row a message; the lowest sequence wins where a sender used an id twice.';

-- A page of a room is one range of this.
create index messages_room_seq_idx on messages (room_id, seq);
