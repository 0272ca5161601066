-- What the Nats-Msg-Id of a message is made with that was sent with an id of the sender's own. JetStream finds duplicates
-- by it in the whole stream, and a publisher may choose any: whoever does not know the secret cannot take somebody's id first.
create table send_secret (
    only_row boolean primary key default true check (only_row),
    secret bytea not null default uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
);
comment on table send_secret is 'Of send-message alone; where it is lost, a new one is made.';
insert into send_secret default values;
