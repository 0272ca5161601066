//! Replicas that die, pause or lose their servers.

use super::*;
use testing::Process;

/// So many that a replica is in the middle of them when something happens.
const MANY: u64 = 40_000;

async fn filled() -> (World, Client, PgPool) {
    let (world, admin, database) = world().await;
    advance(&admin, MANY).await;
    store(&database, 1, MANY as i64, 150).await;
    (world, admin, database)
}

/// Waits until there are more than `before` events, but not yet all.
async fn under_way(admin: &Client, before: u64) -> u64 {
    let held = eventually("events come", SOON * 3, async || {
        Some(count(admin).await).filter(|held| *held > before)
    })
    .await;
    assert!(held < MANY, "too late: everything is published");
    held
}

#[tokio::test]
async fn a_replica_that_is_killed_leaves_no_gap() {
    let (world, admin, database) = filled().await;
    let mut replicas = vec![
        world.spawn("relay-outbox").await,
        world.spawn("relay-outbox").await,
    ];
    let mut held = 0;
    for _ in 0..3 {
        held = under_way(&admin, held).await;
        // The one that holds the lock.
        let active = active(&database, &replicas).await;
        replicas.swap_remove(active).kill().await;
        replicas.push(world.spawn("relay-outbox").await);
    }
    assert_eq!(published(&admin, &database, MANY).await, up_to(MANY));
}

/// Which of the replicas holds the lock; its connection is recognized by its port.
async fn active(database: &PgPool, replicas: &[Process]) -> usize {
    eventually("a replica holds the lock", SOON, async || {
        let port: Option<i32> = sqlx::query_scalar(
            "select client_port from pg_stat_activity join pg_locks using (pid)
              where locktype = 'advisory' and objid = $1::bigint::oid",
        )
        .bind(crate::round::LOCK & 0xffff_ffff)
        .fetch_optional(database)
        .await
        .unwrap();
        let port = port?;
        replicas
            .iter()
            .position(|replica| ports(replica.id()).contains(&port))
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

/// A replica that pauses in the middle of a round loses the lock, and what it publishes later is
/// refused.
#[tokio::test]
async fn a_replica_that_was_superseded_publishes_nothing_wrong() {
    let (world, admin, database) = filled().await;
    forget_ids(&admin).await;
    let mut replicas = vec![
        world.spawn("relay-outbox").await,
        world.spawn("relay-outbox").await,
    ];
    under_way(&admin, 0).await;
    let (first, held) = eventually(
        "a replica pauses with some of its round published and some not",
        SOON,
        async || {
            let first = active(&database, &replicas).await;
            replicas[first].pause().await;
            let inside: bool = sqlx::query_scalar(
                "select exists (select from pg_locks where locktype = 'advisory')",
            )
            .fetch_one(&database)
            .await
            .unwrap();
            let held = count(&admin).await;
            let caught = inside
                && (1..=2_000).contains(&(held as i64 - relayed(&database).await))
                && active(&database, &replicas).await == first;
            if !caught {
                replicas[first].resume();
            }
            caught.then_some((first, held))
        },
    )
    .await;
    let first = replicas.swap_remove(first);
    let second = replicas.remove(0);
    // As idle_in_transaction_session_timeout does after 20 s.
    sqlx::query("select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory'")
        .execute(&database)
        .await
        .unwrap();
    wake(&world).await;
    // Until that whole round is published, and JetStream has forgotten its ids. Then the first
    // replica continues with it.
    under_way(&admin, held + 8_000).await;
    first.resume();
    assert_eq!(published(&admin, &database, MANY).await, up_to(MANY));
    second.kill().await;
    store(&database, MANY as i64 + 1, MANY as i64 + 50, 3).await;
    advance(&admin, MANY + 50).await;
    wake(&world).await;
    assert_eq!(
        published(&admin, &database, MANY + 50).await,
        up_to(MANY + 50)
    );
    assert!(
        first.stderr().contains("not relayed yet"),
        "it was refused, or noticed that its transaction was gone"
    );
}

#[tokio::test]
async fn replicas_side_by_side_do_not_disturb_each_other() {
    let (world, admin, database) = filled().await;
    let replicas = tokio::join!(
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
    assert_eq!(published(&admin, &database, MANY).await, up_to(MANY));
    let operator = world.client("operator").await;
    let mut published = 0;
    for replica in [&replicas.0, &replicas.1, &replicas.2] {
        let stats = operator
            .request(
                format!("$SRV.STATS.relay-outbox.{}", replica.instance().unwrap()),
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
    assert_eq!(published(&admin, &database, MANY).await, up_to(MANY));
    assert!(relay.terminate().await.success());
}

#[tokio::test]
async fn a_stop_waits_for_the_round() {
    let (world, admin, database) = filled().await;
    let mut held = 0;
    for _ in 0..2 {
        let relay = world.spawn("relay-outbox").await;
        held = under_way(&admin, held).await;
        assert!(relay.terminate().await.success());
        let published = count(&admin).await;
        let noted = relayed(&database).await;
        assert_eq!(published as i64, noted, "what is published is noted, too");
        held = held.max(published);
    }
    let _relay = world.spawn("relay-outbox").await;
    assert_eq!(published(&admin, &database, MANY).await, up_to(MANY));
}

#[tokio::test]
async fn a_database_that_was_down_and_a_stream_that_was_deleted() {
    let world = World::builder()
        .administrator()
        .own_postgres()
        .start()
        .await;
    let admin = world.client("administrator").await;
    let database = world.database().await;
    advance(&admin, 100).await;
    store(&database, 1, 10, 1).await;
    let relay = world.spawn("relay-outbox").await;
    events(&admin, 10).await;
    world.postgres().stop().await;
    eventually("it logs that", SOON, async || {
        relay.stderr().contains("not relayed yet").then_some(())
    })
    .await;
    world.postgres().start().await;
    let database = world.database().await;
    store(&database, 11, 20, 1).await;
    assert_eq!(published(&admin, &database, 20).await, up_to(20));

    admin
        .request("$JS.API.STREAM.DELETE.CHAT_EVENTS", "".into())
        .await
        .unwrap();
    store(&database, 21, 30, 1).await;
    eventually("it logs that", SOON, async || {
        relay
            .stderr()
            .contains("is stream-bootstrap running?")
            .then_some(())
    })
    .await;
    let _bootstrap = world.spawn("stream-bootstrap").await;
    assert_eq!(
        published(&admin, &database, 10).await,
        (21..=30).collect::<Vec<u64>>()
    );
}
