//! Events as their readers find them, on real servers.

mod foreign;
mod plans;
mod receipts;
mod trouble;

use std::time::{Duration, Instant};

use async_nats::{Client, HeaderMap, jetstream};
use futures::StreamExt;
use serde_json::{Value, json};
use sqlx::PgPool;

use protocol::subject::{EVENTS_STREAM, OUTBOX_WAKE};
use testing::{RawClient, SOON, World, eventually};

const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// An event as the stream has it.
struct Told {
    subject: String,
    headers: HeaderMap,
    payload: Vec<u8>,
}

impl Told {
    fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map(|value| value.as_str())
            .unwrap_or_default()
    }

    fn seq(&self) -> u64 {
        self.header("ce-sequence").parse().unwrap()
    }

    fn data(&self) -> Value {
        serde_json::from_slice(&self.payload).unwrap()
    }
}

/// A world, its administrator, and its database.
async fn world() -> (World, Client, PgPool) {
    let world = World::builder().administrator().start().await;
    let (admin, database) = (world.client("administrator").await, world.database().await);
    (world, admin, database)
}

async fn count(admin: &Client) -> u64 {
    let info = admin
        .request("$JS.API.STREAM.INFO.CHAT_EVENTS", "".into())
        .await
        .unwrap();
    serde_json::from_slice::<Value>(&info.payload).unwrap()["state"]["messages"]
        .as_u64()
        .unwrap()
}

/// Every event, once there are at least `wanted`.
async fn events(admin: &Client, wanted: u64) -> Vec<Told> {
    let held = eventually("the events are there", SOON, async || {
        Some(count(admin).await).filter(|held| *held >= wanted)
    })
    .await;
    let stream = jetstream::new(admin.clone())
        .get_stream(EVENTS_STREAM)
        .await
        .unwrap();
    let config = jetstream::consumer::push::OrderedConfig {
        deliver_subject: admin.new_inbox(),
        ..Default::default()
    };
    let messages = stream
        .create_consumer(config)
        .await
        .unwrap()
        .messages()
        .await
        .unwrap();
    let told = messages.take(held as usize).map(|message| {
        let message = message.unwrap();
        let (subject, headers) = (
            message.subject.to_string(),
            message.headers.clone().unwrap_or_default(),
        );
        Told {
            subject,
            headers,
            payload: message.payload.to_vec(),
        }
    });
    told.collect().await
}

/// Waits until the outbox is empty, and gives the sequence of every event.
async fn told(admin: &Client, database: &PgPool, wanted: u64) -> Vec<u64> {
    eventually("the outbox is empty", SOON, async || {
        (outbox(database).await == 0).then_some(())
    })
    .await;
    events(admin, wanted).await.iter().map(Told::seq).collect()
}

async fn outbox(database: &PgPool) -> i64 {
    sqlx::query_scalar("select count(*) from outbox")
        .fetch_one(database)
        .await
        .unwrap()
}

async fn relayed(database: &PgPool) -> i64 {
    sqlx::query_scalar("select seq from relayed")
        .fetch_one(database)
        .await
        .unwrap()
}

async fn append(client: &Client, subject: &str, body: Value, headers: HeaderMap) -> u64 {
    let reply = client
        .request_with_headers(subject.to_owned(), headers, body.to_string().into())
        .await
        .unwrap();
    let reply: Value = serde_json::from_slice(&reply.payload).unwrap();
    reply["seq"].as_u64().unwrap_or_else(|| panic!("{reply}"))
}

/// Lifts the log's next sequence above `floor`, and with it the ack floor: all up to it counts as stored.
async fn lift(admin: &Client, floor: u64) {
    let purge = admin
        .request(
            "$JS.API.STREAM.PURGE.CHAT_MESSAGES",
            json!({ "seq": floor + 1 }).to_string().into(),
        )
        .await
        .unwrap();
    assert!(String::from_utf8_lossy(&purge.payload).contains(r#""success":true"#));
    eventually("the floor is lifted", SOON, async || {
        let info = admin
            .request(
                "$JS.API.CONSUMER.INFO.CHAT_MESSAGES.persist-message",
                "".into(),
            )
            .await
            .unwrap();
        let info: Value = serde_json::from_slice(&info.payload).unwrap();
        (info["ack_floor"]["stream_seq"] == floor).then_some(())
    })
    .await;
}

/// Stores messages `first..=last` by hand, as workers side by side would have: `rows` rows whose positions are spread
/// over one another, committed in any order.
async fn store(database: &PgPool, first: i64, last: i64, rows: i64) {
    let mut transaction = database.begin().await.unwrap();
    sqlx::query("insert into rooms (name) values ('general') on conflict do nothing")
        .execute(&mut *transaction)
        .await
        .unwrap();
    sqlx::query(
        "insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
         select seq, (select id from rooms where name = 'general'), 'ann', 'id-' || seq, false, 'a secret', now(), now()
           from generate_series($1::bigint, $2) as seq",
    )
    .bind(first)
    .bind(last)
    .execute(&mut *transaction)
    .await
    .unwrap();
    insert_rows(&mut transaction, first, last, rows).await;
    transaction.commit().await.unwrap();
}

/// Three rows side by side hold every third position each, and none of them begins or ends with another.
async fn insert_rows(connection: &mut sqlx::PgConnection, first: i64, last: i64, rows: i64) {
    sqlx::query(
        "insert into outbox (first_seq, last_seq, seqs)
         select min(seq), max(seq), array_agg(seq order by random()) from generate_series($1::bigint, $2) as seq
          group by seq % 3, ((seq - $1) * $3 / ($2 - $1 + 1) + seq % 3) / 3 order by random()",
    )
    .bind(first)
    .bind(last)
    .bind(rows)
    .execute(connection)
    .await
    .unwrap();
}

/// Lets JetStream forget ids at once, so that they keep nothing from being told twice.
async fn forgetful(admin: &Client) {
    let mut config: Value =
        serde_json::from_str(include_str!("../../../nats/streams/CHAT_EVENTS.json")).unwrap();
    config["duplicate_window"] = json!(100_000_000);
    let update = admin
        .request(
            "$JS.API.STREAM.UPDATE.CHAT_EVENTS",
            config.to_string().into(),
        )
        .await
        .unwrap();
    assert!(
        !String::from_utf8_lossy(&update.payload).contains("error"),
        "{update:?}"
    );
}

async fn wake(world: &World) {
    let worker = world.client("persist-message").await;
    worker.publish(OUTBOX_WAKE, "".into()).await.unwrap();
    worker.flush().await.unwrap();
}

fn up_to(last: u64) -> Vec<u64> {
    (1..=last).collect()
}

#[tokio::test]
async fn an_event_says_what_was_stored() {
    let (world, admin, database) = world().await;
    let (_relay, _worker) =
        tokio::join!(world.spawn("relay-outbox"), world.spawn("persist-message"));
    let body = |user: &str, id: &str| json!({"user": user, "text": "a secret", "id": id, "timestamp": 1_700_000_000_000_i64});
    let mut traced = HeaderMap::new();
    traced.insert("traceparent", TRACE);
    append(&admin, "chat.general", body("ann", "a-1"), traced).await;
    append(&admin, "dm.bob.alice", body("bob", "b-1"), HeaderMap::new()).await;
    append(
        &admin,
        "admin.alerts",
        body("root", "r-1"),
        HeaderMap::new(),
    )
    .await;
    append(
        &admin,
        "chat.müsli%",
        body("Ünal", "ü\n1"),
        HeaderMap::new(),
    )
    .await;
    let deletion = json!({"type": "delete", "target": 1, "id": "a-1", "user": "ann", "timestamp": 1_700_000_000_000_i64, "received": 1,
                          "mode": "hard", "by": "moderator"});
    append(&admin, "change.chat.general", deletion, HeaderMap::new()).await;
    let not_json = admin
        .request("chat.general", "no message".into())
        .await
        .unwrap();
    assert!(not_json.payload.starts_with(b"{\"stream\""));
    append(&admin, "chat.general", body("ann", "a-1"), HeaderMap::new()).await;
    append(
        &admin,
        "chat.general",
        json!({"user": "ann", "text": "a secret", "timestamp": 5}),
        HeaderMap::new(),
    )
    .await;

    let told = events(&admin, 6).await;
    let found: Vec<(&str, &str, &str, &str)> = told
        .iter()
        .map(|one| {
            (
                one.subject.as_str(),
                one.header("ce-type"),
                one.header("ce-id"),
                one.header("ce-subject"),
            )
        })
        .collect();
    const STORED: &str = "scrollback.message.stored";
    assert_eq!(
        found,
        [
            ("events.v1.chat.general", STORED, "stored:1", "general"),
            ("events.v1.dm.alice.bob", STORED, "stored:2", "dm.alice.bob"),
            ("events.v1.chat.__admin__", STORED, "stored:3", "__admin__"),
            ("events.v1.chat.müsli%", STORED, "stored:4", "m%C3%BCsli%25"),
            (
                "events.v1.chat.general",
                "scrollback.message.deleted",
                "deleted:5",
                "general"
            ),
            ("events.v1.chat.general", STORED, "stored:8", "general"),
        ]
    );
    let at = 1_700_000_000_000_i64;
    let data: Vec<Value> = told[..5].iter().map(Told::data).collect();
    assert_eq!(
        data,
        [
            json!({"seq": 1, "id": "a-1", "room": "general", "user": "ann", "timestamp": at}),
            json!({"seq": 2, "id": "b-1", "room": "dm.alice.bob", "user": "bob", "to": "alice", "timestamp": at}),
            json!({"seq": 3, "id": "r-1", "room": "__admin__", "user": "root", "timestamp": at}),
            json!({"seq": 4, "id": "ü\n1", "room": "müsli%", "user": "Ünal", "timestamp": at}),
            json!({"seq": 5, "target": 1, "id": "a-1", "room": "general", "user": "ann", "mode": "hard", "by": "moderator"}),
        ]
    );
    assert_eq!(
        (
            &told[5].data()["id"],
            told[5].data()["timestamp"].as_i64().unwrap() > at
        ),
        (&json!("seq:8"), true)
    );
    for (index, one) in told.iter().enumerate() {
        assert_eq!(
            (one.header("ce-specversion"), one.header("ce-source")),
            ("1.0", "/scrollback/CHAT_MESSAGES")
        );
        assert_eq!(
            (one.header("ce-datacontenttype"), one.header("Nats-Msg-Id")),
            ("application/json", one.header("ce-id"))
        );
        assert_eq!(
            one.header("ce-sequence"),
            format!("{:019}", one.data()["seq"].as_u64().unwrap())
        );
        let time = time::OffsetDateTime::parse(
            one.header("ce-time"),
            &time::format_description::well_known::Rfc3339,
        )
        .unwrap();
        assert!(
            (time::OffsetDateTime::now_utc() - time).whole_minutes() < 2,
            "{time}"
        );
        let trace = if index == 0 { TRACE } else { "" };
        assert_eq!(
            (one.header("traceparent"), one.header("ce-traceparent")),
            (trace, trace),
            "{index}"
        );
        assert!(!String::from_utf8_lossy(&one.payload).contains("secret"));
    }
    eventually("the outbox is empty", SOON, async || {
        (outbox(&database).await == 0).then_some(())
    })
    .await;
    assert_eq!(relayed(&database).await, 8);

    let stats = world
        .client("operator")
        .await
        .request("$SRV.STATS.relay-outbox", "".into())
        .await
        .unwrap();
    let stats: Value = serde_json::from_slice(&stats.payload).unwrap();
    let endpoint = &stats["endpoints"][0];
    assert_eq!(
        (
            &endpoint["name"],
            &endpoint["num_requests"],
            &endpoint["num_errors"]
        ),
        (&json!("relay"), &json!(6), &json!(0)),
        "{stats}"
    );
    assert!(endpoint["processing_time"].as_u64().unwrap() > 0);
}

/// A publisher may put into a subject what no client would: a room's name can never stop the events of the others.
#[tokio::test]
async fn no_name_stops_the_relay() {
    let (world, admin, database) = world().await;
    let (_relay, _worker) =
        tokio::join!(world.spawn("relay-outbox"), world.spawn("persist-message"));
    let long = format!("chat.{}", "r".repeat(255));
    for subject in [
        "chat.*",
        "chat.>",
        "chat.a\u{1}b",
        "chat.\u{a0}",
        "chat.\u{7f}\u{2028}",
        "dm.*.>",
        "admin.*",
        "chat.$JS",
        &long,
    ] {
        let mut client = RawClient::connect(world.nats(), "publisher").await;
        client
            .publish_raw(
                subject,
                None,
                None,
                br#"{"user":"\u0001 \" ann","text":"a secret","id":"\r\n"}"#,
            )
            .await;
        // Some the server refuses by itself.
        _ = client.flush().await;
    }
    let last = append(
        &admin,
        "chat.general",
        json!({"user": "ann", "text": "a secret"}),
        HeaderMap::new(),
    )
    .await;
    let stored = async || {
        sqlx::query_scalar::<_, i64>("select count(*) from messages")
            .fetch_one(&database)
            .await
            .unwrap()
    };
    let events = eventually("the last is told", SOON, async || {
        let events = events(&admin, 1).await;
        (events.last()?.seq() == last).then_some(events)
    })
    .await;
    assert_eq!(events.len() as i64, stored().await);
}

#[tokio::test]
async fn thousands_come_in_the_order_of_the_log() {
    let (world, admin, database) = world().await;
    lift(&admin, 12_000).await;
    store(&database, 1, 12_000, 30).await;
    // Where an earlier message took the place, nothing is left to tell of.
    sqlx::query("delete from messages where seq % 1000 = 7")
        .execute(&database)
        .await
        .unwrap();
    let relay = world.spawn("relay-outbox").await;
    let wanted: Vec<u64> = up_to(12_000)
        .into_iter()
        .filter(|seq| seq % 1000 != 7)
        .collect();
    assert_eq!(told(&admin, &database, wanted.len() as u64).await, wanted);
    assert_eq!(relayed(&database).await, 12_000);
    assert!(relay.terminate().await.success());
}

#[tokio::test]
async fn what_is_not_surely_complete_waits() {
    let (world, admin, database) = world().await;
    lift(&admin, 10).await;
    store(&database, 1, 40, 3).await;
    // A slower worker is about to commit these, above the floor.
    sqlx::query("update outbox set seqs = array_remove(array_remove(seqs, 11), 12)")
        .execute(&database)
        .await
        .unwrap();
    let mut slow = database.begin().await.unwrap();
    sqlx::query("insert into outbox (first_seq, last_seq, seqs) values (11, 12, '{12, 11}')")
        .execute(&mut *slow)
        .await
        .unwrap();
    let _relay = world.spawn("relay-outbox").await;
    events(&admin, 10).await;
    slow.commit().await.unwrap();
    lift(&admin, 20).await;
    assert_eq!(
        events(&admin, 20)
            .await
            .iter()
            .map(Told::seq)
            .collect::<Vec<u64>>(),
        up_to(20)
    );
    assert!(outbox(&database).await > 0);
    lift(&admin, 40).await;
    // Nobody wakes it now: it looks again by itself while something waits.
    assert_eq!(told(&admin, &database, 40).await, up_to(40));
}

/// Neither stream nor table know that these were told; JetStream still does, and goes on with the others.
#[tokio::test]
async fn what_jetstream_remembers_is_not_told_again() {
    let (world, admin, database) = world().await;
    lift(&admin, 100).await;
    store(&database, 1, 30, 1).await;
    let relay = world.spawn("relay-outbox").await;
    assert_eq!(told(&admin, &database, 30).await, up_to(30));
    relay.kill().await;
    admin
        .request("$JS.API.STREAM.PURGE.CHAT_EVENTS", "".into())
        .await
        .unwrap();
    sqlx::query("update relayed set seq = 0")
        .execute(&database)
        .await
        .unwrap();
    insert_rows(&mut database.acquire().await.unwrap(), 1, 30, 1).await;
    store(&database, 31, 33, 1).await;
    let _relay = world.spawn("relay-outbox").await;
    assert_eq!(told(&admin, &database, 3).await, [31, 32, 33]);
}

#[tokio::test]
async fn a_wake_is_enough() {
    let (world, admin, database) = world().await;
    lift(&admin, 100).await;
    let _relay = world.spawn("relay-outbox").await;
    let begun = Instant::now();
    for seq in 1..=8 {
        store(&database, seq, seq, 1).await;
        wake(&world).await;
        events(&admin, seq as u64).await;
    }
    assert!(
        begun.elapsed() < Duration::from_secs(12),
        "as slow as without wakes: {:?}",
        begun.elapsed()
    );
    // And without one it looks by itself.
    store(&database, 9, 9, 1).await;
    events(&admin, 9).await;
}

#[tokio::test]
async fn nothing_is_told_twice_after_a_replay() {
    let (world, admin, database) = world().await;
    forgetful(&admin).await;
    lift(&admin, 30_000).await;
    store(&database, 1, 2_500, 6).await;
    let relay = world.spawn("relay-outbox").await;
    assert_eq!(told(&admin, &database, 2_500).await, up_to(2_500));

    // As a restored database: it knows nothing of what was told. More rows than one sweep takes.
    let mut transaction = database.begin().await.unwrap();
    sqlx::query("update relayed set seq = 0")
        .execute(&mut *transaction)
        .await
        .unwrap();
    sqlx::query("insert into outbox (first_seq, last_seq, seqs) select seq, seq, array[seq] from generate_series(1::bigint, 2500) as seq")
        .execute(&mut *transaction)
        .await
        .unwrap();
    for _ in 0..10 {
        insert_rows(&mut transaction, 1, 2_500, 2_500).await;
    }
    transaction.commit().await.unwrap();
    wake(&world).await;
    store(&database, 2_501, 2_600, 3).await;
    assert_eq!(told(&admin, &database, 2_600).await, up_to(2_600));

    // The stream has dropped everything, for its age say: the table remembers.
    relay.kill().await;
    admin
        .request("$JS.API.STREAM.PURGE.CHAT_EVENTS", "".into())
        .await
        .unwrap();
    insert_rows(&mut database.acquire().await.unwrap(), 1, 2_600, 6).await;
    store(&database, 2_601, 2_700, 3).await;
    let _relay = world.spawn("relay-outbox").await;
    assert_eq!(
        told(&admin, &database, 100).await,
        (2_601..=2_700).collect::<Vec<u64>>()
    );
    assert_eq!(relayed(&database).await, 2_700);
}
