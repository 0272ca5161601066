-- What could not be stored, kept whole: the promise is "stored, or here with its reason".
create table dead_letters (
    id bigint generated always as identity primary key,
    seq bigint not null,
    -- U+0000, which PostgreSQL cannot hold, is written as U+FFFD.
    subject text not null,
    -- The header block as it was, NATS/1.0 and all; empty when there was none.
    headers bytea not null,
    payload bytea not null,
    -- From the fixed list in shared/wire/src/reason.rs.
    reason text not null,
    -- What the operator needs beyond the reason; never a message's text.
    detail text not null default '',
    received_at timestamptz not null,
    stored_at timestamptz not null default now()
);
comment on table dead_letters is 'Messages of the log that cannot be stored, with raw bytes and reason.';

-- A redelivery finds its own letter here. The bytes are part of the key because a sequence may be used
-- twice when a stream is made anew, and then both letters must stay.
create unique index dead_letters_seq_key on dead_letters (seq, reason, sha256(headers), sha256(payload));
create index dead_letters_reason_idx on dead_letters (reason, id);
