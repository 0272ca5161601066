//! Streams that start again below what is stored, because they were deleted, created by hand or
//! restored.

mod interrupted;
mod outcomes;
mod salvage;

use async_nats::{Client, HeaderMap};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{SOON, api, bare, check, start, stream_with};
use protocol::subject::GUARD_SUBJECT;
use testing::{World, eventually};

/// Servers with the schema and without the stream; the highest sequence stored is 500.
pub(super) async fn without_stream() -> (World, Client, PgPool) {
    let world = bare().await;
    start(&world).await.unwrap().stop().await.unwrap();
    let admin = world.client("administrator").await;
    let database = world.database().await;
    api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    store(&database, 500, "zoe", None, 0).await;
    (world, admin, database)
}

/// Stores a row of room `general` as a worker would; its text was erased later.
pub(super) async fn store(
    database: &PgPool,
    seq: i64,
    sender: &str,
    id: Option<&str>,
    received_ms: i64,
) {
    sqlx::query("insert into rooms (name) values ('general') on conflict do nothing")
        .execute(database)
        .await
        .unwrap();
    let row = "
        insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
        select $1, id, $2, coalesce($3, 'seq:' || $1), $3 is null, '', now(),
               'epoch'::timestamptz + $4 * interval '1 ms'
          from rooms where name = 'general'";
    sqlx::query(row)
        .bind(seq)
        .bind(sender)
        .bind(id)
        .bind(received_ms)
        .execute(database)
        .await
        .unwrap();
}

/// When the stream received a message, as a worker would store it.
pub(super) async fn received_ms(admin: &Client, seq: u64) -> i64 {
    let stream = async_nats::jetstream::new(admin.clone())
        .get_stream("CHAT_MESSAGES")
        .await
        .unwrap();
    let message = stream.get_raw_message(seq).await.unwrap();
    (message.time.unix_timestamp_nanos() / 1_000_000)
        .try_into()
        .unwrap()
}

pub(super) fn body(user: &str, text: &str) -> String {
    json!({"user": user, "text": text}).to_string()
}

/// Publishes, and returns the acknowledged sequence.
pub(super) async fn publish(
    client: &Client,
    subject: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> u64 {
    let mut map = HeaderMap::new();
    headers
        .iter()
        .for_each(|(name, value)| map.insert(*name, *value));
    let reply = client
        .request_with_headers(subject.to_owned(), map, body.to_owned().into())
        .await
        .unwrap();
    let ack: Value = serde_json::from_slice(&reply.payload).unwrap();
    ack["seq"].as_u64().unwrap_or_else(|| panic!("{ack}"))
}

/// A message of the stream.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) seq: u64,
    pub(super) subject: String,
    headers: String,
    text: String,
}

/// Everything the stream holds. The text is the body's `text`, or the whole body if it has none.
pub(super) async fn entries(admin: &Client) -> Vec<Entry> {
    let mut found = Vec::new();
    let stream = async_nats::jetstream::new(admin.clone())
        .get_stream("CHAT_MESSAGES")
        .await
        .unwrap();
    let state = stream.cached_info().state.clone();
    for seq in state.first_sequence..=state.last_sequence {
        let Ok(message) = stream.get_raw_message(seq).await else {
            continue;
        };
        let body: Value = serde_json::from_slice(&message.payload).unwrap_or_default();
        let text = body["text"].as_str().map_or_else(
            || String::from_utf8_lossy(&message.payload).into_owned(),
            str::to_owned,
        );
        let headers = format!("{:?}", message.headers);
        found.push(Entry {
            seq,
            subject: message.subject.to_string(),
            headers,
            text,
        });
    }
    found
}

pub(super) fn texts(entries: &[Entry]) -> Vec<(u64, &str)> {
    entries
        .iter()
        .map(|entry| (entry.seq, entry.text.as_str()))
        .collect()
}

async fn dead_letters(database: &PgPool) -> Vec<(i64, String)> {
    sqlx::query_as("select seq, reason from dead_letters order by seq, reason")
        .fetch_all(database)
        .await
        .unwrap()
}

/// A stream created by hand, with three messages below the guard that nobody stored.
async fn three_unstored() -> (World, Client, PgPool) {
    let (world, admin, database) = without_stream().await;
    api(
        &admin,
        "STREAM.CREATE.CHAT_MESSAGES",
        stream_with(json!({})),
    )
    .await;
    for text in ["one", "two", "three"] {
        publish(&admin, "chat.general", &[], &body("ann", text)).await;
    }
    let config: Value = serde_json::from_str(crate::tests::CONSUMER_JSON).unwrap();
    let consumer = json!({"stream_name": "CHAT_MESSAGES", "config": config});
    api(
        &admin,
        "CONSUMER.DURABLE.CREATE.CHAT_MESSAGES.persist-message",
        consumer,
    )
    .await;
    (world, admin, database)
}

/// The state after the first two steps: the stream is closed and the consumer paused.
async fn close(admin: &Client) {
    api(
        admin,
        "STREAM.UPDATE.CHAT_MESSAGES",
        stream_with(json!({"subjects": [GUARD_SUBJECT]})),
    )
    .await;
    api(
        admin,
        "CONSUMER.PAUSE.CHAT_MESSAGES.persist-message",
        json!({"pause_until": "2999-01-01T00:00:00Z"}),
    )
    .await;
}

async fn salvage(database: &PgPool, seq: i64, text: &str) {
    let dead_letter = "
        insert into dead_letters (seq, subject, headers, payload, reason, received_at)
        values ($1, 'chat.general', '', convert_to($2, 'utf8'), 'below_fence', now())";
    sqlx::query(dead_letter)
        .bind(seq)
        .bind(body("ann", text))
        .execute(database)
        .await
        .unwrap();
}

pub(super) async fn advance(admin: &Client) {
    api(admin, "STREAM.PURGE.CHAT_MESSAGES", json!({"seq": 501})).await;
}

#[tokio::test]
async fn a_deleted_stream_continues_above_what_is_stored() {
    let (world, admin, database) = without_stream().await;
    let running = start(&world).await.unwrap();
    assert_eq!(
        publish(&admin, "chat.general", &[], &body("ann", "next")).await,
        501
    );
    running.stop().await.unwrap();

    // Dead letters count as stored. And the stream's first sequence does not count as a difference.
    api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    sqlx::query(
        "insert into dead_letters (seq, subject, headers, payload, reason, received_at)
         values (700, 'chat.x', '', 'x', 'not_json', now())",
    )
    .execute(&database)
    .await
    .unwrap();
    let running = start(&world).await.unwrap();
    assert!(check(&world).await.ok);
    running.stop().await.unwrap();
    start(&world).await.unwrap().stop().await.unwrap();
    assert_eq!(
        publish(&admin, "chat.general", &[], &body("ann", "next")).await,
        701
    );
}

#[tokio::test]
async fn a_stream_above_what_is_stored_is_left_alone() {
    let (world, admin, _) = without_stream().await;
    api(
        &admin,
        "STREAM.CREATE.CHAT_MESSAGES",
        stream_with(json!({"first_seq": 500})),
    )
    .await;
    publish(&admin, "chat.general", &[], &body("ann", "at the guard")).await;
    start(&world).await.unwrap().stop().await.unwrap();
    assert_eq!(texts(&entries(&admin).await), [(500, "at the guard")]);
}

/// The server refuses to change some fields, but the messages are saved first. An operator who
/// recreates the stream, as the error suggests, loses none.
#[tokio::test]
async fn a_stream_that_has_to_be_recreated_is_salvaged_first() {
    let (world, admin, database) = without_stream().await;
    let by_hand = json!({"storage": "memory", "max_bytes": 1_000_000, "deny_purge": true});
    api(&admin, "STREAM.CREATE.CHAT_MESSAGES", stream_with(by_hand)).await;
    publish(&admin, "chat.general", &[], &body("ann", "in memory")).await;
    let line = start(&world).await.unwrap_err().to_string();
    assert!(
        line.contains("refuses to change deny_purge") && line.contains("storage (wanted"),
        "{line}"
    );
    assert_eq!(
        dead_letters(&database).await,
        [(1, "below_fence".to_owned())]
    );
    api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    start(&world).await.unwrap().stop().await.unwrap();
    assert_eq!(texts(&entries(&admin).await), [(501, "in memory")]);
    assert!(dead_letters(&database).await.is_empty());
}

/// A real restore: the server's files are replaced by an older backup, after more messages were
/// acknowledged.
#[tokio::test]
async fn a_stream_restored_from_an_older_backup_loses_nothing() {
    let world = World::builder().administrator().start().await;
    let admin = world.client("administrator").await;
    let database = world.database().await;
    let say = async |text: String| publish(&admin, "chat.general", &[], &body("ann", &text)).await;
    let stored = async |count: i64| {
        eventually("all is stored", SOON, async || {
            let rows: i64 = sqlx::query_scalar("select count(*) from messages")
                .fetch_one(&database)
                .await
                .unwrap();
            (rows == count).then_some(())
        })
        .await;
    };
    let worker = world.spawn("persist-message").await;
    for number in 0..5 {
        say(format!("before {number}")).await;
    }
    stored(5).await;
    let backup = world.nats().store_dir().with_file_name("backup");
    world.nats().stop().await;
    copy(&world.nats().store_dir(), &backup);
    world.nats().start().await;
    eventually("connected again", SOON, async || admin.flush().await.ok()).await;
    for number in 0..10 {
        say(format!("between {number}")).await;
    }
    stored(15).await;
    worker.kill().await;

    world.nats().stop().await;
    std::fs::remove_dir_all(world.nats().store_dir()).unwrap();
    copy(&backup, &world.nats().store_dir());
    world.nats().start().await;
    eventually("connected again", SOON, async || admin.flush().await.ok()).await;
    for number in 0..5 {
        assert_eq!(say(format!("after {number}")).await, 6 + number);
    }
    start(&world).await.unwrap().stop().await.unwrap();
    let worker = world.spawn("persist-message").await;
    stored(20).await;
    assert_eq!(say("at last".to_owned()).await, 21);
    stored(21).await;
    let texts: Vec<String> = sqlx::query_scalar("select text from messages order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    let expected = (0..5)
        .map(|n| format!("before {n}"))
        .chain((0..10).map(|n| format!("between {n}")))
        .chain((0..5).map(|n| format!("after {n}")));
    assert_eq!(
        texts,
        expected
            .chain(["at last".to_owned()])
            .collect::<Vec<String>>()
    );
    assert!(dead_letters(&database).await.is_empty());
    worker.kill().await;
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    assert!(
        std::process::Command::new("cp")
            .arg("-r")
            .arg(from)
            .arg(to)
            .status()
            .unwrap()
            .success()
    );
}
