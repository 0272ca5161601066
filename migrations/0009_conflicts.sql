-- An id used again for another text is a dead letter, not a silent duplicate; and dead letters are found by sender and id.

alter table dead_letters
    -- The sender and the id as stored, of a letter that holds a whole message; '' for both where it holds none. Null: nobody
    -- has read the letter yet. Hard deletions find the letters they have to empty by these.
    add column sender text collate "C",
    add column message_id text collate "C",
    add constraint dead_letters_named check ((sender is null) = (message_id is null));

create index dead_letters_sender_id_idx on dead_letters (sender, message_id)
    where outcome is distinct from 'erased' and sender <> '';
-- Letters nobody has read yet. persist-message reads them, in bounded pages, before the next hard deletion.
create index dead_letters_unnamed_idx on dead_letters (id)
    where outcome is distinct from 'erased' and sender is null;

-- Whether what somebody said under an id is deleted for good.
create index changes_sender_id_idx on changes (sender, id);

-- The earlier of two messages with one id takes the row from the later one. With the same text the place it leaves is a
-- duplicate's. With another text, the row was the only place that held it: it becomes a dead letter, written from the row,
-- because the headers are not there any more. A deletion of either deletes both, so a tombstone makes no letter.
create or replace function note_displaced() returns trigger language plpgsql as $$
declare
    old_room text;
begin
    if old.deleted or new.deleted or (old.text = new.text and old.room_id = new.room_id) then
        insert into duplicates (seq, sender, id) values (old.seq, old.sender, old.id) on conflict do nothing;
        return null;
    end if;
    select name into old_room from rooms where id = old.room_id;
    insert into dead_letters (seq, subject, headers, payload, reason, detail, received_at, sender, message_id)
    select old.seq,
           case when old.recipient is not null then 'dm.' || old.sender || '.' || old.recipient
                when old_room = '__admin__' then 'admin.' || old.sender
                else 'chat.' || coalesce(old_room, '') end,
           '',
           convert_to(jsonb_build_object('user', old.sender, 'text', old.text, 'id', old.id,
                          'timestamp', (extract(epoch from old.sent_at) * 1000)::bigint)::text, 'UTF8'),
           'id_conflict', 'stored first, and displaced by ' || new.seq, old.received_at, old.sender, old.id
     where not exists (select from dead_letters
                        where seq = old.seq and reason = 'id_conflict' and received_at = old.received_at)
    on conflict do nothing;
    return null;
end $$;

-- Every table has a primary key: logical replication and many tools need one.
alter table receipt_moves add column id bigint generated always as identity primary key;
