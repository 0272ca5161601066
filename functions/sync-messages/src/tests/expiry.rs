//! Expiry while PostgreSQL is away: the configured days count. The clock moves, because messages in
//! the stream cannot be made older.

use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use super::*;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A function with `EXPIRE_DAYS`, and its clock.
async fn start_with(world: &World, days: &str) -> (Running, Arc<Mutex<SystemTime>>) {
    let mut vars = world.vars("sync-messages");
    vars.insert("EXPIRE_DAYS".to_owned(), days.to_owned());
    let clock = Arc::new(Mutex::new(SystemTime::now()));
    let shown = clock.clone();
    let function = function().clock(move || *shown.lock().unwrap());
    (function.start(Vars::from_pairs(vars)).await.unwrap(), clock)
}

fn unix_ms(at: SystemTime) -> i64 {
    i64::try_from(at.duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// Positions of messages and of the targets of changes, by pages of `limit` from `after` on.
async fn synced(client: &Client, mut after: u64, limit: u32) -> (Vec<u64>, Vec<u64>) {
    let mut messages = Vec::new();
    let mut targets = Vec::new();
    loop {
        let (page, source) = ask(client, after, limit).await;
        assert_eq!(source, "log");
        messages.extend(page.messages.iter().map(|message| message.seq.get()));
        targets.extend(page.changes.iter().map(|change| change.target.get()));
        assert!(
            !page.more || page.through.get() > after,
            "a page that brings nothing"
        );
        after = page.through.get();
        if !page.more {
            return (messages, targets);
        }
    }
}

#[tokio::test]
async fn while_postgresql_is_away_the_configured_days_count_by_our_clock() {
    let world = World::with_own_postgres().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    // Only PostgreSQL knows that this room keeps its messages.
    sqlx::raw_sql("insert into retention values ('general', null)")
        .execute(&world.database().await)
        .await
        .unwrap();
    let say = async || {
        append(
            &publisher,
            "chat.general",
            r#"{"user":"ann","text":"hello"}"#,
        )
        .await
    };
    for _ in 1..=10 {
        say().await;
    }
    let moment = SystemTime::now();
    eventually("the clock moves on", SOON, async || {
        (unix_ms(SystemTime::now()) > unix_ms(moment)).then_some(())
    })
    .await;
    for _ in 11..=15 {
        say().await;
    }
    for (target, received) in [(1, moment), (12, SystemTime::now())] {
        let mut body = deletion(target, &format!("seq:{target}"), "soft");
        body["received"] = json!(unix_ms(received));
        append(&bootstrap, "change.chat.general", &body.to_string()).await;
    }
    world.postgres().stop().await;
    let (function, clock) = start_with(&world, "2").await;
    let check = async |time: SystemTime, first: u64, targets: &[u64]| {
        *clock.lock().unwrap() = time;
        for (limit, after) in [(1, 0), (4, 0), (500, 0), (4, 7), (500, 10)] {
            let messages: Vec<u64> = (first.max(after + 1)..=15).collect();
            assert_eq!(
                synced(&publisher, after, limit).await,
                (messages, targets.to_vec()),
                "limit {limit} after {after}"
            );
        }
    };
    check(SystemTime::now(), 1, &[1, 12]).await;
    check(moment + 2 * DAY - Duration::from_secs(60), 1, &[1, 12]).await;
    check(moment + 2 * DAY, 11, &[12]).await;
    check(SystemTime::now() + 2 * DAY, 16, &[]).await;
    world.postgres().start().await;
    source(&publisher, "both").await;
    let (page, _) = ask(&publisher, 0, 500).await;
    assert_eq!(
        (page.messages.len(), page.changes.len()),
        (15, 2),
        "PostgreSQL knows better"
    );
    function.stop().await.unwrap();
}
