//! From the stream to the commit: `persist-message` beside the naive way, and beside what this
//! machine can do at most.

use std::fmt::Write as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use async_nats::Client;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::footprint::resident_mib;
use crate::naive::{self, Store};
use crate::numbers::{median, per_second, rounded, scattered, table};
use crate::{Plan, shape};
use protocol::js_api;
use protocol::name::User;
use protocol::subject::direct_subject;
use testing::{Process, SOON, World, eventually};

/// Asking costs the server something too; 20 ms of some seconds are not missed.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
pub const ROOMS: u64 = 8;
pub const USERS: u64 = 500;

pub async fn measure(world: &World, plan: &Plan) {
    let mut ingest = Ingest::of(world, 0).await;
    let few = Plan {
        messages: plan.naive_messages,
        ..*plan
    };
    // The first to run pays for pages nobody touched yet.
    eprintln!("ingest: warming up");
    ingest.fill(few.messages).await;
    ingest.workers(1).await;
    let mut rates: [Vec<f64>; 7] = Default::default();
    for round in 1..=plan.rounds {
        eprintln!("ingest: round {round} of {}", plan.rounds);
        let [publish, one, two, row, rows, consume, copy] = &mut rates;
        publish.push(ingest.fill(plan.messages).await);
        one.push(ingest.workers(1).await);
        ingest.fill(plan.messages).await;
        two.push(ingest.workers(2).await);
        ingest.fill(few.messages).await;
        row.push(ingest.naive(Store::RowByRow, 1, few.messages).await);
        ingest.fill(few.messages).await;
        rows.push(ingest.naive(Store::RowByRow, 4, few.messages).await);
        ingest.fill(plan.messages).await;
        consume.push(ingest.naive(Store::Nowhere, 2, plan.messages).await);
        copy.push(ingest.copy(plan.messages).await);
    }
    let [publish, one, two, row, rows, consume, copy] = rates.map(|rates| median(&rates));
    let line = |way: &str, rate: f64| {
        vec![
            way.to_owned(),
            rounded(rate),
            format!("{:.1} ×", rate / row),
            format!("{:.0} %", rate / copy * 100.0),
        ]
    };
    table(
        "Ingest, from log to commit",
        &["way", "messages/s", "of row by row", "of COPY"],
        &[
            line("row by row, each acknowledged, 1 connection", row),
            line("row by row, each acknowledged, 4 connections", rows),
            line("**persist-message, 1 replica**", one),
            line("**persist-message, 2 replicas**", two),
            line("limit: binary COPY into the same table, no stream", copy),
            line("limit: consuming and acknowledging, no database", consume),
            line("for comparison: import into the stream", publish),
        ],
    );
    println!(
        "{} messages a round ({} row by row), {ROOMS} rooms, about 110 characters each, median of \
         {}. persist-message after that: {:.1} MiB.\n",
        plan.messages,
        few.messages,
        plan.rounds,
        median(&ingest.memory)
    );
    shape::ingest(plan).await;
}

pub struct Ingest<'a> {
    pub world: &'a World,
    pub operator: Client,
    pub database: PgPool,
    /// Messages written so far: no two are alike.
    pub written: u64,
    /// In so many rooms.
    pub rooms: u64,
    pub memory: Vec<f64>,
}

impl<'a> Ingest<'a> {
    /// In [`ROOMS`] rooms; messages that differ from those of another with another `written`.
    pub async fn of(world: &'a World, written: u64) -> Ingest<'a> {
        Ingest {
            world,
            operator: world.client("operator").await,
            database: world.database().await,
            written,
            rooms: ROOMS,
            memory: Vec::new(),
        }
    }

    /// Imports that many new messages into the stream while nobody works on it; how many a second.
    pub async fn fill(&mut self, messages: usize) -> f64 {
        let mut lines = String::new();
        for n in self.written..self.written + messages as u64 {
            let line = json!({
                "user": user(n), "text": text(n), "timestamp": 1_700_000_000_000 + n,
                "room": format!("room-{}", n % self.rooms),
            });
            writeln!(lines, "{line}").expect("memory");
        }
        self.written += messages as u64;
        let begun = Instant::now();
        let mut import = Command::new(testing::binary("import"))
            .arg("-")
            .envs(self.world.vars("publisher"))
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("import can be started");
        import
            .stdin
            .take()
            .expect("piped")
            .write_all(lines.as_bytes())
            .await
            .expect("import reads");
        assert!(
            import.wait().await.expect("import ends").success(),
            "import failed: run it by hand to see why"
        );
        per_second(messages, begun.elapsed())
    }

    /// Starts replicas of persist-message and waits until everything is stored; how many messages a
    /// second.
    async fn workers(&mut self, replicas: usize) -> f64 {
        self.empty("messages").await;
        self.store(replicas).await
    }

    /// The same beside what is stored already.
    pub async fn store(&mut self, replicas: usize) -> f64 {
        let count = async || {
            let stored: i64 = sqlx::query_scalar("select count(*) from messages")
                .fetch_one(&self.database)
                .await
                .expect("PostgreSQL answers");
            stored as u64
        };
        let stored_before = count().await;
        let last = self.last().await;
        let waiting = last - self.stored_through().await;
        let workers: Vec<Process> =
            futures::future::join_all((0..replicas).map(|_| self.world.spawn("persist-message")))
                .await;
        // Registered and at work: what was done until now took starting up as well, and does not
        // count.
        let begun = Instant::now();
        let before = self.stored_through().await;
        while self.stored_through().await < last {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        let rate = per_second((last - before) as usize, begun.elapsed());
        self.memory.push(resident_mib(&workers[0]));
        assert_eq!(
            count().await - stored_before,
            waiting,
            "acknowledged means stored"
        );
        for worker in workers {
            assert!(worker.terminate().await.success());
        }
        rate
    }

    async fn naive(&mut self, store: Store, connections: usize, messages: usize) -> f64 {
        self.empty("messages").await;
        let took = naive::run(self.world, store, connections, messages).await;
        // nats-server takes acknowledgements in beside what it answers: the last ones show a moment
        // later.
        let last = self.last().await;
        eventually("everything was consumed", SOON, async || {
            (self.stored_through().await == last).then_some(())
        })
        .await;
        per_second(messages, took)
    }

    /// Binary COPY of the same rows, made beforehand, in one go.
    async fn copy(&mut self, messages: usize) -> f64 {
        sqlx::raw_sql("create table if not exists copied (like messages including all)")
            .execute(&self.database)
            .await
            .expect("a table");
        self.empty("copied").await;
        let rows = copy_rows(messages as u64);
        let mut connection = self.database.acquire().await.expect("a connection");
        let begun = Instant::now();
        let mut copy = connection
            .copy_in_raw(
                "copy copied (seq, room_id, sender, recipient, id, derived, text, sent_at, \
                 received_at) from stdin (format binary)",
            )
            .await
            .expect("COPY begins");
        copy.send(rows).await.expect("COPY takes it");
        assert_eq!(copy.finish().await.expect("COPY ends"), messages as u64);
        per_second(messages, begun.elapsed())
    }

    async fn empty(&self, table: &'static str) {
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("truncate {table}; checkpoint")))
            .execute(&self.database)
            .await
            .expect("a table");
    }

    pub async fn stored_through(&self) -> u64 {
        self.request(js_api::CONSUMER_INFO).await["ack_floor"]["stream_seq"]
            .as_u64()
            .expect("an ack floor")
    }

    /// Messages of the stream that are not acknowledged as stored.
    pub async fn waiting(&self) -> u64 {
        let info = self.request(js_api::CONSUMER_INFO).await;
        ["num_pending", "num_ack_pending"]
            .iter()
            .filter_map(|field| info[field].as_u64())
            .sum()
    }

    pub async fn last(&self) -> u64 {
        self.request(js_api::STREAM_INFO).await["state"]["last_seq"]
            .as_u64()
            .expect("a last sequence")
    }

    /// Advances the stream above `stored`, which was put into PostgreSQL by hand, and has one
    /// message go through it: from there on all is as if every message had.
    pub async fn lift(&self, stored: u64) {
        assert!(
            self.world
                .spawn("stream-bootstrap")
                .await
                .terminate()
                .await
                .success()
        );
        let [first, other] = ["first", "other"].map(|name| User::parse(name).expect("a name"));
        let body =
            json!({"user": first.as_str(), "text": "And one through the stream."}).to_string();
        let publisher = self.world.client("publisher").await;
        let ack = publisher
            .request(direct_subject(&first, &other), body.into())
            .await
            .expect("JetStream answers");
        let ack: Value = serde_json::from_slice(&ack.payload).expect("JSON");
        assert_eq!(
            ack["seq"],
            stored + 1,
            "the stream stands right above what is stored"
        );
        let worker = self.world.spawn("persist-message").await;
        while self.stored_through().await <= stored {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        assert!(worker.terminate().await.success());
    }

    async fn request(&self, subject: &'static str) -> Value {
        let reply = self
            .operator
            .request(subject, "".into())
            .await
            .expect("JetStream answers");
        serde_json::from_slice(&reply.payload).expect("JSON")
    }
}

/// PostgreSQL's binary format: a signature, per row the number of its fields and each with its
/// length, and an end.
fn copy_rows(rows: u64) -> Vec<u8> {
    let mut bytes = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0".to_vec();
    for n in 0..rows {
        let user = user(n);
        let id = format!("import-{:016x}{:016x}", scattered(n + 7), scattered(n + 8));
        let seq = (n as i64 + 1).to_be_bytes();
        let room = ((n % ROOMS) as i32 + 1).to_be_bytes();
        // Microseconds since 2000.
        let at = (753_000_000_000_000 + n as i64 * 1_000).to_be_bytes();
        let text = text(n);
        let row: [Option<&[u8]>; 9] = [
            Some(&seq),
            Some(&room),
            Some(user.as_bytes()),
            None,
            Some(id.as_bytes()),
            Some(&[0]),
            Some(text.as_bytes()),
            Some(&at),
            Some(&at),
        ];
        bytes.extend((row.len() as i16).to_be_bytes());
        for value in row {
            bytes.extend(value.map_or(-1, |value| value.len() as i32).to_be_bytes());
            bytes.extend(value.unwrap_or_default());
        }
    }
    bytes.extend((-1i16).to_be_bytes());
    bytes
}

pub fn user(n: u64) -> String {
    format!("user-{}", scattered(n) % USERS)
}

/// About as long as humans write, and no two alike.
pub fn text(n: u64) -> String {
    let word = |k| scattered(n + k);
    format!(
        "{n}: {:x} {:x} {:x} is what I meant, and it has been so since {:x}",
        word(0),
        word(1),
        word(2),
        word(3)
    )
}
