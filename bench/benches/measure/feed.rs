//! Messages for the stream, as fast as they are wanted: atomic batches, so that the server's
//! flushes are not what is measured.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::{Client, HeaderMap};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use serde_json::{Value, json};
use tokio::time::interval;

use crate::ingest::{ROOMS, text, user};
use crate::numbers::scattered;
use jetstream::batch::BatchHeaders;
use protocol::header;
use protocol::name::{Room, User};
use protocol::subject::direct_subject;

/// Messages a second, at the fixed rate.
pub const RATE: u64 = 5_000;
/// Messages in a batch at the fixed rate, and when the stream is filled.
const STEADY_BATCH: u64 = 100;
const FULL_BATCH: u64 = 500;
/// Batches under way, when the stream is filled and when it falls behind the rate: JetStream takes
/// no more than 50.
const AT_ONCE: usize = 4;
/// One message of so many is a direct one.
pub const DIRECT_EVERY: u64 = 4;

/// A publisher of messages of which no two are alike.
pub struct Feed {
    client: Client,
    written: AtomicU64,
}

impl Feed {
    pub fn new(client: Client) -> Feed {
        Feed {
            client,
            written: AtomicU64::new(0),
        }
    }

    /// Messages that the stream has taken, or is taking.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Publishes [`RATE`] messages a second until `enough`, and returns when the stream has them.
    pub async fn steadily(&self, enough: impl Future<Output = ()>) {
        let mut enough = std::pin::pin!(enough);
        let mut ticks = interval(Duration::from_secs(1) * STEADY_BATCH as u32 / RATE as u32);
        let mut under_way = FuturesUnordered::new();
        loop {
            tokio::select! {
                _ = ticks.tick(), if under_way.len() < AT_ONCE => {
                    under_way.push(self.publish(STEADY_BATCH));
                }
                Some(()) = under_way.next() => {}
                () = &mut enough => break,
            }
        }
        while under_way.next().await.is_some() {}
    }

    /// Publishes that many as fast as the stream takes them.
    pub async fn fill(&self, messages: u64) {
        futures::stream::iter(0..messages / FULL_BATCH)
            .for_each_concurrent(AT_ONCE, |_| self.publish(FULL_BATCH))
            .await;
    }

    /// One atomic batch.
    async fn publish(&self, messages: u64) {
        let first = self.written.fetch_add(messages, Ordering::Relaxed);
        let mut batch = BatchHeaders::new(&self.client);
        for n in 1..=messages {
            let (subject, payload) = message(first + n);
            let mut headers = HeaderMap::new();
            headers.insert(header::MESSAGE_ID, format!("feed-{}", first + n));
            if n < messages {
                batch.add(&mut headers);
                self.client
                    .publish_with_headers(subject, headers, payload.into())
                    .await
                    .expect("a client that is not closed");
                continue;
            }
            batch.commit(&mut headers);
            let ack = self
                .client
                .request_with_headers(subject, headers, payload.into())
                .await
                .expect("JetStream answers");
            let ack: Value = serde_json::from_slice(&ack.payload).expect("JSON");
            assert_eq!(
                ack["count"], messages,
                "the stream takes all of a batch: {ack}"
            );
        }
    }
}

fn message(n: u64) -> (String, String) {
    let from = user(n);
    let subject = if n.is_multiple_of(DIRECT_EVERY) {
        let [from, to] =
            [from.as_str(), &user(n + 1)].map(|name| User::parse(name).expect("a name"));
        direct_subject(&from, &to)
    } else {
        Room::parse(&format!("room-{}", scattered(n) % ROOMS))
            .expect("a name")
            .stream_subject()
    };
    (subject, json!({"user": from, "text": text(n)}).to_string())
}
