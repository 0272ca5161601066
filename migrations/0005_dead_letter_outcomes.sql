-- A dead letter leaves the list of what is waiting with an outcome, never without; the row stays.
alter table dead_letters
    -- retried: appended to the log again, as outcome_seq. dropped: an operator decided so. erased: its text was deleted
    -- by its author; headers and payload are empty.
    add column outcome text check (outcome in ('retried', 'dropped', 'erased')),
    add column outcome_at timestamptz,
    add column outcome_seq bigint,
    add constraint dead_letters_outcome_time check ((outcome is null) = (outcome_at is null));

-- Erased letters are all alike, and may be more than one.
drop index dead_letters_seq_key;
create unique index dead_letters_seq_key on dead_letters (seq, reason, sha256(headers), sha256(payload))
    where outcome is distinct from 'erased';
create index dead_letters_waiting_idx on dead_letters (id) where outcome is null;
