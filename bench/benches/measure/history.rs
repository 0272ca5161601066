//! Asking for pages, beside an echo of the same size: what the same answer costs when nobody has to
//! look for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_nats::{Client, HeaderMap};
use bytes::Bytes;
use futures::StreamExt;
use serde_json::json;

use crate::footprint::resident_mib;
use crate::ingest::Ingest;
use crate::numbers::{median, milliseconds, per_second, percentile, rounded, scattered, table};
use crate::shape::{self, MANY_ROOMS};
use crate::{Plan, pages};
use protocol::endpoints::HISTORY;
use protocol::header;
use testing::{Process, World};

const ROOM: &str = "room-1";
const ECHO: &str = "measure.echo";
const SIDE_BY_SIDE: [usize; 2] = [1, 32];
/// Messages of all rooms that the worker has not stored yet.
const TAIL: usize = 400;

/// A request: its subject, and the body of the nth request.
#[derive(Clone)]
struct Kind {
    name: &'static str,
    client: Client,
    subject: Arc<dyn Fn(u64) -> String + Send + Sync>,
    body: Arc<dyn Fn(u64) -> String + Send + Sync>,
}

#[derive(Default)]
struct Figures {
    rate: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
}

pub async fn measure(world: &World, plan: &Plan) {
    let mut ingest = Ingest::of(world, 1 << 32).await;
    // With --quick, too, a room holds more than a page: otherwise what a query costs beside its
    // rows is all that is measured.
    let messages = (plan.messages as u64).max(MANY_ROOMS * 60);
    eprintln!("history: storing something to read");
    let first = ingest.last().await + 1;
    ingest.fill(plan.messages).await;
    let worker = world.spawn("persist-message").await;
    let last = ingest.last().await;
    while ingest.stored_through().await < last {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    worker.terminate().await;
    sqlx::raw_sql("vacuum analyze messages")
        .execute(&ingest.database)
        .await
        .expect("PostgreSQL answers");

    let history = world.spawn("get-history").await;
    let asker = world.client("publisher").await;
    let administrator = world.client("administrator").await;
    let page = asker
        .request(HISTORY.subject(&[ROOM]), "".into())
        .await
        .expect("get-history answers");
    let bytes = page.payload.len();
    echo(
        world.client("administrator").await,
        page.headers.unwrap_or_default(),
        page.payload,
    )
    .await;
    let to_history = |name, body: Arc<dyn Fn(u64) -> String + Send + Sync>| Kind {
        name,
        client: asker.clone(),
        subject: Arc::new(|_| HISTORY.subject(&[ROOM])),
        body,
    };
    let (many, all_up) = many_rooms(messages).await;
    let many_asker = many.client("publisher").await;
    let to_many = |name, body: Arc<dyn Fn(u64) -> String + Send + Sync>| Kind {
        name,
        client: many_asker.clone(),
        subject: Arc::new(|n| HISTORY.subject(&[&format!("room-{}", scattered(n) % MANY_ROOMS)])),
        body,
    };
    let kinds = [
        Kind {
            name: "limit: an echo of the same size",
            client: administrator,
            subject: Arc::new(|_| ECHO.to_owned()),
            body: Arc::new(|_| String::new()),
        },
        to_history("the newest page, all the same", Arc::new(|_| String::new())),
        to_history(
            "pages all over the room, all different",
            Arc::new(move |n| json!({"before": first + scattered(n) % (last - first)}).to_string()),
        ),
        to_many(
            "1,000 rooms, all functions up: the newest page of any",
            Arc::new(|_| String::new()),
        ),
        to_many(
            "1,000 rooms, all functions up: pages all over them",
            // Half of the stream and more lies before it, so that there is a page.
            Arc::new(move |n| {
                json!({"before": messages - scattered(n + 1) % (messages / 2)}).to_string()
            }),
        ),
    ];
    let mut rows = send_all(&kinds, plan).await;
    ingest.fill(TAIL).await;
    let tail = [to_history(
        "the newest page, part of it not stored yet",
        Arc::new(|_| String::new()),
    )];
    rows.extend(send_all(&tail, plan).await);

    let echo_rate = |side_by_side| {
        rows.iter()
            .find(|row| row.1 == side_by_side)
            .map_or(f64::NAN, |row| median(&row.2.rate))
    };
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|(name, side_by_side, figures)| {
            let rate = median(&figures.rate);
            vec![
                (*name).to_owned(),
                side_by_side.to_string(),
                rounded(rate),
                milliseconds(Duration::from_secs_f64(median(&figures.p50))),
                milliseconds(Duration::from_secs_f64(median(&figures.p99))),
                format!("{:.0} %", rate / echo_rate(*side_by_side) * 100.0),
            ]
        })
        .collect();
    table(
        "History, 1 replica of get-history",
        &[
            "request",
            "side by side",
            "pages/s",
            "p50",
            "p99",
            "of the echo",
        ],
        &lines,
    );
    println!(
        "50 messages a page, {bytes} bytes. get-history after that: {:.1} MiB.\n",
        resident_mib(&history)
    );
    futures::future::join_all(all_up.into_iter().map(Process::terminate)).await;
    pages::measure(&many, plan).await;
}

/// Messages in a thousand rooms, stored while all functions are up, and never analyzed.
async fn many_rooms(messages: u64) -> (World, Vec<Process>) {
    eprintln!("history: storing 1,000 rooms");
    let world = World::start().await;
    let mut functions = shape::all_functions_but(&world, &["persist-message"]).await;
    let mut ingest = Ingest {
        rooms: MANY_ROOMS,
        ..Ingest::of(&world, 0).await
    };
    ingest.fill(messages as usize).await;
    ingest.store(1).await;
    while shape::waiting_events(&ingest).await > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(ingest);
    functions.push(world.spawn("persist-message").await);
    (world, functions)
}

/// Answers everything with what it was given, inside this process.
async fn echo(client: Client, headers: HeaderMap, payload: Bytes) {
    let mut requests = client
        .subscribe(ECHO)
        .await
        .expect("a client that is not closed");
    let this = client.clone();
    tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            let Some(reply) = request.reply else { continue };
            // Only a closed client fails, and then the run is over.
            let _ = client
                .publish_with_headers(reply, headers.clone(), payload.clone())
                .await;
        }
    });
    // Flushed is not subscribed; answered is.
    this.request(ECHO, "".into())
        .await
        .expect("the echo answers");
}

async fn send_all(kinds: &[Kind], plan: &Plan) -> Vec<(&'static str, usize, Figures)> {
    let mut rows: Vec<(&Kind, usize, Figures)> = kinds
        .iter()
        .flat_map(|kind| SIDE_BY_SIDE.map(|side_by_side| (kind, side_by_side, Figures::default())))
        .collect();
    for round in 0..=plan.rounds {
        eprintln!(
            "history: round {round} of {}{}",
            plan.rounds,
            if round == 0 { " (warming up)" } else { "" }
        );
        for (kind, side_by_side, figures) in &mut rows {
            let (rate, latencies) = send_requests(kind, *side_by_side, plan.duration).await;
            if round > 0 {
                figures.rate.push(rate);
                figures.p50.push(percentile(&latencies, 0.5).as_secs_f64());
                figures.p99.push(percentile(&latencies, 0.99).as_secs_f64());
            }
        }
    }
    rows.into_iter()
        .map(|(kind, side_by_side, figures)| (kind.name, side_by_side, figures))
        .collect()
}

/// Asks for a while, always that many at once; answers a second, and how long each took, sorted.
async fn send_requests(
    kind: &Kind,
    side_by_side: usize,
    duration: Duration,
) -> (f64, Vec<Duration>) {
    let begun = Instant::now();
    let number = Arc::new(AtomicU64::new(0));
    let askers = (0..side_by_side).map(|_| {
        let kind = kind.clone();
        let number = number.clone();
        tokio::spawn(async move {
            let mut latencies = Vec::new();
            while begun.elapsed() < duration {
                let n = number.fetch_add(1, Ordering::Relaxed);
                let subject = (kind.subject)(n);
                let body = (kind.body)(n);
                let sent = Instant::now();
                let reply = kind
                    .client
                    .request(subject, body.into())
                    .await
                    .expect(kind.name);
                latencies.push(sent.elapsed());
                let refused = reply
                    .headers
                    .as_ref()
                    .and_then(|headers| headers.get(header::SERVICE_ERROR));
                assert!(refused.is_none(), "{}: {refused:?}", kind.name);
            }
            latencies
        })
    });
    let mut latencies: Vec<Duration> = futures::future::join_all(askers)
        .await
        .into_iter()
        .flat_map(|task| task.expect("no panic"))
        .collect();
    let rate = per_second(latencies.len(), begun.elapsed());
    latencies.sort_unstable();
    (rate, latencies)
}
