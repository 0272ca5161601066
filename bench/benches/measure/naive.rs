//! The way everybody writes first: take a message, insert its row, acknowledge, take the next.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_nats::{Client, Message, Subscriber};
use futures::StreamExt;
use serde_json::json;
use sqlx::types::time::OffsetDateTime;
use sqlx::{Connection, PgConnection};

use base::seq::Seq;
use protocol::message::{Incoming, Limits};
use protocol::{header, js_api};
use testing::World;

const PULL: usize = 500;

/// Where messages go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// One insert and one commit a message.
    RowByRow,
    /// Nowhere: what consuming without storing costs.
    Nowhere,
}

/// Consumes `messages` with that many connections, and returns how long it took. Uses the rights
/// and the consumer of persist-message, which must not run meanwhile.
pub async fn run(world: &World, store: Store, connections: usize, messages: usize) -> Duration {
    let handled = AtomicUsize::new(0);
    let mut consumers = Vec::new();
    for _ in 0..connections {
        let client = world.client("persist-message").await;
        let inbox = client.new_inbox();
        let replies = client
            .subscribe(format!("{inbox}.*"))
            .await
            .expect("a client that is not closed");
        let database = match store {
            Store::RowByRow => Some(
                PgConnection::connect(&world.database_url())
                    .await
                    .expect("PostgreSQL answers"),
            ),
            Store::Nowhere => None,
        };
        consumers.push(Consumer {
            client,
            inbox,
            replies,
            pulls: 0,
            database,
            rooms: HashMap::new(),
        });
    }
    let begun = Instant::now();
    futures::future::join_all(
        consumers
            .iter_mut()
            .map(|consumer| consumer.consume(&handled, messages)),
    )
    .await;
    for consumer in &consumers {
        consumer
            .client
            .flush()
            .await
            .expect("a client that is not closed");
    }
    let took = begun.elapsed();
    // What was acknowledged has to have arrived before the caller looks.
    for consumer in &consumers {
        let _ = consumer
            .client
            .request(js_api::CONSUMER_INFO, "".into())
            .await;
    }
    took
}

struct Consumer {
    client: Client,
    inbox: String,
    replies: Subscriber,
    pulls: usize,
    database: Option<PgConnection>,
    rooms: HashMap<String, i32>,
}

impl Consumer {
    async fn consume(&mut self, handled: &AtomicUsize, messages: usize) {
        while handled.load(Ordering::Relaxed) < messages {
            for message in self.pull().await {
                if self.database.is_some() {
                    self.insert(&message).await;
                }
                let ack = message.reply.expect("a delivery has an ack subject");
                self.client
                    .publish(ack, "+ACK".into())
                    .await
                    .expect("a client that is not closed");
                handled.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    async fn pull(&mut self) -> Vec<Message> {
        self.pulls += 1;
        let inbox = format!("{}.{}", self.inbox, self.pulls);
        let request = json!({"batch": PULL, "no_wait": true}).to_string();
        self.client
            .publish_with_reply(js_api::CONSUMER_NEXT, inbox.clone(), request.into())
            .await
            .expect("a client that is not closed");
        let mut pulled = Vec::with_capacity(PULL);
        while pulled.len() < PULL {
            let message = self
                .replies
                .next()
                .await
                .expect("a client that is not closed");
            if message.status.is_none() {
                pulled.push(message);
            } else if message.subject.as_str() == inbox {
                break;
            }
        }
        pulled
    }

    async fn insert(&mut self, message: &Message) {
        let ack = message
            .reply
            .as_deref()
            .expect("a delivery has an ack subject");
        let tokens: Vec<&str> = ack.split('.').collect();
        let number = |index: usize| {
            tokens[index]
                .parse::<i64>()
                .expect("$JS.ACK.<stream>.<consumer>.<attempt>.<seq>.<…>.<nanoseconds>.<…>")
        };
        let seq = Seq::from_i64(number(5));
        let received_ms = number(7) / 1_000_000;
        let id = message
            .headers
            .as_ref()
            .and_then(|headers| headers.get(header::MESSAGE_ID))
            .map(|id| id.as_str());
        let incoming = Incoming::parse(
            &message.subject,
            id,
            &message.payload,
            seq,
            received_ms,
            Limits::default(),
        )
        .expect("import sends good ones");
        let database = self.database.as_mut().expect("this way has a database");
        let room_id = match self.rooms.get(&incoming.room) {
            Some(id) => *id,
            None => {
                let made = "insert into rooms (name) values ($1) \
                            on conflict (name) do update set name = excluded.name returning id";
                let id = sqlx::query_scalar(made)
                    .bind(&incoming.room)
                    .fetch_one(&mut *database)
                    .await
                    .expect("a room");
                self.rooms.insert(incoming.room.clone(), id);
                id
            }
        };
        let at = |ms: i64| {
            OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).expect("a time")
        };
        sqlx::query(
            "insert into messages (seq, room_id, sender, recipient, id, derived, text,
                                   sent_at, received_at)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9) on conflict do nothing",
        )
        .bind(seq.as_i64())
        .bind(room_id)
        .bind(&incoming.user)
        .bind(&incoming.to)
        .bind(incoming.shown_id())
        .bind(incoming.id.is_none())
        .bind(&incoming.text)
        .bind(at(incoming.timestamp))
        .bind(at(received_ms))
        .execute(database)
        .await
        .expect("a row");
    }
}
