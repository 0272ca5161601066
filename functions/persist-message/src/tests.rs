//! The worker as its publishers and operators see it, on real servers.

mod change;
mod conflict;
mod copies;
mod erase;
mod letters;
mod plans;
mod refused;
mod seen;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use async_nats::Client;
use async_nats::header::HeaderMap;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::function;
use service::config::Vars;
use service::function::Running;
use testing::{RawClient, SOON, World, eventually};

/// What the promise of one bad message among a hundred good ones allows.
const WITHIN: Duration = Duration::from_secs(5);

async fn worker(world: &World) -> Running {
    function()
        .start(Vars::from_pairs(world.vars("persist-message")))
        .await
        .unwrap()
}

/// Publishes with JetStream's acknowledgement; the sequence, and whether JetStream knew the id.
async fn publish(client: &Client, subject: &str, id: Option<&str>, body: &str) -> (u64, bool) {
    let mut headers = HeaderMap::new();
    if let Some(id) = id {
        headers.insert(protocol::header::MESSAGE_ID, id);
    }
    let ack = client
        .request_with_headers(subject.to_owned(), headers, body.to_owned().into())
        .await
        .unwrap();
    let ack: Value = serde_json::from_slice(&ack.payload).unwrap();
    assert!(ack.get("error").is_none(), "{ack}");
    (
        ack["seq"].as_u64().unwrap(),
        ack["duplicate"].as_bool().unwrap_or(false),
    )
}

async fn count(database: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(database).await.unwrap()
}

async fn stored(database: &PgPool, wanted: i64, within: Duration) {
    eventually(&format!("{wanted} messages stored"), within, async || {
        (count(database, "select count(*) from messages").await == wanted).then_some(())
    })
    .await;
}

/// Deliveries that another replica has, and does nothing with.
async fn taken(world: &World, messages: usize) -> (RawClient, Vec<testing::RawMessage>) {
    let mut other = RawClient::connect(world.nats(), "persist-message").await;
    let inbox = other.inbox();
    other.subscribe(&inbox).await;
    other
        .publish_raw(
            protocol::js_api::CONSUMER_NEXT,
            Some(&inbox),
            None,
            messages.to_string().as_bytes(),
        )
        .await;
    let mut held = Vec::new();
    while held.len() < messages {
        held.push(other.next(SOON).await.unwrap());
    }
    (other, held)
}

async fn give_back(client: &mut RawClient, message: &testing::RawMessage) {
    client
        .publish_raw(message.reply.as_deref().unwrap(), None, None, b"-NAK")
        .await;
}

/// Somebody waits for a lock, in a statement that holds `part`.
async fn blocked(database: &PgPool, part: &'static str) {
    eventually("a statement waits for a lock", SOON, async || {
        let waiting: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
              where datname = current_database() and wait_event_type = 'Lock' and position($1 in query) > 0",
        )
        .bind(part)
        .fetch_one(database)
        .await
        .unwrap();
        (waiting > 0).then_some(())
    })
    .await;
}

/// Everything acknowledged: the consumer has nothing left to do.
async fn settled(world: &World) -> Value {
    let operator = world.client("operator").await;
    eventually("everything acknowledged", SOON, async || {
        let info = operator
            .request(protocol::js_api::CONSUMER_INFO, "".into())
            .await
            .ok()?;
        let info: Value = serde_json::from_slice(&info.payload).ok()?;
        (info["num_pending"] == 0 && info["num_ack_pending"] == 0).then_some(info)
    })
    .await
}

/// Waits until the log has `messages`: while nats-server flushes what was published it delivers nothing.
async fn logged(client: &Client, messages: usize) {
    eventually("the log has them", 3 * SOON, async || {
        let state = client
            .request(protocol::js_api::STREAM_INFO, "".into())
            .await
            .unwrap();
        let state: Value = serde_json::from_slice(&state.payload).unwrap();
        (state["state"]["last_seq"] == messages).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_message_is_stored_as_it_was_sent() {
    let world = World::start().await;
    let worker = worker(&world).await;
    let (publisher, database) = (world.client("publisher").await, world.database().await);
    let (seq, _) = publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"grüß dich","timestamp":1600000000123,"id":"a-1"}"#,
    )
    .await;
    publish(
        &publisher,
        "admin.alerts",
        None,
        r#"{"user":"root","text":"disk"}"#,
    )
    .await;
    publish(
        &publisher,
        "dm.bob.alice",
        None,
        r#"{"user":"bob","text":"psst"}"#,
    )
    .await;
    stored(&database, 3, SOON).await;
    type Stored = (
        i64,
        String,
        String,
        Option<String>,
        String,
        bool,
        String,
        i64,
    );
    let rows: Vec<Stored> = sqlx::query_as(
        "select m.seq, r.name, sender, recipient, m.id, derived, text, (extract(epoch from sent_at) * 1000)::bigint
           from messages m join rooms r on r.id = m.room_id order by seq",
    )
    .fetch_all(&database)
    .await
    .unwrap();
    let own = |row: usize| {
        (
            rows[row].1.as_str(),
            rows[row].2.as_str(),
            rows[row].3.as_deref(),
            rows[row].4.as_str(),
            rows[row].5,
        )
    };
    assert_eq!(own(0), ("general", "ann", None, "a-1", false));
    assert_eq!(
        (rows[0].0, rows[0].6.as_str(), rows[0].7),
        (seq as i64, "grüß dich", 1_600_000_000_123)
    );
    assert_eq!(
        own(1),
        (
            "__admin__",
            "root",
            None,
            format!("seq:{}", seq + 1).as_str(),
            true
        )
    );
    assert_eq!(
        own(2),
        (
            "dm.alice.bob",
            "bob",
            Some("alice"),
            format!("seq:{}", seq + 2).as_str(),
            true
        )
    );
    settled(&world).await;
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn an_id_is_stored_once_per_sender() {
    let world = World::start().await;
    let (publisher, database) = (world.client("publisher").await, world.database().await);
    let body =
        |user: &str, text: &str| json!({"user": user, "text": text, "id": "same"}).to_string();
    let (first, _) = publish(
        &publisher,
        "chat.general",
        Some("ann:same"),
        &body("ann", "first"),
    )
    .await;
    // Inside JetStream's window the log itself does not take it again.
    assert_eq!(
        publish(
            &publisher,
            "chat.general",
            Some("ann:same"),
            &body("ann", "again")
        )
        .await,
        (first, true)
    );
    // Outside of it, the header's id is as good as forgotten.
    publish(&publisher, "chat.general", None, &body("ann", "much later")).await;
    publish(
        &publisher,
        "chat.other",
        None,
        &body("ann", "in another room"),
    )
    .await;
    let (bobs, _) = publish(
        &publisher,
        "chat.general",
        None,
        &body("bob", "another sender"),
    )
    .await;
    let worker = worker(&world).await;
    settled(&world).await;
    let rows: Vec<(i64, String)> = sqlx::query_as("select seq, text from messages order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(
        rows,
        [
            (first as i64, "first".to_owned()),
            (bobs as i64, "another sender".to_owned())
        ]
    );
    // Now each in a batch of its own: the database has to know.
    publish(&publisher, "chat.general", None, &body("ann", "tomorrow")).await;
    settled(&world).await;
    assert_eq!(count(&database, "select count(*) from messages").await, 2);
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn the_lower_sequence_stays_whichever_copy_was_faster() {
    let world = World::start().await;
    let (publisher, database) = (world.client("publisher").await, world.database().await);
    let (first, _) = publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"first","id":"x"}"#,
    )
    .await;
    // As if another copy had already stored the second message with that id.
    sqlx::query("insert into rooms (name) values ('general')")
        .execute(&database)
        .await
        .unwrap();
    sqlx::query(
        "insert into messages select $1, 1, 'ann', null, 'x', false, 'second', now(), now()",
    )
    .bind(first as i64 + 5)
    .execute(&database)
    .await
    .unwrap();
    let worker = worker(&world).await;
    settled(&world).await;
    let rows: Vec<(i64, String)> = sqlx::query_as("select seq, text from messages")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(rows, [(first as i64, "first".to_owned())]);
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn a_reused_sequence_is_a_dead_letter() {
    let world = World::start().await;
    let (publisher, database) = (world.client("publisher").await, world.database().await);
    sqlx::query("insert into messages select 2, 77, 'old', null, 'o', false, 'from another life', now(), now()")
        .execute(&database)
        .await
        .unwrap();
    for text in ["one", "two", "three"] {
        publish(
            &publisher,
            "chat.general",
            None,
            &json!({"user": "ann", "text": text}).to_string(),
        )
        .await;
    }
    let worker = worker(&world).await;
    settled(&world).await;
    let letters: Vec<(i64, String)> = sqlx::query_as("select seq, reason from dead_letters")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(letters, [(2, "sequence_reused".to_owned())]);
    let texts: Vec<String> = sqlx::query_scalar("select text from messages order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(texts, ["one", "from another life", "three"]);
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn a_stranger_with_the_same_sender_and_sequence_is_a_dead_letter_too() {
    let world = World::start().await;
    let (publisher, database) = (world.client("publisher").await, world.database().await);
    // As a log that is gone had it: no id of its own, the same sender, the same place.
    sqlx::query("insert into messages select 1, 77, 'ann', null, 'seq:1', true, 'from another life', now() - interval '1 day', now() - interval '1 day'")
        .execute(&database)
        .await
        .unwrap();
    // And one whose id is used again, further down, in the log made anew.
    sqlx::query(
        "insert into messages select 500, 77, 'ann', null, 'mine', false, 'first', now() - interval '1 day', now() - interval '1 day'",
    )
    .execute(&database)
    .await
    .unwrap();
    publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"a stranger"}"#,
    )
    .await;
    publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"again","id":"mine"}"#,
    )
    .await;
    let worker = worker(&world).await;
    settled(&world).await;
    let letters: Vec<(i64, String)> =
        sqlx::query_as("select seq, reason from dead_letters order by seq")
            .fetch_all(&database)
            .await
            .unwrap();
    assert_eq!(
        letters,
        [
            (1, "sequence_reused".to_owned()),
            (2, "id_conflict".to_owned())
        ]
    );
    let rows: Vec<(i64, String)> = sqlx::query_as("select seq, text from messages order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(
        rows,
        [
            (1, "from another life".to_owned()),
            (500, "first".to_owned())
        ],
        "nothing moved, nothing was replaced"
    );
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn one_row_the_database_refuses_costs_nobody_else() {
    let world = World::start().await;
    let (publisher, database) = (world.client("publisher").await, world.database().await);
    sqlx::query("alter table messages add constraint no_poison check (text <> 'poison')")
        .execute(&database)
        .await
        .unwrap();
    for number in 0..101 {
        let text = if number == 50 {
            "poison".to_owned()
        } else {
            number.to_string()
        };
        publish(
            &publisher,
            "chat.general",
            None,
            &json!({"user": "ann", "text": text}).to_string(),
        )
        .await;
    }
    let worker = worker(&world).await;
    stored(&database, 100, WITHIN).await;
    settled(&world).await;
    let letter: (i64, String, String) =
        sqlx::query_as("select seq, reason, detail from dead_letters")
            .fetch_one(&database)
            .await
            .unwrap();
    assert_eq!((letter.0, letter.1.as_str()), (51, "refused_by_database"));
    assert!(
        letter.2.contains("23514") && letter.2.contains("no_poison") && !letter.2.contains("ann"),
        "{}",
        letter.2
    );
    worker.stop().await.unwrap();
}

/// Subject, header block, payload, and the reason it is set aside for.
type Bad = (String, Option<Vec<u8>>, Vec<u8>, &'static str);

/// Every bad message of the list.
fn bad_messages() -> Vec<Bad> {
    let general = || "chat.general".to_owned();
    let body = |body: &str| body.as_bytes().to_vec();
    let long = |key: &str, bytes: usize| {
        let mut message = json!({"user": "ann", "text": "x", "id": "i"});
        message[key] = json!("y".repeat(bytes));
        message.to_string().into_bytes()
    };
    let deep = format!(
        r#"{{"user":"ann","text":"x","deep":{}{}}}"#,
        "[".repeat(200),
        "]".repeat(200)
    );
    let good = body(r#"{"user":"ann","text":"behind a bad header"}"#);
    let mut bad = vec![
        (general(), None, body("not json"), "not_json"),
        (general(), None, vec![], "empty_payload"),
        (general(), None, body(r#"["ann","x"]"#), "not_an_object"),
        (
            general(),
            None,
            b"{\"user\":\"ann\",\"text\":\"\xff\"}".to_vec(),
            "invalid_utf8",
        ),
        (
            general(),
            None,
            body(r#"{"user":"ann","text":"\ud800"}"#),
            "lone_surrogate",
        ),
        (
            general(),
            None,
            body(r#"{"user":"ann","text":"a\u0000b"}"#),
            "nul_in_text",
        ),
        (
            general(),
            None,
            body(r#"{"user":"a\u0000b","text":"x"}"#),
            "nul_in_user",
        ),
        (
            general(),
            None,
            body(r#"{"user":"ann","text":"x","id":"a\u0000b"}"#),
            "nul_in_id",
        ),
        (general(), None, body(r#"{"user":"ann"}"#), "missing_text"),
        (general(), None, body(r#"{"text":"x"}"#), "missing_user"),
        (
            general(),
            None,
            body(r#"{"user":7,"text":"x"}"#),
            "wrong_type",
        ),
        (
            general(),
            None,
            body(r#"{"user":"ann","text":"x","timestamp":99999999999999999999999}"#),
            "number_out_of_range",
        ),
        (general(), None, deep.into_bytes(), "too_deep"),
        (
            general(),
            None,
            body(r#"{"user":"ann","text":"x","text":"y"}"#),
            "duplicate_key",
        ),
        (
            general(),
            None,
            long("text", 64 * 1024 + 1),
            "text_too_long",
        ),
        (general(), None, long("user", 256), "user_too_long"),
        (general(), None, long("id", 129), "id_too_long"),
        (
            format!("chat.{}", "r".repeat(300)),
            None,
            body(r#"{"user":"ann","text":"x"}"#),
            "name_too_long",
        ),
        (
            general(),
            None,
            body(r#"{"stream":"CHAT_MESSAGES","seq":7}"#),
            "publish_ack",
        ),
        (general(), None, vec![b'x'; 1 << 20], "payload_too_large"),
        (
            "chat.\u{fffd}".to_owned(),
            None,
            good.clone(),
            "malformed_subject",
        ),
    ];
    for header in [
        &b"NATS/1.0\r\nA: b\rc\r\n\r\n"[..],
        b"NATS/1.0\r\nA: \xff\r\n\r\n",
        b"NATS/1.0\r\nno colon\r\n\r\n",
        b"NATS/1.0\r\nA b: c\r\n\r\n",
    ] {
        bad.push((
            general(),
            Some(header.to_vec()),
            good.clone(),
            "malformed_headers",
        ));
    }
    bad
}

/// What is in the dead letters: how often each reason.
async fn reasons(database: &PgPool) -> BTreeMap<String, i64> {
    let found: Vec<(String, i64)> =
        sqlx::query_as("select reason, count(*) from dead_letters group by 1")
            .fetch_all(database)
            .await
            .unwrap();
    found.into_iter().collect()
}

async fn send_bad(client: &mut RawClient, (subject, header, payload, _): &Bad) {
    // U+FFFD stands for a byte that is not UTF-8; only a raw client can send that.
    let mut line = Vec::new();
    let subject: Vec<u8> = subject
        .replace('\u{fffd}', "\u{1}")
        .bytes()
        .map(|byte| if byte == 1 { 0xff } else { byte })
        .collect();
    match header {
        Some(header) => {
            line.extend_from_slice(b"HPUB ");
            line.extend_from_slice(&subject);
            line.extend_from_slice(
                format!(" {} {}\r\n", header.len(), header.len() + payload.len()).as_bytes(),
            );
            line.extend_from_slice(header);
        }
        None => {
            line.extend_from_slice(b"PUB ");
            line.extend_from_slice(&subject);
            line.extend_from_slice(format!(" {}\r\n", payload.len()).as_bytes());
        }
    }
    line.extend_from_slice(payload);
    line.extend_from_slice(b"\r\n");
    client.send(&line).await;
}

#[tokio::test]
async fn bad_messages_among_good_ones_cost_nobody_else() {
    let world = World::start().await;
    let worker = worker(&world).await;
    let database = world.database().await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    let mut wanted = BTreeMap::<String, i64>::new();
    let mut good = 0;
    for message in &bad_messages() {
        for number in 0..100 {
            if number == 50 {
                send_bad(&mut client, message).await;
            }
            good += 1;
            let body = json!({"user": "ann", "text": number.to_string()}).to_string();
            client
                .publish_raw("chat.general", None, None, body.as_bytes())
                .await;
        }
        *wanted.entry(message.3.to_owned()).or_default() += 1;
        client.flush().await.unwrap();
        stored(&database, good, WITHIN).await;
        eventually(message.3, WITHIN, async || {
            (reasons(&database).await == wanted).then_some(())
        })
        .await;
    }
    assert_eq!(
        letter_payload(&database, "publish_ack").await,
        br#"{"stream":"CHAT_MESSAGES","seq":7}"#
    );
    worker.stop().await.unwrap();
}

async fn letter_payload(database: &PgPool, reason: &str) -> Vec<u8> {
    sqlx::query_scalar("select payload from dead_letters where reason = $1")
        .bind(reason)
        .fetch_one(database)
        .await
        .unwrap()
}

#[tokio::test]
async fn each_bad_message_alone_is_set_aside_without_a_storm() {
    let world = World::start().await;
    let worker = world.spawn("persist-message").await;
    let database = world.database().await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    let bad = bad_messages();
    for (number, message) in bad.iter().enumerate() {
        send_bad(&mut client, message).await;
        client.flush().await.unwrap();
        let wanted = number as i64 + 1;
        eventually(message.3, WITHIN, async || {
            let letters = count(&database, "select count(*) from dead_letters").await;
            (letters == wanted).then_some(())
        })
        .await;
        let last: String =
            sqlx::query_scalar("select reason from dead_letters order by id desc limit 1")
                .fetch_one(&database)
                .await
                .unwrap();
        assert_eq!(last, message.3);
    }
    // The same process all along, and nothing comes again and again.
    assert!(worker.is_running());
    let delivered = settled(&world).await["delivered"]["consumer_seq"]
        .as_u64()
        .unwrap();
    assert!(
        delivered <= 2 * bad.len() as u64,
        "{delivered} deliveries of {} messages",
        bad.len()
    );
    assert!(worker.terminate().await.success());
}

#[tokio::test]
async fn what_is_sent_to_a_lost_connection_is_fetched() {
    const GOOD: usize = 60;
    let world = World::start().await;
    let worker = worker(&world).await;
    let database = world.database().await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    let bad = bad_messages()
        .into_iter()
        .find(|message| message.3 == "malformed_headers")
        .unwrap();
    let mut rounds = Vec::new();
    for round in 1..=12 {
        let begun = Instant::now();
        send_bad(&mut client, &bad).await;
        // One by one, each when the server has the one before: some come while the connection is being mended.
        for number in 0..GOOD {
            let body = json!({"user": "ann", "text": number.to_string()}).to_string();
            client
                .publish_raw("chat.general", None, None, body.as_bytes())
                .await;
            client.flush().await.unwrap();
        }
        stored(&database, (round * GOOD) as i64, WITHIN).await;
        rounds.push(begun.elapsed());
    }
    // Nor does one after the other make the pause longer, which would be 2.5 s at least by now.
    let fastest = rounds.iter().skip(8).min().unwrap();
    assert!(*fastest < Duration::from_secs(2), "{rounds:?}");
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn what_another_replica_has_under_way_is_not_fetched_when_a_connection_breaks() {
    const THEIRS: usize = 3_000;
    const GOOD: usize = 60;
    let world = World::start().await;
    let database = world.database().await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    for number in 0..THEIRS {
        let body = json!({"user": "zoe", "text": number.to_string()}).to_string();
        client
            .publish_raw("chat.general", None, None, body.as_bytes())
            .await;
    }
    logged(&world.client("operator").await, THEIRS).await;
    let (_other, held) = taken(&world, THEIRS).await;
    assert_eq!(held.len(), THEIRS);
    let worker = worker(&world).await;
    let bad = bad_messages()
        .into_iter()
        .find(|message| message.3 == "malformed_headers")
        .unwrap();
    send_bad(&mut client, &bad).await;
    for number in 0..GOOD {
        let body = json!({"user": "ann", "text": number.to_string()}).to_string();
        client
            .publish_raw("chat.general", None, None, body.as_bytes())
            .await;
    }
    client.flush().await.unwrap();
    eventually("ours are stored", SOON, async || {
        (count(
            &database,
            "select count(*) from messages where sender = 'ann'",
        )
        .await
            == GOOD as i64)
            .then_some(())
    })
    .await;
    eventually("the bad one is a letter", SOON, async || {
        (count(&database, "select count(*) from dead_letters").await == 1).then_some(())
    })
    .await;
    assert_eq!(
        count(
            &database,
            "select count(*) from messages where sender = 'zoe'"
        )
        .await,
        0,
        "theirs are theirs"
    );
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn a_paused_consumer_is_no_reason_to_leave() {
    const PAUSE: Duration = Duration::from_secs(10);
    let world = World::builder().administrator().start().await;
    let (admin, publisher, database) = (
        world.client("administrator").await,
        world.client("publisher").await,
        world.database().await,
    );
    let running = world
        .spawn_with("persist-message", &[("PERSIST_STUCK_AFTER_MS", "3000")])
        .await;
    let until = (time::OffsetDateTime::now_utc() + PAUSE)
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap();
    let subject = "$JS.API.CONSUMER.PAUSE.CHAT_MESSAGES.persist-message";
    let paused = admin
        .request(subject, json!({ "pause_until": until }).to_string().into())
        .await
        .unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&paused.payload).unwrap()["paused"],
        true,
        "{paused:?}"
    );
    publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"later"}"#,
    )
    .await;
    eventually("it says so", SOON, async || {
        running.stderr().contains("is paused").then_some(())
    })
    .await;
    // By itself, when the pause is over.
    stored(&database, 1, SOON).await;
    assert!(
        running.is_running() && !running.stderr().contains("stuck"),
        "{}",
        running.stderr()
    );
    assert!(running.terminate().await.success());
}

#[tokio::test]
async fn a_copy_that_stops_gives_back_what_it_has_not_begun() {
    const MESSAGES: usize = 20_000;
    let world = World::start().await;
    // What is not given back would come again after this.
    let _bootstrap = world.with_ack_wait(Duration::from_secs(3600)).await;
    let database = world.database().await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    for number in 0..MESSAGES {
        let body = json!({"user": "ann", "text": number.to_string()}).to_string();
        client
            .publish_raw("chat.general", None, None, body.as_bytes())
            .await;
    }
    logged(&world.client("operator").await, MESSAGES).await;
    let (stays, leaves) = (worker(&world).await, worker(&world).await);
    eventually("storing is under way", SOON, async || {
        (count(&database, "select count(*) from messages").await > 0).then_some(())
    })
    .await;
    leaves.stop().await.unwrap();
    stored(&database, MESSAGES as i64, 3 * SOON).await;
    stays.stop().await.unwrap();
}

#[tokio::test]
async fn while_the_database_is_away_nothing_is_spent() {
    let world = World::with_own_postgres().await;
    let worker = worker(&world).await;
    let publisher = world.client("publisher").await;
    publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"before"}"#,
    )
    .await;
    settled(&world).await;
    world.postgres().stop().await;
    for number in 0..50 {
        publish(
            &publisher,
            "chat.general",
            None,
            &json!({"user": "ann", "text": format!("{number}")}).to_string(),
        )
        .await;
    }
    let operator = world.client("operator").await;
    eventually("the worker has taken some", SOON, async || {
        let info = operator
            .request(protocol::js_api::CONSUMER_INFO, "".into())
            .await
            .ok()?;
        let info: Value = serde_json::from_slice(&info.payload).ok()?;
        (info["num_ack_pending"].as_u64()? > 0).then_some(())
    })
    .await;
    world.postgres().start().await;
    let database = world.database().await;
    stored(&database, 51, SOON).await;
    let info = settled(&world).await;
    assert_eq!(info["num_redelivered"], 0);
    assert_eq!(
        info["delivered"]["consumer_seq"], 51,
        "each delivered once: {info}"
    );
    assert_eq!(
        count(&database, "select count(*) from dead_letters").await,
        0
    );
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn a_worker_without_work_waits_for_its_consumer() {
    let world = World::bare().await;
    let worker = worker(&world).await;
    let bootstrap = world.spawn("stream-bootstrap").await;
    let (publisher, database) = (world.client("publisher").await, world.database().await);
    publish(
        &publisher,
        "chat.general",
        None,
        r#"{"user":"ann","text":"x"}"#,
    )
    .await;
    stored(&database, 1, SOON).await;
    worker.stop().await.unwrap();
    assert!(bootstrap.terminate().await.success());
}
