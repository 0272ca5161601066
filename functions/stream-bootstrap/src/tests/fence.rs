//! Logs that begin again below what is stored: deleted, made by hand, restored; interrupted at every step.

mod outcomes;

use async_nats::{Client, HeaderMap};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{SOON, api, bare, check, log_config, log_with, start, start_with};
use protocol::header;
use protocol::subject::GUARD_SUBJECT;
use testing::{RawClient, World, eventually};

/// Servers with schema and without a log, and the highest sequence stored is 500.
pub(super) async fn without_log() -> (World, Client, PgPool) {
    let world = bare().await;
    start(&world).await.unwrap().stop().await.unwrap();
    let (admin, database) = (world.client("administrator").await, world.database().await);
    api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    store(&database, 500, "zoe", None, 0).await;
    (world, admin, database)
}

/// A row of room `general`, as a worker would store it; its text is erased since.
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
        select $1, id, $2, coalesce($3, 'seq:' || $1), $3 is null, '', now(), 'epoch'::timestamptz + $4 * interval '1 ms'
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

/// When the log took a message, as a worker would store it.
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

/// Publishes and gives the acknowledged sequence.
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

/// A message of the log.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) seq: u64,
    pub(super) subject: String,
    headers: String,
    text: String,
}

/// Everything the log holds. The text is the body's `text`, or the body where there is none.
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

async fn letters(database: &PgPool) -> Vec<(i64, String)> {
    sqlx::query_as("select seq, reason from dead_letters order by seq, reason")
        .fetch_all(database)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_deleted_log_goes_on_above_what_is_stored() {
    let (world, admin, database) = without_log().await;
    let running = start(&world).await.unwrap();
    assert_eq!(
        publish(&admin, "chat.general", &[], &body("ann", "next")).await,
        501
    );
    running.stop().await.unwrap();

    // A dead letter is stored too. And the log's first sequence is no difference to what is shipped.
    api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    sqlx::query(
        "insert into dead_letters (seq, subject, headers, payload, reason, received_at) values (700, 'chat.x', '', 'x', 'not_json', now())",
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
async fn a_log_above_what_is_stored_is_left_alone() {
    let (world, admin, _) = without_log().await;
    api(
        &admin,
        "STREAM.CREATE.CHAT_MESSAGES",
        log_with(json!({"first_seq": 500})),
    )
    .await;
    publish(&admin, "chat.general", &[], &body("ann", "at the fence")).await;
    start(&world).await.unwrap().stop().await.unwrap();
    assert_eq!(texts(&entries(&admin).await), [(500, "at the fence")]);
}

#[tokio::test]
async fn what_nobody_stored_is_appended_again_above_the_fence() {
    let (world, admin, database) = without_log().await;
    // Made by hand, with limits that would drop messages.
    let by_hand = json!({"max_age": 3_600_000_000_000_u64, "discard": "old", "subjects": ["chat.>", "dm.*.*", "admin.*"]});
    api(&admin, "STREAM.CREATE.CHAT_MESSAGES", log_with(by_hand)).await;
    let ann = |text: &str| body("ann", text);
    publish(&admin, "chat.general", &[], &ann("stored")).await;
    store(&database, 1, "ann", None, received_ms(&admin, 1).await).await;
    // The lost log had another message here.
    publish(&admin, "chat.general", &[], &ann("in a reused place")).await;
    store(&database, 2, "ann", None, received_ms(&admin, 2).await - 1).await;
    publish(
        &admin,
        "chat.general",
        &[("Nats-Msg-Id", "three"), ("X-Kept", "yes")],
        &ann("with an id"),
    )
    .await;
    publish(
        &admin,
        "dm.ann.bob",
        &[("Nats-Expected-Last-Sequence", "3")],
        &ann("direct"),
    )
    .await;
    publish(&admin, "chat.general", &[], "no json").await;
    publish(&admin, "chat.general", &[("A", "b")], "dead already").await;
    sqlx::query(
        "insert into dead_letters (seq, subject, headers, payload, reason, received_at)
         values (6, 'chat.general', convert_to(E'NATS/1.0\\r\\nA:  b \\r\\n\\r\\n', 'utf8'), 'dead already', 'not_json', now())",
    )
    .execute(&database)
    .await
    .unwrap();
    let mut raw = RawClient::connect(world.nats(), "administrator").await;
    raw.publish_raw(
        "chat.general",
        None,
        Some(b"NATS/1.0\r\nA B: c\r\n\r\n"),
        b"unreadable",
    )
    .await;
    raw.flush().await.unwrap();
    publish(
        &admin,
        "chat.general",
        &[("Nats-Msg-Id", "zoe-1")],
        &body("zoe", "stored under another sequence"),
    )
    .await;
    store(&database, 490, "zoe", Some("zoe-1"), 0).await;
    publish(
        &admin,
        "chat.history.general",
        &[],
        &ann("a request swallowed"),
    )
    .await;
    assert_eq!(
        publish(&admin, "admin.notice", &[], &ann("to all")).await,
        10
    );

    let running = start(&world).await.unwrap();
    let log = entries(&admin).await;
    let appended = [
        (501, "in a reused place"),
        (502, "with an id"),
        (503, "direct"),
        (504, "no json"),
        (505, "to all"),
    ];
    assert_eq!(texts(&log), appended);
    assert_eq!(
        (log[2].subject.as_str(), log[4].subject.as_str()),
        ("dm.ann.bob", "admin.notice")
    );
    assert!(
        log[1].headers.contains("three") && log[1].headers.contains("X-Kept"),
        "{:?}",
        log[1]
    );
    assert!(
        log.iter()
            .all(|entry| entry.headers.contains(header::ORIGINAL_ID)
                && !entry.headers.contains("Expected")),
        "{log:?}"
    );
    let left = [
        (6, "not_json"),
        (7, "malformed_headers"),
        (9, "unsupported_subject"),
    ];
    assert_eq!(
        letters(&database).await,
        left.map(|(seq, reason)| (seq, reason.to_owned()))
    );
    assert_eq!(
        log_config(&admin).await["subjects"],
        json!(protocol::subject::STREAM_SUBJECTS)
    );
    assert!(check(&world).await.ok);
    running.stop().await.unwrap();

    // A worker reads the id the message came with first.
    let worker = world.spawn("persist-message").await;
    let id = eventually("the message is stored", SOON, async || {
        sqlx::query_scalar::<_, String>("select id from messages where seq = 502")
            .fetch_optional(&database)
            .await
            .unwrap()
    });
    assert_eq!(id.await, "three");
    worker.kill().await;
}

/// The log holds three messages nobody stored, by hand, below the fence.
async fn three_unstored() -> (World, Client, PgPool) {
    let (world, admin, database) = without_log().await;
    api(&admin, "STREAM.CREATE.CHAT_MESSAGES", log_with(json!({}))).await;
    for text in ["one", "two", "three"] {
        publish(&admin, "chat.general", &[], &body("ann", text)).await;
    }
    let config: Value = serde_json::from_str(super::WORKER).unwrap();
    let consumer = json!({"stream_name": "CHAT_MESSAGES", "config": config});
    api(
        &admin,
        "CONSUMER.DURABLE.CREATE.CHAT_MESSAGES.persist-message",
        consumer,
    )
    .await;
    (world, admin, database)
}

/// As the first steps leave it: nothing taken in, nothing delivered.
async fn close(admin: &Client) {
    api(
        admin,
        "STREAM.UPDATE.CHAT_MESSAGES",
        log_with(json!({"subjects": [GUARD_SUBJECT]})),
    )
    .await;
    api(
        admin,
        "CONSUMER.PAUSE.CHAT_MESSAGES.persist-message",
        json!({"pause_until": "2999-01-01T00:00:00Z"}),
    )
    .await;
}

async fn take(database: &PgPool, seq: i64, text: &str) {
    let letter = "
        insert into dead_letters (seq, subject, headers, payload, reason, received_at)
        values ($1, 'chat.general', '', convert_to($2, 'utf8'), 'below_fence', now())";
    sqlx::query(letter)
        .bind(seq)
        .bind(body("ann", text))
        .execute(database)
        .await
        .unwrap();
}

pub(super) async fn lift(admin: &Client) {
    api(admin, "STREAM.PURGE.CHAT_MESSAGES", json!({"seq": 501})).await;
}

async fn finished(world: &World, admin: &Client, database: &PgPool) {
    start(world).await.unwrap().stop().await.unwrap();
    assert_eq!(
        texts(&entries(admin).await),
        [(501, "one"), (502, "two"), (503, "three")]
    );
    assert!(letters(database).await.is_empty());
    assert_eq!(
        log_config(admin).await["subjects"],
        json!(protocol::subject::STREAM_SUBJECTS)
    );
    let consumer = api(
        admin,
        "CONSUMER.INFO.CHAT_MESSAGES.persist-message",
        json!({}),
    )
    .await;
    assert_ne!(consumer["paused"], true, "{consumer}");
}

#[tokio::test]
async fn an_end_after_closing_is_made_good() {
    let (world, admin, database) = three_unstored().await;
    close(&admin).await;
    finished(&world, &admin, &database).await;
}

#[tokio::test]
async fn an_end_while_taking_is_made_good() {
    let (world, admin, database) = three_unstored().await;
    close(&admin).await;
    take(&database, 1, "one").await;
    finished(&world, &admin, &database).await;
}

#[tokio::test]
async fn an_end_after_lifting_is_made_good() {
    let (world, admin, database) = three_unstored().await;
    close(&admin).await;
    for (seq, text) in [(1, "one"), (2, "two"), (3, "three")] {
        take(&database, seq, text).await;
    }
    lift(&admin).await;
    finished(&world, &admin, &database).await;
}

/// The copy that died had appended the first letter and not removed it, and JetStream has forgotten its id since.
#[tokio::test]
async fn an_end_while_appending_appends_nothing_twice() {
    let (world, admin, database) = three_unstored().await;
    close(&admin).await;
    for (seq, text) in [(1, "one"), (2, "two"), (3, "three")] {
        take(&database, seq, text).await;
    }
    lift(&admin).await;
    api(
        &admin,
        "CONSUMER.PAUSE.CHAT_MESSAGES.persist-message",
        json!({}),
    )
    .await;
    api(
        &admin,
        "STREAM.UPDATE.CHAT_MESSAGES",
        log_with(json!({"duplicate_window": 100_000_000})),
    )
    .await;
    let digest: String =
        sqlx::query_scalar("select encode(sha256(sha256(headers) || sha256(payload)), 'hex') from dead_letters where seq = 1")
            .fetch_one(&database)
            .await
            .unwrap();
    let id = format!("fence:1:{digest}");
    assert_eq!(
        publish(
            &admin,
            "chat.general",
            &[("Nats-Msg-Id", &id)],
            &body("ann", "one")
        )
        .await,
        501
    );
    // A later one is forgotten later.
    let probe = async || publish(&admin, "admin.probe", &[("Nats-Msg-Id", "probe")], "{}").await;
    let first = probe().await;
    eventually("JetStream has forgotten the id", SOON, async || {
        (probe().await != first).then_some(())
    })
    .await;
    api(
        &admin,
        "STREAM.PURGE.CHAT_MESSAGES",
        json!({"filter": "admin.probe"}),
    )
    .await;
    start(&world).await.unwrap().stop().await.unwrap();
    let log = entries(&admin).await;
    assert_eq!(
        log.iter()
            .map(|entry| entry.text.as_str())
            .collect::<Vec<&str>>(),
        ["one", "two", "three"]
    );
    assert!(letters(&database).await.is_empty());
}

/// What the server refuses to change stays refused, but the messages are safe first: whoever makes the log anew,
/// as the error says, loses none.
#[tokio::test]
async fn a_log_that_has_to_be_made_anew_is_emptied_first() {
    let (world, admin, database) = without_log().await;
    let by_hand = json!({"storage": "memory", "max_bytes": 1_000_000, "deny_purge": true});
    api(&admin, "STREAM.CREATE.CHAT_MESSAGES", log_with(by_hand)).await;
    publish(&admin, "chat.general", &[], &body("ann", "in memory")).await;
    let line = start(&world).await.unwrap_err().to_string();
    assert!(
        line.contains("refuses to change deny_purge") && line.contains("storage (wanted"),
        "{line}"
    );
    assert_eq!(letters(&database).await, [(1, "below_fence".to_owned())]);
    api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    start(&world).await.unwrap().stop().await.unwrap();
    assert_eq!(texts(&entries(&admin).await), [(501, "in memory")]);
    assert!(letters(&database).await.is_empty());
}

/// The letters stay where they are while the log has no room, and that keeps nobody from starting.
#[tokio::test]
async fn a_full_log_gets_its_letters_later() {
    let (world, admin, database) = without_log().await;
    let folder = world.nats().store_dir().with_file_name("config");
    for (part, name, config) in [
        (
            "streams",
            "CHAT_MESSAGES.json",
            log_with(json!({"max_bytes": 1_000})).to_string(),
        ),
        (
            "consumers",
            "CHAT_MESSAGES.persist-message.json",
            super::WORKER.to_owned(),
        ),
    ] {
        std::fs::create_dir_all(folder.join(part)).unwrap();
        std::fs::write(folder.join(part).join(name), config).unwrap();
    }
    take(&database, 1, &"long ".repeat(300)).await;
    let small = [("BOOTSTRAP_CONFIG", folder.to_str().unwrap())];
    let running = start_with(&world, &small).await.unwrap();
    let found = check(&world).await;
    assert_eq!(
        (
            found.differences[0].field.as_str(),
            &found.differences[0].actual
        ),
        ("below_fence", &json!(1)),
        "{found:?}"
    );
    running.stop().await.unwrap();
    assert_eq!(letters(&database).await, [(1, "below_fence".to_owned())]);
    start(&world).await.unwrap().stop().await.unwrap();
    assert_eq!(
        texts(&entries(&admin).await),
        [(501, "long ".repeat(300).as_str())]
    );
}

/// Killed with -9 again and again, at every step, over messages without ids.
#[tokio::test]
async fn killed_at_every_step_nothing_is_lost_or_doubled() {
    const MESSAGES: usize = 200;
    let (world, admin, database) = without_log().await;
    api(&admin, "STREAM.CREATE.CHAT_MESSAGES", log_with(json!({}))).await;
    for number in 0..MESSAGES {
        publish(
            &admin,
            "chat.general",
            &[],
            &body("ann", &format!("{number}")),
        )
        .await;
    }
    let taken = async || {
        sqlx::query_scalar::<_, i64>("select count(*) from dead_letters")
            .fetch_one(&database)
            .await
            .unwrap()
    };
    let last = async || {
        api(&admin, "STREAM.INFO.CHAT_MESSAGES", json!({})).await["state"]["last_seq"]
            .as_u64()
            .unwrap()
    };
    for step in 0..6 {
        let process = world.launch("stream-bootstrap", &[]);
        eventually("it got as far", SOON, async || {
            let far = match step {
                0 => log_config(&admin).await["subjects"] == json!([GUARD_SUBJECT]),
                1 => taken().await >= 64,
                2 => last().await >= 500,
                3 => last().await >= 510,
                4 => last().await >= 560,
                _ => last().await >= 640,
            };
            far.then_some(())
        })
        .await;
        process.kill().await;
    }
    start(&world).await.unwrap().stop().await.unwrap();
    let log = entries(&admin).await;
    let appended: Vec<&str> = log.iter().map(|entry| entry.text.as_str()).collect();
    assert_eq!(
        appended,
        (0..MESSAGES)
            .map(|number| number.to_string())
            .collect::<Vec<String>>()
    );
    assert_eq!(log[0].seq, 501);
    assert_eq!(taken().await, 0);
}

/// The real thing: the server's files put back from an older copy, and messages acknowledged since.
#[tokio::test]
async fn a_log_restored_from_an_older_backup_loses_nothing() {
    let world = World::builder().administrator().start().await;
    let (admin, database) = (world.client("administrator").await, world.database().await);
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
    let said = (0..5)
        .map(|n| format!("before {n}"))
        .chain((0..10).map(|n| format!("between {n}")))
        .chain((0..5).map(|n| format!("after {n}")));
    assert_eq!(
        texts,
        said.chain(["at last".to_owned()]).collect::<Vec<String>>()
    );
    assert!(letters(&database).await.is_empty());
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
