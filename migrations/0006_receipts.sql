-- Receipts: how far people have got. The log knows nothing of them; they stand here only, and come back with a backup of
-- this database, not with a replay of the log.

create table users (
    name text collate "C" primary key check (name <> ''),
    first_seen timestamptz not null default now(),
    -- At most a minute behind.
    last_seen timestamptz not null default now(),
    -- The mark "delivered": every direct message to this user up to here was confirmed, whoever sent it.
    delivered bigint not null default 0 check (delivered >= 0)
);
comment on table users is 'Everybody who was seen, and how far their direct messages are delivered.';

create table receipts (
    reader text collate "C" not null,
    -- By name, not by the number in rooms: what was sent can be read before it is stored, and a database that was rebuilt
    -- gives other numbers.
    room text collate "C" not null,
    -- The mark "read": everything of the room up to here.
    read bigint not null check (read >= 0),
    constraint receipts_pkey primary key (reader, room)
);
comment on table receipts is 'How far each user has read each conversation.';

-- When each mark moved. A message was delivered, or read, when the mark first reached its position.
create table receipt_moves (
    reader text collate "C" not null,
    -- Null for delivered, which is a mark over all conversations.
    room text collate "C",
    kind text not null check (kind in ('delivered', 'read')),
    through bigint not null,
    at timestamptz not null,
    constraint receipt_moves_room check ((kind = 'delivered') = (room is null))
);
comment on table receipt_moves is 'Every move of a mark, with its time.';
-- Marks only move forward, so one position is reached once.
create unique index receipt_moves_key on receipt_moves (reader, room, through) nulls not distinct;

-- What is waiting for somebody. Partial, so that a message to a room costs nothing for it.
create index messages_recipient_seq_idx on messages (recipient, seq) where recipient is not null;
-- What somebody has not read, conversation by conversation; a tombstone is nothing to read.
create index messages_recipient_room_seq_idx on messages (recipient, room_id, seq) where recipient is not null and not deleted;

-- To whom the deleted message was, so that an inbox finds its deletions in one range.
alter table changes add column recipient text collate "C";
update changes set recipient = messages.recipient from messages where messages.seq = changes.target;
create index changes_recipient_seq_idx on changes (recipient, seq) where recipient is not null;

-- How far some people have got in a conversation; for get-history and sync-messages.
create function marks(room_name text, people text[]) returns table (person text, delivered bigint, read bigint)
language sql stable as $$
    select asked.person, coalesce(users.delivered, 0), coalesce(receipts.read, 0)
      from unnest(people) as asked (person)
      left join users on users.name = asked.person
      left join receipts on (receipts.reader, receipts.room) = (asked.person, room_name)
$$;

-- Receipts have no position in the log of their own. Such a row has no seqs; first_seq and last_seq are the mark, so that its
-- events come after those of the messages they are about.
alter table outbox
    -- [{"kind": "delivered" | "read", "user", "room", "through"}]
    add column receipts jsonb;
drop index outbox_first_seq_idx;
create index outbox_first_seq_idx on outbox (first_seq, id) where receipts is null;
create index outbox_receipts_idx on outbox (first_seq, id) where receipts is not null;
create index outbox_receipts_id_idx on outbox (id) where receipts is not null;

-- The questions operators ask.
create view direct_messages as
    select messages.seq, rooms.name as room, sender, recipient, deleted, sent_at, received_at,
           case when messages.seq <= receipts.read then 'read'
                when messages.seq <= users.delivered then 'delivered'
                else 'sent' end as status
      from messages
      join rooms on rooms.id = messages.room_id
      left join users on users.name = recipient
      left join receipts on (receipts.reader, receipts.room) = (recipient, rooms.name)
     where recipient is not null;
comment on view direct_messages is 'Every direct message and how far it came, without its text.';

create view undelivered as
    select recipient, count(*) as messages, min(received_at) as oldest
      from messages left join users on users.name = recipient
     where recipient is not null and not deleted and seq > coalesce(users.delivered, 0)
     group by recipient;
comment on view undelivered is 'How much waits for each user. Reads every direct message that waits.';
