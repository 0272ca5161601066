//! Events as their readers get them, on real servers.

mod events;
mod failures;
mod foreign;
mod once;
mod plans;
mod receipts;

use std::time::{Duration, Instant};

use async_nats::{Client, HeaderMap, jetstream};
use futures::StreamExt;
use serde_json::{Value, json};
use sqlx::PgPool;

use protocol::subject::{EVENTS_STREAM, OUTBOX_WAKE};
use testing::{RawClient, SOON, World, eventually};

const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// An event of the stream.
struct StoredEvent {
    subject: String,
    headers: HeaderMap,
    payload: Vec<u8>,
}

impl StoredEvent {
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

/// A world with its administrator and its database.
async fn world() -> (World, Client, PgPool) {
    let world = World::builder().administrator().start().await;
    let admin = world.client("administrator").await;
    let database = world.database().await;
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

/// Waits until there are at least `wanted` events; returns all.
async fn events(admin: &Client, wanted: u64) -> Vec<StoredEvent> {
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
    let events = messages.take(held as usize).map(|message| {
        let message = message.unwrap();
        StoredEvent {
            subject: message.subject.to_string(),
            headers: message.headers.clone().unwrap_or_default(),
            payload: message.payload.to_vec(),
        }
    });
    events.collect().await
}

/// Waits until the outbox is empty; returns the sequence of every event.
async fn published(admin: &Client, database: &PgPool, wanted: u64) -> Vec<u64> {
    eventually("the outbox is empty", SOON, async || {
        (outbox(database).await == 0).then_some(())
    })
    .await;
    events(admin, wanted)
        .await
        .iter()
        .map(StoredEvent::seq)
        .collect()
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

/// Advances the stream's next sequence above `floor`, and with it the ack floor: everything up to
/// it counts as stored.
async fn advance(admin: &Client, floor: u64) {
    let purge = admin
        .request(
            "$JS.API.STREAM.PURGE.CHAT_MESSAGES",
            json!({ "seq": floor + 1 }).to_string().into(),
        )
        .await
        .unwrap();
    assert!(String::from_utf8_lossy(&purge.payload).contains(r#""success":true"#));
    eventually("the ack floor is advanced", SOON, async || {
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

/// Stores messages `first..=last` as workers side by side would: `rows` rows whose sequences
/// overlap, committed in any order.
async fn store(database: &PgPool, first: i64, last: i64, rows: i64) {
    let mut transaction = database.begin().await.unwrap();
    sqlx::query("insert into rooms (name) values ('general') on conflict do nothing")
        .execute(&mut *transaction)
        .await
        .unwrap();
    sqlx::query(
        "insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
         select seq, (select id from rooms where name = 'general'), 'ann', 'id-' || seq, false,
                'a secret', now(), now()
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

/// Three rows side by side hold every third sequence each; no two start or end with the same one.
async fn insert_rows(connection: &mut sqlx::PgConnection, first: i64, last: i64, rows: i64) {
    sqlx::query(
        "insert into outbox (first_seq, last_seq, seqs)
         select min(seq), max(seq), array_agg(seq order by random())
           from generate_series($1::bigint, $2) as seq
          group by seq % 3, ((seq - $1) * $3 / ($2 - $1 + 1) + seq % 3) / 3 order by random()",
    )
    .bind(first)
    .bind(last)
    .bind(rows)
    .execute(connection)
    .await
    .unwrap();
}

/// Lets JetStream forget ids at once, so that it does not recognize what is published twice.
async fn forget_ids(admin: &Client) {
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
