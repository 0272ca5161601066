//! Sweeping what has expired while messages are stored: what storing loses by it, and whether
//! anybody waits for a lock.
//!
//! Two questions, since a fixed rate that is below what can be stored hides a loss: how far storing
//! lags at that rate while half of what is stored is expired, and how fast a full stream is stored
//! with and without an expiry beside it.

use std::time::{Duration, Instant};

use serde_json::Value;
use sqlx::PgPool;
use sqlx::types::time::OffsetDateTime;

use crate::Plan;
use crate::feed::{DIRECT_EVERY, Feed, RATE};
use crate::ingest::{Ingest, ROOMS, USERS};
use crate::numbers::{median, per_second, rounded, table};
use testing::{Process, World, eventually};

const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// PostgreSQL logs every session that waited this long for a lock, and how long.
const LOCK_WAIT_LOGGED_MS: u32 = 10;
const LOCK_WAIT_ALLOWED_MS: f64 = 100.0;
/// Of what is stored without an expiry, so much has to be stored with one.
const REQUIRED: f64 = 0.9;
/// The first half is older than the default EXPIRE_DAYS, the second one only than that of the
/// second measurement.
const EXPIRE_DAYS: &str = "30";
const EXPIRE_DAYS_LATER: &str = "5";

/// A quarter of them direct messages, in the order of their receipt: half of them 40 days ago, half
/// of them 10.
const STORED: &str = "
    insert into messages (seq, room_id, sender, recipient, id, derived, text, sent_at, received_at)
    select n, rooms.id, sender, recipient, 'old-' || n, false, n || ': ' || md5(n::text)
               || ' is what I meant, and ' || md5(sender || n), at, at
      from (select n, 'user-' || n % $2 as sender,
                    case when n % $4 = 0 then 'user-' || (n + 1) % $2 end as recipient,
                   now() - case when n <= $1 / 2 then interval '40 days' else interval '10 days' end
                          + n * interval '0.1 seconds' as at
              from generate_series(1, $1) as n) as made
      join rooms on rooms.name = case when recipient is null then 'room-' || n % $3
                                 else 'dm.' || least(sender collate \"C\", recipient) || '.'
                                       || greatest(sender collate \"C\", recipient) end
     order by n";

const ROOMS_OF_IT: &str = "
    insert into rooms (name)
    select 'room-' || n from generate_series(0, $2 - 1) as n
    union all
    select distinct 'dm.' || least(one collate \"C\", other) || '.'
                     || greatest(one collate \"C\", other)
      from (select 'user-' || n as one, 'user-' || (n + 1) % $1 as other
               from generate_series(0, $1 - 1) as n) as pairs";

/// From the stream's receipt, in milliseconds, to the commit.
const LAG: &str = "
    select count(*) filter (where at between $3 and $4),
            percentile_disc(0.5) within group (order by lag),
           percentile_disc(0.99) within group (order by lag), max(lag)
      from (select pg_xact_commit_timestamp(xmin) as at,
                   extract(epoch from pg_xact_commit_timestamp(xmin) - received_at)::float8
                      * 1000 as lag
              from messages where seq > $1 and seq <= $2) as stored";

/// What is measured with.
struct Bench<'a> {
    world: &'a World,
    ingest: Ingest<'a>,
    database: PgPool,
    feed: Feed,
    /// Lines of PostgreSQL's log that were looked at.
    log_lines_seen: usize,
}

/// When it is enough.
enum Until {
    Passed(Duration),
    Expired(u64),
}

/// A phase of time at the fixed rate.
struct Phase {
    took: Duration,
    per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    worst_ms: f64,
    backlog: Vec<f64>,
    waits: Waits,
}

/// Those who waited for a lock.
#[derive(Clone, Copy, Default)]
struct Waits {
    count: usize,
    longest_ms: f64,
}

pub async fn measure(plan: &Plan) {
    let world = World::builder()
        .own_postgres()
        .administrator()
        .start()
        .await;
    set_up_postgres(&world).await;
    let database = world.database().await;
    let operator = world.client("operator").await;
    let ingest = Ingest {
        world: &world,
        operator,
        database: database.clone(),
        written: 0,
        rooms: ROOMS,
        memory: Vec::new(),
    };
    let mut bench = Bench {
        world: &world,
        ingest,
        database,
        feed: Feed::new(world.client("publisher").await),
        log_lines_seen: 0,
    };
    bench.store(plan.stored).await;
    bench.ruler_works().await;
    bench.at_a_fixed_rate(plan).await;
    bench.as_fast_as_can_be(plan).await;
    bench.nothing_is_missing(plan.stored).await;
}

/// Commits get a time, and who waits for a lock gets a line.
async fn set_up_postgres(world: &World) {
    let database = world.database().await;
    for setting in [
        "track_commit_timestamp = on".to_owned(),
        "log_lock_waits = on".to_owned(),
        format!("deadlock_timeout = '{LOCK_WAIT_LOGGED_MS}ms'"),
    ] {
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("alter system set {setting}")))
            .execute(&database)
            .await
            .expect("a superuser");
    }
    database.close().await;
    world.postgres().stop().await;
    world.postgres().start().await;
}

impl Bench<'_> {
    async fn store(&self, messages: u64) {
        eprintln!("expiry: storing {messages} messages");
        let numbers = [messages, USERS, ROOMS, DIRECT_EVERY].map(|number| number as i64);
        sqlx::query(ROOMS_OF_IT)
            .bind(numbers[1])
            .bind(numbers[2])
            .execute(&self.database)
            .await
            .expect("rooms");
        let query = numbers
            .into_iter()
            .fold(sqlx::query(STORED), |query, number| query.bind(number));
        assert_eq!(
            query
                .execute(&self.database)
                .await
                .expect("rows")
                .rows_affected(),
            messages
        );
        // One by one: two statements in one string are one transaction, in which nothing is
        // vacuumed.
        for settled in ["vacuum analyze", "checkpoint"] {
            sqlx::raw_sql(settled)
                .execute(&self.database)
                .await
                .expect("PostgreSQL answers");
        }
        self.ingest.lift(messages).await;
    }

    /// A measurement of waits that finds none has to be able to find one.
    async fn ruler_works(&mut self) {
        const LOCK: &str = "select pg_advisory_xact_lock(1)";
        let mut holding = self.database.begin().await.expect("a connection");
        sqlx::query(LOCK)
            .execute(&mut *holding)
            .await
            .expect("a lock");
        let database = self.database.clone();
        let waiting = tokio::spawn(async move { sqlx::query(LOCK).execute(&database).await });
        eventually(
            "PostgreSQL logs who waits",
            Duration::from_secs(10),
            async || (self.waits(self.log_lines_seen).count > 0).then_some(()),
        )
        .await;
        holding.rollback().await.expect("a connection");
        waiting.await.expect("no panic").expect("the lock is free");
        self.log_lines_seen = self.world.postgres().log().lines().count();
    }

    /// Who waited since that line of PostgreSQL's log.
    fn waits(&self, since: usize) -> Waits {
        let mut waits = Waits::default();
        for line in self.world.postgres().log().lines().skip(since) {
            let still = line.contains(" still waiting for ");
            let acquired = line.contains(" acquired ");
            let after = line
                .rsplit_once(" after ")
                .and_then(|(_, after)| after.strip_suffix(" ms")?.parse::<f64>().ok());
            if let (true, Some(ms)) = (still || acquired, after) {
                waits.count += usize::from(still);
                waits.longest_ms = waits.longest_ms.max(ms);
            }
        }
        waits
    }

    /// The waits since the last call.
    fn new_waits(&mut self) -> Waits {
        let waits = self.waits(self.log_lines_seen);
        self.log_lines_seen = self.world.postgres().log().lines().count();
        waits
    }

    async fn at_a_fixed_rate(&mut self, plan: &Plan) {
        let worker = self.world.spawn("persist-message").await;
        // The first to run pays for pages nobody touched yet.
        self.phase("warming up", Until::Passed(plan.steady / 4))
            .await;
        let before = self
            .phase("before the expiry", Until::Passed(plan.steady))
            .await;
        let begun = Instant::now();
        let expirer = self.start_expirer(EXPIRE_DAYS).await;
        let during = self
            .phase("while expiring", Until::Expired(plan.stored / 2))
            .await;
        let took = begun.elapsed();
        assert!(expirer.terminate().await.success());
        let after = self.phase("after it", Until::Passed(plan.steady)).await;
        assert!(worker.terminate().await.success());
        let kept: (i64, i64) =
            sqlx::query_as("select count(*), min(seq) from messages where seq <= $1")
                .bind(plan.stored as i64)
                .fetch_one(&self.database)
                .await
                .expect("PostgreSQL answers");
        assert_eq!(
            kept,
            (plan.stored as i64 / 2, plan.stored as i64 / 2 + 1),
            "what has expired is gone, and nothing else"
        );
        let stretches = [
            ("before the expiry", &before),
            ("while expiring", &during),
            ("after it", &after),
        ];
        let rows: Vec<Vec<String>> = stretches
            .iter()
            .map(|(name, phase)| phase.row(name))
            .collect();
        let head = [
            "at 5,000 messages/s",
            "for",
            "stored/s",
            "lag p50",
            "p99",
            "longest",
            "backlog",
            "at most",
            "lock waits",
            "longest",
        ];
        table(
            "Storing while half of what is stored is expired",
            &head,
            &rows,
        );
        let stored = rounded(plan.stored as f64);
        let expired = rounded(plan.stored as f64 / 2.0);
        println!(
            "{expired} of {stored} messages were expired in {:.0} s. Lag: from the stream's \
             receipt to \
             the commit.",
            took.as_secs_f64()
        );
        println!(
            "Required: at least {REQUIRED} of what is stored otherwise ({:.2}: {}), no wait for a \
             lock beyond {LOCK_WAIT_ALLOWED_MS} ms ({}).\n",
            during.per_second / before.per_second.max(after.per_second),
            verdict(during.per_second >= REQUIRED * before.per_second.max(after.per_second)),
            verdict(during.waits.longest_ms <= LOCK_WAIT_ALLOWED_MS)
        );
    }

    /// Starts to expiry; returns as soon as something was expired.
    async fn start_expirer(&self, expire_days: &str) -> Process {
        let settings = [
            ("EXPIRE_DAYS", expire_days),
            ("RETENTION_INTERVAL_MS", "1000"),
        ];
        let expirer = self.world.spawn_with("enforce-retention", &settings).await;
        while self.expired().await == 0 {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        expirer
    }

    /// Messages that the running enforce-retention has expired.
    async fn expired(&self) -> u64 {
        let stats = self
            .ingest
            .operator
            .request("$SRV.STATS.enforce-retention", "".into())
            .await
            .expect("enforce-retention answers");
        let stats: Value = serde_json::from_slice(&stats.payload).expect("JSON");
        let endpoints = stats["endpoints"].as_array().expect("endpoints");
        let expiry = endpoints
            .iter()
            .find(|endpoint| endpoint["name"] == "sweep")
            .expect("it sweeps");
        expiry["num_requests"].as_u64().expect("a number")
    }

    /// Publishes at the fixed rate until it is enough, and waits until everything is stored.
    async fn phase(&mut self, name: &str, until: Until) -> Phase {
        eprintln!("expiry: {RATE} messages/s, {name}");
        let first = self.ingest.last().await;
        let from = self.clock().await;
        let begun = Instant::now();
        let mut backlog = Vec::new();
        let enough = async {
            loop {
                backlog.push(self.ingest.waiting().await as f64);
                let done = match until {
                    Until::Passed(time) => begun.elapsed() >= time,
                    Until::Expired(messages) => self.expired().await >= messages,
                };
                if done {
                    return;
                }
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        };
        self.feed.steadily(enough).await;
        let took = begun.elapsed();
        let to = self.clock().await;
        let last = self.ingest.last().await;
        self.caught_up(last).await;
        let (stored, p50_ms, p99_ms, worst_ms): (i64, f64, f64, f64) = sqlx::query_as(LAG)
            .bind(first as i64)
            .bind(last as i64)
            .bind(from)
            .bind(to)
            .fetch_one(&self.database)
            .await
            .expect("PostgreSQL answers");
        Phase {
            took,
            per_second: per_second(stored as usize, took),
            p50_ms,
            p99_ms,
            worst_ms,
            backlog,
            waits: self.new_waits(),
        }
    }

    async fn clock(&self) -> OffsetDateTime {
        sqlx::query_scalar("select clock_timestamp()")
            .fetch_one(&self.database)
            .await
            .expect("PostgreSQL answers")
    }

    async fn caught_up(&self, last: u64) {
        while self.ingest.stored_through().await < last {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    async fn as_fast_as_can_be(&mut self, plan: &Plan) {
        // An odd number has a median.
        let rounds = 2 * plan.rounds - 1;
        let mut without = Vec::new();
        let mut with = Vec::new();
        let mut parts = Vec::new();
        let mut waits = Waits::default();
        for round in 0..=rounds {
            eprintln!(
                "expiry: as fast as can be, round {round} of {rounds}{}",
                if round == 0 { " (warming up)" } else { "" }
            );
            // In turn the first: the table grows, and the machine is not always the same.
            let mut rates = [0.0; 2];
            for expiring in [round % 2 == 0, round % 2 != 0] {
                (rates[usize::from(expiring)], waits) = self
                    .drain(plan.messages as u64 * 3 / 2, expiring, waits)
                    .await;
            }
            if round > 0 {
                without.push(rates[0]);
                with.push(rates[1]);
                parts.push(rates[1] / rates[0]);
            }
        }
        let paired = median(&parts);
        let overall = median(&with) / median(&without);
        let row = |name: &str, rates: &[f64], part: f64| {
            let each = rates
                .iter()
                .map(|rate| rounded(*rate))
                .collect::<Vec<String>>()
                .join(" · ");
            vec![
                name.to_owned(),
                each,
                rounded(median(rates)),
                format!("{part:.2} ×"),
            ]
        };
        table(
            "Storing as fast as can be, 1 replica of persist-message",
            &["messages/s", "round by round", "median", "of without"],
            &[
                row("without expiry", &without, 1.0),
                row("while expiring", &with, overall),
            ],
        );
        let parts = parts
            .iter()
            .map(|part| format!("{part:.2}"))
            .collect::<Vec<String>>()
            .join(" · ");
        println!(
            "Both ways in each round; its part, round by round: {parts}; their median {paired:.2} \
             ×."
        );
        // Two fair ways to sum up disagree: the rounds differ too much for a result.
        let summary = if (paired >= REQUIRED) == (overall >= REQUIRED) {
            verdict(paired >= REQUIRED)
        } else {
            "UNDECIDED"
        };
        println!(
            "Required: at least {REQUIRED} × by both medians ({summary}), no wait for a lock \
             beyond \
             {LOCK_WAIT_ALLOWED_MS} ms ({}).",
            verdict(waits.longest_ms <= LOCK_WAIT_ALLOWED_MS)
        );
        println!(
            "{} waits of {LOCK_WAIT_LOGGED_MS} ms or more while expiring, the longest {:.0} ms.\n",
            waits.count, waits.longest_ms
        );
    }

    /// Has a full stream stored; how many messages a second, and the waits until then if that was
    /// with an expiry.
    async fn drain(&mut self, messages: u64, expiring: bool, waits: Waits) -> (f64, Waits) {
        self.feed.fill(messages).await;
        sqlx::raw_sql("checkpoint")
            .execute(&self.database)
            .await
            .expect("PostgreSQL answers");
        self.new_waits();
        let last = self.ingest.last().await;
        let expirer = if expiring {
            Some(self.start_expirer(EXPIRE_DAYS_LATER).await)
        } else {
            None
        };
        let worker = self.world.spawn("persist-message").await;
        // Registered and at work: what was done until now took starting up as well, and does not
        // count.
        let begun = Instant::now();
        let before = self.ingest.stored_through().await;
        let expired = if expiring { self.expired().await } else { 0 };
        self.caught_up(last).await;
        let rate = per_second((last - before) as usize, begun.elapsed());
        assert!(worker.terminate().await.success());
        let Some(expirer) = expirer else {
            return (rate, waits);
        };
        assert!(
            self.expired().await > expired,
            "it was expired all the time"
        );
        assert!(expirer.terminate().await.success());
        let new = self.new_waits();
        (
            rate,
            Waits {
                count: waits.count + new.count,
                longest_ms: waits.longest_ms.max(new.longest_ms),
            },
        )
    }

    /// Everything that was published is stored, and nothing was dead-lettered.
    async fn nothing_is_missing(&self, stored: u64) {
        let count = |sql: &'static str| {
            sqlx::query_scalar::<_, i64>(sql)
                .bind(stored as i64 + 1)
                .fetch_one(&self.database)
        };
        let found = count("select count(*) from messages where seq > $1")
            .await
            .expect("PostgreSQL answers");
        assert_eq!(
            found as u64,
            self.feed.written(),
            "acknowledged means stored"
        );
        let dead_letters = count("select count(*) from dead_letters where seq >= $1")
            .await
            .expect("PostgreSQL answers");
        assert_eq!(dead_letters, 0, "all of it could be stored");
    }
}

impl Phase {
    fn row(&self, name: &str) -> Vec<String> {
        let most = self.backlog.iter().copied().fold(0.0, f64::max);
        let ms = |ms: f64| format!("{ms:.0} ms");
        let longest = if self.waits.count == 0 {
            format!("below {LOCK_WAIT_LOGGED_MS} ms")
        } else {
            ms(self.waits.longest_ms)
        };
        vec![
            name.to_owned(),
            format!("{:.0} s", self.took.as_secs_f64()),
            rounded(self.per_second),
            ms(self.p50_ms),
            ms(self.p99_ms),
            ms(self.worst_ms),
            rounded(median(&self.backlog)),
            rounded(most),
            self.waits.count.to_string(),
            longest,
        ]
    }
}

fn verdict(held: bool) -> &'static str {
    if held { "held" } else { "MISSED" }
}
