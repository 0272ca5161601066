//! Acknowledged sending, beside plain JetStream publishers on the same server: what many senders
//! gain from sharing a flush, and what a lone sender pays for the way through send-message.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_nats::{Client, HeaderMap};
use futures::StreamExt;
use serde_json::json;

use crate::Plan;
use crate::ingest::Ingest;
use crate::numbers::{median, milliseconds, per_second, percentile, rounded, table};
use protocol::endpoints::SEND;
use protocol::header;
use protocol::subject::STREAM;
use testing::{Process, World};

const ROOM: &str = "flush";
const SIDE_BY_SIDE: [usize; 4] = [1, 8, 64, 256];
/// Where the one who hands on listens.
const BARE: &str = "measure.bare";
const CONNECTIONS: usize = 8;
/// No limit: these are no humans who type.
const UNLIMITED: [(&str, &str); 2] = [
    ("SEND_BURST", "1000000"),
    ("SEND_RATE_PER_SECOND", "1000000"),
];

/// No id twice in a run.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// How a message is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Straight into the stream, with JetStream's acknowledgement.
    Plain,
    /// Through somebody who does nothing but hand it on: what any function in between costs at
    /// least.
    Bare,
    /// Through send-message, which makes the id.
    Made,
    /// Through send-message, with an id of the client's, which it looks up.
    Given,
}

#[derive(Default)]
struct Figures {
    rate: Vec<f64>,
    p50: Vec<f64>,
}

pub async fn measure(world: &World, plan: &Plan) {
    // It stores between two measurements, not while one is being made: on a small machine that
    // would be measured, too.
    let worker = world.spawn("persist-message").await;
    hand_on(world.client("administrator").await).await;
    let on_disk = rows(world, plan, &worker, &UNLIMITED).await;
    print("Acknowledged sending, batches staged on the disk", &on_disk);
    let folder = batches_in_memory(world);
    // A batch costs little more than a message then: a few pay already.
    let in_memory = rows(
        world,
        plan,
        &worker,
        &[UNLIMITED[0], UNLIMITED[1], ("SEND_MIN_BATCH", "4")],
    )
    .await;
    print(
        "Acknowledged sending, batches staged in memory, SEND_MIN_BATCH=4 (as in compose)",
        &in_memory,
    );
    worker.terminate().await;
    // A folder left in memory is a leak until the next boot.
    std::fs::remove_dir_all(folder).expect("our own folder");
}

type Row = (Way, usize, Figures);

async fn rows(world: &World, plan: &Plan, worker: &Process, settings: &[(&str, &str)]) -> Vec<Row> {
    let function = world.spawn_with("send-message", settings).await;
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(world.client("publisher").await);
    }
    let (clients, administrator): (Arc<[Client]>, Client) =
        (clients.into(), world.client("administrator").await);
    let ways = [Way::Plain, Way::Bare, Way::Made, Way::Given];
    let mut rows: Vec<Row> = SIDE_BY_SIDE
        .iter()
        .flat_map(|&side_by_side| ways.map(|way| (way, side_by_side, Figures::default())))
        .collect();
    for round in 0..=plan.rounds {
        eprintln!(
            "send: round {round} of {}{}",
            plan.rounds,
            if round == 0 { " (warming up)" } else { "" }
        );
        for (way, side_by_side, figures) in &mut rows {
            worker.pause().await;
            let (rate, latencies) =
                send(&clients, &administrator, *way, *side_by_side, plan.duration).await;
            worker.resume();
            caught_up(world).await;
            if round > 0 {
                figures.rate.push(rate);
                figures.p50.push(percentile(&latencies, 0.5).as_secs_f64());
            }
        }
    }
    function.terminate().await;
    rows
}

/// Waits until everything is stored: ids are looked up in the stream otherwise.
async fn caught_up(world: &World) {
    let ingest = Ingest::of(world, 0).await;
    let last = ingest.last().await;
    while ingest.stored_through().await < last {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Sends for a while, always that many at once; acknowledgements a second, and how long each took,
/// sorted.
async fn send(
    clients: &Arc<[Client]>,
    administrator: &Client,
    way: Way,
    side_by_side: usize,
    sending: Duration,
) -> (f64, Vec<Duration>) {
    let begun = Instant::now();
    let senders = (0..side_by_side).map(|sender| {
        let clients = clients.clone();
        let administrator = administrator.clone();
        tokio::spawn(async move {
            let client = if way == Way::Bare {
                &administrator
            } else {
                &clients[sender % CONNECTIONS]
            };
            let user = format!("user-{sender}");
            let mut latencies = Vec::new();
            while begun.elapsed() < sending {
                let sent = Instant::now();
                let id = format!(
                    "{}-{}",
                    std::process::id(),
                    NEXT.fetch_add(1, Ordering::Relaxed)
                );
                let text =
                    "A message of an ordinary length, as they are sent in a room all day long.";
                let (subject, body) = match way {
                    Way::Plain => (
                        format!("chat.{ROOM}"),
                        json!({"user": user, "text": text, "id": id}),
                    ),
                    Way::Bare => (
                        BARE.to_owned(),
                        json!({"user": user, "text": text, "id": id}),
                    ),
                    Way::Made => (SEND.subject(&[&user, ROOM]), json!({"text": text})),
                    Way::Given => (
                        SEND.subject(&[&user, ROOM]),
                        json!({"text": text, "id": id}),
                    ),
                };
                let mut headers = HeaderMap::new();
                if matches!(way, Way::Plain | Way::Bare) {
                    headers.insert(header::MESSAGE_ID, format!("{user}:{id}"));
                }
                let reply = client
                    .request_with_headers(subject, headers, body.to_string().into())
                    .await
                    .expect("a reply");
                latencies.push(sent.elapsed());
                let answer: serde_json::Value =
                    serde_json::from_slice(&reply.payload).expect("JSON");
                assert!(
                    answer["seq"].as_u64() > Some(0) && answer["duplicate"] != true,
                    "{way:?}: {answer}"
                );
            }
            latencies
        })
    });
    let mut latencies: Vec<Duration> = futures::future::join_all(senders)
        .await
        .into_iter()
        .flat_map(|sent| sent.expect("no panic"))
        .collect();
    let rate = per_second(latencies.len(), begun.elapsed());
    latencies.sort_unstable();
    (rate, latencies)
}

/// Appends every request to the stream and answers what JetStream answers, inside this process.
async fn hand_on(client: Client) {
    let mut requests = client
        .subscribe(BARE)
        .await
        .expect("a client that is not closed");
    client.flush().await.expect("a client that is not closed");
    tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            let client = client.clone();
            tokio::spawn(async move {
                let (Some(reply), headers) = (request.reply, request.headers.unwrap_or_default())
                else {
                    return;
                };
                let ack = client
                    .request_with_headers(format!("chat.{ROOM}"), headers, request.payload)
                    .await
                    .expect("an answer");
                // Only a closed client fails, and then the run is over.
                let _ = client.publish(reply, ack.payload).await;
            });
        }
    });
}

/// Puts the folder in which the server stages batches of the stream into memory; where it is.
fn batches_in_memory(world: &World) -> PathBuf {
    let target = PathBuf::from(format!("/dev/shm/scrollback-bench-{}", std::process::id()));
    std::fs::create_dir(&target).expect("/dev/shm is there");
    let stream = world
        .nats()
        .store_dir()
        .join("jetstream/CHAT/streams")
        .join(STREAM);
    let batches = stream.join("batches");
    // Between two batches it is empty, or not there.
    let _ = std::fs::remove_dir_all(&batches);
    std::os::unix::fs::symlink(&target, &batches).expect("the stream's own folder");
    target
}

fn print(title: &str, rows: &[Row]) {
    let of = |way: Way, side_by_side: usize| {
        &rows
            .iter()
            .find(|row| (row.0, row.1) == (way, side_by_side))
            .expect("measured")
            .2
    };
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|(way, side_by_side, figures)| {
            let plain = of(Way::Plain, *side_by_side);
            let rate = median(&figures.rate);
            let p50 = median(&figures.p50);
            let name = match way {
                Way::Plain => "plain JetStream publishers",
                Way::Bare => "limit: handed on by a process in between",
                Way::Made => "send-message",
                Way::Given => "send-message, with ids of the clients'",
            };
            vec![
                name.to_owned(),
                side_by_side.to_string(),
                rounded(rate),
                format!("{:.2} ×", rate / median(&plain.rate)),
                milliseconds(Duration::from_secs_f64(p50)),
                format!("{:.2} ×", p50 / median(&plain.p50)),
            ]
        })
        .collect();
    table(
        title,
        &[
            "way",
            "side by side",
            "acknowledged/s",
            "of plain",
            "p50",
            "of plain",
        ],
        &lines,
    );
}
