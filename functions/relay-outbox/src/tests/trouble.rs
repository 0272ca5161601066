//! Copies that die, stand still or lose their servers.

use super::*;
use testing::Process;

/// Enough that a copy is in the middle of it when something happens.
const MANY: u64 = 40_000;

async fn filled() -> (World, Client, PgPool) {
    let (world, admin, database) = world().await;
    lift(&admin, MANY).await;
    store(&database, 1, MANY as i64, 150).await;
    (world, admin, database)
}

/// Waits until there are more events than `before`, and not yet all.
async fn under_way(admin: &Client, before: u64) -> u64 {
    let held = eventually("events come", SOON * 3, async || {
        Some(count(admin).await).filter(|held| *held > before)
    })
    .await;
    assert!(held < MANY, "too late: all is told");
    held
}

#[tokio::test]
async fn a_copy_that_is_killed_leaves_no_gap() {
    let (world, admin, database) = filled().await;
    let mut copies = vec![
        world.spawn("relay-outbox").await,
        world.spawn("relay-outbox").await,
    ];
    let mut held = 0;
    for _ in 0..3 {
        held = under_way(&admin, held).await;
        // Whichever of them is at it.
        let active = active(&database, &copies).await;
        copies.swap_remove(active).kill().await;
        copies.push(world.spawn("relay-outbox").await);
    }
    assert_eq!(told(&admin, &database, MANY).await, up_to(MANY));
}

/// Which of the copies holds the lock; its connection is told by its port.
async fn active(database: &PgPool, copies: &[Process]) -> usize {
    eventually("a copy holds the lock", SOON, async || {
        let port: Option<i32> = sqlx::query_scalar(
            "select client_port from pg_stat_activity join pg_locks using (pid) where locktype = 'advisory' and objid = $1::bigint::oid",
        )
        .bind(crate::round::LOCK & 0xffff_ffff)
        .fetch_optional(database)
        .await
        .unwrap();
        let port = port?;
        copies.iter().position(|copy| ports(copy.id()).contains(&port))
    })
    .await
}

/// The local ports of a process's connections.
fn ports(process: u32) -> Vec<i32> {
    let links = std::fs::read_dir(format!("/proc/{process}/fd"))
        .into_iter()
        .flatten()
        .flatten();
    let sockets: Vec<String> = links
        .filter_map(|entry| {
            std::fs::read_link(entry.path())
                .ok()?
                .to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')
                .map(str::to_owned)
        })
        .collect();
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let lines = table
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect::<Vec<&str>>());
    lines
        .filter(|fields| sockets.iter().any(|socket| socket == fields[9]))
        .filter_map(|fields| i32::from_str_radix(fields[1].split_once(':')?.1, 16).ok())
        .collect()
}

/// One that stands still in the middle of a round loses its place, and what it still wanted to say is refused.
#[tokio::test]
async fn a_copy_that_was_superseded_says_nothing_wrong() {
    let (world, admin, database) = filled().await;
    forgetful(&admin).await;
    let mut copies = vec![
        world.spawn("relay-outbox").await,
        world.spawn("relay-outbox").await,
    ];
    under_way(&admin, 0).await;
    let (first, held) = eventually(
        "one stands still with some of its round published and some not",
        SOON,
        async || {
            let first = active(&database, &copies).await;
            copies[first].pause().await;
            let inside: bool = sqlx::query_scalar(
                "select exists (select from pg_locks where locktype = 'advisory')",
            )
            .fetch_one(&database)
            .await
            .unwrap();
            let held = count(&admin).await;
            let caught = inside
                && (1..=2_000).contains(&(held as i64 - relayed(&database).await))
                && active(&database, &copies).await == first;
            if !caught {
                copies[first].resume();
            }
            caught.then_some((first, held))
        },
    )
    .await;
    let (first, second) = (copies.swap_remove(first), copies.remove(0));
    // As idle_in_transaction_session_timeout does after 20 s.
    sqlx::query("select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory'")
        .execute(&database)
        .await
        .unwrap();
    wake(&world).await;
    // Beyond all of that round, and beyond what JetStream remembers: then the first one goes on with it.
    under_way(&admin, held + 8_000).await;
    first.resume();
    assert_eq!(told(&admin, &database, MANY).await, up_to(MANY));
    second.kill().await;
    store(&database, MANY as i64 + 1, MANY as i64 + 50, 3).await;
    lift(&admin, MANY + 50).await;
    wake(&world).await;
    assert_eq!(told(&admin, &database, MANY + 50).await, up_to(MANY + 50));
    assert!(
        first.stderr().contains("not relayed yet"),
        "it was refused, or noticed that its transaction was gone"
    );
}

#[tokio::test]
async fn copies_side_by_side_are_no_trouble_to_one_another() {
    let (world, admin, database) = filled().await;
    let copies = tokio::join!(
        world.spawn("relay-outbox"),
        world.spawn("relay-outbox"),
        world.spawn("relay-outbox")
    );
    let waking = async {
        while outbox(&database).await > 0 {
            wake(&world).await;
        }
    };
    tokio::join!(waking, under_way(&admin, 0));
    assert_eq!(told(&admin, &database, MANY).await, up_to(MANY));
    let operator = world.client("operator").await;
    let mut published = 0;
    for copy in [&copies.0, &copies.1, &copies.2] {
        let stats = operator
            .request(
                format!("$SRV.STATS.relay-outbox.{}", copy.instance().unwrap()),
                "".into(),
            )
            .await
            .unwrap();
        let stats: Value = serde_json::from_slice(&stats.payload).unwrap();
        assert_eq!(stats["endpoints"][0]["num_errors"], 0, "{stats}");
        published += stats["endpoints"][0]["num_requests"].as_u64().unwrap();
    }
    assert_eq!(published, MANY);
}

#[tokio::test]
async fn a_server_that_is_killed_costs_no_event() {
    let (world, admin, database) = filled().await;
    let relay = world.spawn("relay-outbox").await;
    let mut held = 0;
    for _ in 0..2 {
        held = under_way(&admin, held).await;
        world.nats().kill().await;
        world.nats().start().await;
        eventually("the administrator is back", SOON, async || {
            admin.request("$JS.API.INFO", "".into()).await.ok()
        })
        .await;
    }
    assert_eq!(told(&admin, &database, MANY).await, up_to(MANY));
    assert!(relay.terminate().await.success());
}

#[tokio::test]
async fn told_to_stop_it_finishes_its_round() {
    let (world, admin, database) = filled().await;
    let mut held = 0;
    for _ in 0..2 {
        let relay = world.spawn("relay-outbox").await;
        held = under_way(&admin, held).await;
        assert!(relay.terminate().await.success());
        let (told, noted) = (count(&admin).await, relayed(&database).await);
        assert_eq!(told as i64, noted, "what is told is noted, too");
        held = held.max(told);
    }
    let _relay = world.spawn("relay-outbox").await;
    assert_eq!(told(&admin, &database, MANY).await, up_to(MANY));
}

#[tokio::test]
async fn a_database_that_was_away_and_a_stream_that_was_gone() {
    let world = World::builder()
        .administrator()
        .own_postgres()
        .start()
        .await;
    let admin = world.client("administrator").await;
    let database = world.database().await;
    lift(&admin, 100).await;
    store(&database, 1, 10, 1).await;
    let relay = world.spawn("relay-outbox").await;
    events(&admin, 10).await;
    world.postgres().stop().await;
    eventually("it says so, once", SOON, async || {
        relay.stderr().contains("not relayed yet").then_some(())
    })
    .await;
    world.postgres().start().await;
    let database = world.database().await;
    store(&database, 11, 20, 1).await;
    assert_eq!(told(&admin, &database, 20).await, up_to(20));

    admin
        .request("$JS.API.STREAM.DELETE.CHAT_EVENTS", "".into())
        .await
        .unwrap();
    store(&database, 21, 30, 1).await;
    eventually("it says so", SOON, async || {
        relay
            .stderr()
            .contains("is stream-bootstrap running?")
            .then_some(())
    })
    .await;
    let _bootstrap = world.spawn("stream-bootstrap").await;
    assert_eq!(
        told(&admin, &database, 10).await,
        (21..=30).collect::<Vec<u64>>()
    );
}
