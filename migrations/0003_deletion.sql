-- Deletions. A tombstone is a row of messages: it keeps the place, the sender and the id, and blocks the message from
-- being stored (again), whichever of the two arrives first. So no order of arrival can bring a text back, and storing
-- does not have to look for deletions.
alter table messages add column deleted boolean not null default false;

-- What happened to messages, in the order of the log: what sync tells a client that was away.
create table changes (
    -- The change's own position in the log.
    seq bigint primary key check (seq > 0),
    room_id integer not null,
    -- The message: its position, sender and id.
    target bigint not null,
    sender text collate "C" not null,
    id text collate "C" not null,
    -- soft: the text is gone from what anybody reads; hard: from the log, the index and the dead letters, too.
    mode text not null check (mode in ('soft', 'hard')),
    -- Who asked for it: the sender, or a moderator.
    changed_by text collate "C" not null,
    -- When the log took the change.
    received_at timestamptz not null
);
comment on table changes is 'Deletions, by their position in the log.';
create index changes_room_seq_idx on changes (room_id, seq);
-- Whether a message is erased already.
create index changes_target_idx on changes (target);

-- Where the log holds a message again that is stored already: erasing its text has to reach these places, too.
create table duplicates (
    seq bigint primary key,
    sender text collate "C" not null,
    id text collate "C" not null
);
comment on table duplicates is 'Positions in the log whose sender and id are stored under another one.';
create index duplicates_sender_id_idx on duplicates (sender, id);

-- A copy may store the later of two messages with one id first; when the earlier one takes the row, the place it
-- leaves is a duplicate's. Rare, and nothing else updates seq: inserting costs nothing for this.
create function note_displaced() returns trigger language plpgsql as $$
begin
    insert into duplicates (seq, sender, id) values (old.seq, old.sender, old.id) on conflict do nothing;
    return null;
end $$;
create trigger messages_displaced after update of seq on messages
    for each row when (old.seq is distinct from new.seq) execute function note_displaced();
