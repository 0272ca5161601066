//! A full log, a log that is away, processes that die.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use super::*;

/// Enough that they share batches.
const WRITERS: usize = 64;

#[tokio::test]
async fn a_full_stream_is_an_error_and_space_repairs_it() {
    let (world, _bootstrap) = world_with("max_bytes", json!(64 * 1024)).await;
    let function = start_with(&world, &FLOOD).await;
    let client = world.client("publisher").await;
    let text = "t".repeat(8 * 1024);
    let body = |id: usize| json!({"text": text, "id": id.to_string()});
    let answers =
        futures::future::join_all((0..20).map(|id| send(&client, "ann", "general", body(id))))
            .await;
    let stored = answers.iter().filter(|answer| answer.is_ok()).count();
    assert!((4..=8).contains(&stored), "{answers:?}");
    for (code, reason) in answers.into_iter().filter_map(Result::err) {
        assert!(
            code == 503 && reason.starts_with("the stream is full"),
            "{code} {reason}"
        );
    }
    let administrator = world.client("administrator").await;
    assert_eq!(
        last_seq(&administrator).await,
        stored as u64,
        "what was refused is not there"
    );
    administrator
        .request(js_api::STREAM_PURGE, "".into())
        .await
        .unwrap();
    send(&client, "ann", "general", body(99)).await.unwrap();
    function.stop().await.unwrap();
}

#[tokio::test]
async fn without_the_log_senders_hear_it_in_time() {
    let world = World::builder().administrator().start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let administrator = world.client("administrator").await;
    send(
        &client,
        "ann",
        "general",
        json!({"text": "hello", "id": "before"}),
    )
    .await
    .unwrap();
    administrator
        .request(
            format!("$JS.API.STREAM.DELETE.{}", protocol::subject::STREAM),
            "".into(),
        )
        .await
        .unwrap();
    for body in [
        json!({"text": "hello", "id": "a"}),
        json!({"text": "hello"}),
    ] {
        let begun = Instant::now();
        let (code, reason) = send(&client, "ann", "general", body).await.unwrap_err();
        assert!(
            code == 503 && reason.contains("the stream"),
            "{code} {reason}"
        );
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
    let _bootstrap = world.spawn("stream-bootstrap").await;
    let sent = async || {
        send(
            &client,
            "ann",
            "general",
            json!({"text": "hello", "id": "a"}),
        )
        .await
        .ok()
    };
    let sent = eventually("the stream is back", SOON, sent).await;
    assert!(!sent.duplicate);
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_server_that_dies_costs_no_message_and_doubles_none() {
    die_under_load(|_| {}).await;
}

/// As in docker-compose.yml: the folder in which the server stages batches is in memory. A death in
/// the middle of a commit leaves the first part of a batch in the log, and nothing to finish it
/// from.
#[tokio::test]
async fn a_server_that_dies_with_its_batches_costs_no_message_and_doubles_none() {
    let memory =
        std::path::PathBuf::from(format!("/dev/shm/scrollback-test-{}", std::process::id()));
    die_under_load(|world| {
        let stream = world
            .nats()
            .store_dir()
            .join("jetstream/CHAT/streams")
            .join(protocol::subject::STREAM);
        // The server removes what it finds at its start, the link included; what was staged is gone
        // either way.
        let _ = std::fs::remove_dir_all(&memory);
        let _ = std::fs::remove_dir_all(stream.join("batches"));
        std::fs::create_dir(&memory).unwrap();
        std::os::unix::fs::symlink(&memory, stream.join("batches")).unwrap();
    })
    .await;
    std::fs::remove_dir_all(&memory).unwrap();
}

/// Kills the server again and again while many send; `prepare` finds it running, and nothing sent
/// since.
async fn die_under_load(prepare: impl Fn(&World)) {
    let world = World::start().await;
    prepare(&world);
    let function = start_with(&world, &FLOOD).await;
    let _worker = world.spawn("persist-message").await;
    let load = Load {
        running: AtomicBool::new(true),
        acknowledged: AtomicU64::new(0),
    };
    let writers = futures::future::join_all(
        (0..WRITERS).map(|writer| acknowledged_sends(&world, writer, &load)),
    );
    let deaths = async {
        for _ in 0..3 {
            load.goes_on().await;
            world.nats().kill().await;
            world.nats().start().await;
            prepare(&world);
        }
        load.goes_on().await;
        load.running.store(false, Ordering::Relaxed);
    };
    let (acknowledged, ()) = tokio::join!(writers, deaths);
    check(&world, acknowledged.into_iter().flatten().collect()).await;
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_copy_that_is_killed_costs_no_message_and_doubles_none() {
    let world = World::start().await;
    let _worker = world.spawn("persist-message").await;
    let _steady = world.spawn_with("send-message", &FLOOD).await;
    let load = Load {
        running: AtomicBool::new(true),
        acknowledged: AtomicU64::new(0),
    };
    let writers = futures::future::join_all(
        (0..WRITERS).map(|writer| acknowledged_sends(&world, writer, &load)),
    );
    let deaths = async {
        for _ in 0..4 {
            let victim = world.spawn_with("send-message", &FLOOD).await;
            load.goes_on().await;
            victim.kill().await;
        }
        load.running.store(false, Ordering::Relaxed);
    };
    let (acknowledged, ()) = tokio::join!(writers, deaths);
    check(&world, acknowledged.into_iter().flatten().collect()).await;
}

#[tokio::test]
async fn a_replica_that_is_asked_to_stop_answers_what_it_took() {
    let world = World::start().await;
    let _steady = world.spawn_with("send-message", &FLOOD).await;
    let running = AtomicBool::new(true);
    let sent = AtomicU64::new(0);
    let load = futures::future::join_all((0..WRITERS).map(async |writer| {
        let client = world.client("publisher").await;
        while running.load(Ordering::Relaxed) {
            send(
                &client,
                &format!("user-{writer}"),
                "general",
                json!({"text": "x"}),
            )
            .await
            .expect("an acknowledgement");
            sent.fetch_add(1, Ordering::Relaxed);
        }
    }));
    let stops = async {
        for _ in 0..3 {
            let copy = world.spawn_with("send-message", &FLOOD).await;
            let before = sent.load(Ordering::Relaxed);
            eventually("it has its share", SOON, async || {
                (sent.load(Ordering::Relaxed) > before + 100).then_some(())
            })
            .await;
            assert!(copy.terminate().await.success());
        }
        running.store(false, Ordering::Relaxed);
    };
    tokio::join!(load, stops);
    let reader = world.client("send-message").await;
    assert_eq!(
        last_seq(&reader).await,
        sent.load(Ordering::Relaxed),
        "each was stored once"
    );
}

/// Writers under way.
struct Load {
    running: AtomicBool,
    acknowledged: AtomicU64,
}

impl Load {
    /// Waits until more has been acknowledged, so that the next death meets sends under way.
    async fn goes_on(&self) {
        let before = self.acknowledged.load(Ordering::Relaxed);
        eventually("more is acknowledged", SOON, async || {
            (self.acknowledged.load(Ordering::Relaxed) > before + 2 * WRITERS as u64).then_some(())
        })
        .await;
    }
}

/// Sends one message after the other, each until it is acknowledged and some once more; sequence by
/// id.
async fn acknowledged_sends(world: &World, writer: usize, load: &Load) -> Vec<(String, u64)> {
    let client = world.client("publisher").await;
    let mut acknowledged = Vec::new();
    for number in 0.. {
        if !load.running.load(Ordering::Relaxed) {
            break;
        }
        let id = format!("{writer}-{number}");
        let subject = SEND.subject(&[&format!("user-{writer}"), "general"]);
        let body = json!({"text": format!("text of {id}"), "id": id}).to_string();
        let once = async || {
            // A copy that was killed leaves its requests unanswered.
            let asked =
                tokio::time::timeout(Duration::from_secs(1), ask(&client, subject.clone(), &body))
                    .await;
            match asked.unwrap_or(Err((0, "no answer".to_owned()))) {
                Ok(ack) => Some(ack.seq.get()),
                Err((0 | 503, _)) => None,
                Err((code, reason)) => panic!("{code} {reason}"),
            }
        };
        let seq = eventually("an acknowledgement", SOON, once).await;
        if number % 5 == 0 {
            assert_eq!(
                eventually("an acknowledgement", SOON, once).await,
                seq,
                "{id} again"
            );
        }
        acknowledged.push((id, seq));
        load.acknowledged.fetch_add(1, Ordering::Relaxed);
    }
    acknowledged
}

/// Each acknowledged id stands exactly once, under its sequence, in the log and in the index.
async fn check(world: &World, acknowledged: Vec<(String, u64)>) {
    assert!(acknowledged.len() > 50, "{}", acknowledged.len());
    let reader = world.client("send-message").await;
    let last = last_seq(&reader).await;
    let (mut batched, mut places) = (0, HashMap::<String, Vec<u64>>::new());
    for seq in 1..=last {
        let (_, body, headers) = at(&reader, seq).await.unwrap();
        places
            .entry(body["id"].as_str().unwrap().to_owned())
            .or_default()
            .push(seq);
        batched += usize::from(headers.contains("Nats-Batch-Id"));
    }
    assert!(batched > 0, "none of {last} shared a flush");
    for (id, seq) in &acknowledged {
        assert_eq!(places.get(id), Some(&vec![*seq]), "{id}");
    }
    let database = world.database().await;
    let stored = eventually("all is stored", SOON, async || {
        let stored: Vec<(String, i64)> = sqlx::query_as("select id, seq from messages")
            .fetch_all(&database)
            .await
            .unwrap();
        (stored.len() as u64 == last).then_some(stored)
    })
    .await;
    let stored: HashMap<String, i64> = stored.into_iter().collect();
    for (id, seq) in &acknowledged {
        assert_eq!(stored.get(id), Some(&(*seq as i64)), "{id}");
    }
}
