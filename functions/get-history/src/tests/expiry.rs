//! Expired messages, read from the stream. Nothing can be made older there, so the clock moves
//! instead.

use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;
use sqlx::AssertSqlSafe;

use super::*;
use protocol::endpoints::DM_HISTORY;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A function with `EXPIRE_DAYS`, and its clock.
async fn history_with(world: &World, days: &str) -> (Running, Arc<Mutex<SystemTime>>) {
    let mut vars = world.vars("get-history");
    vars.insert("EXPIRE_DAYS".to_owned(), days.to_owned());
    let clock = Arc::new(Mutex::new(SystemTime::now()));
    let shown = clock.clone();
    let function = function().clock(move || *shown.lock().unwrap());
    (function.start(Vars::from_pairs(vars)).await.unwrap(), clock)
}

fn unix_ms(at: SystemTime) -> i64 {
    i64::try_from(at.duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// A time between the messages published so far and the next ones.
async fn moment() -> SystemTime {
    let moment = SystemTime::now();
    eventually("the clock moves on", SOON, async || {
        (unix_ms(SystemTime::now()) > unix_ms(moment)).then_some(())
    })
    .await;
    moment
}

async fn delete(world: &World, target: u64, received: SystemTime) {
    let body = json!({
        "type": "delete", "target": target, "id": format!("seq:{target}"), "derived": true,
        "user": "ann", "mode": "soft", "by": "ann", "timestamp": 1_700_000_000_000_i64,
        "received": unix_ms(received),
    });
    publish_body(
        &world.client("stream-bootstrap").await,
        "change.chat.general",
        &body.to_string(),
    )
    .await;
}

/// Twenty messages; the moment; five more. One of the twenty and the second of the five are
/// deleted. In a direct conversation, six messages before the moment and three after it.
async fn publish_around_a_moment(world: &World, client: &Client) -> SystemTime {
    for number in 1..=20 {
        publish(client, "general", &number.to_string()).await;
        publish(client, "quiet", "x").await;
    }
    let direct = async |from: &str, to: &str, number: usize| {
        let body = json!({"user": from, "text": number.to_string()}).to_string();
        publish_body(client, &format!("dm.{from}.{to}"), &body).await;
    };
    for number in 1..=6 {
        direct("ann", "bob", number).await;
    }
    let moment = moment().await;
    for number in 21..=25 {
        publish(client, "general", &number.to_string()).await;
    }
    direct("bob", "ann", 7).await;
    direct("ann", "bob", 8).await;
    direct("bob", "ann", 9).await;
    delete(world, 1, moment).await;
    delete(world, 48, SystemTime::now()).await;
    moment
}

/// The texts, with a word for tombstones.
fn shown(got: &Got, source: &str) -> Vec<String> {
    assert!(got.source == source || got.messages.is_empty(), "{got:?}");
    got.messages
        .iter()
        .map(|message| {
            if message.deleted {
                "deleted".to_owned()
            } else {
                message.text.clone()
            }
        })
        .collect()
}

/// A whole conversation, page by page from the newest one.
async fn backwards(client: &Client, subject: &str, limit: u32, source: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut body = json!({ "limit": limit });
    loop {
        let page = ask_raw(client, subject.to_owned(), &body.to_string())
            .await
            .unwrap();
        found.splice(0..0, shown(&page, source));
        if !page.more {
            return found;
        }
        body = json!({"limit": limit,
            "before": page.messages.first().expect("a page with more has a first message").seq});
    }
}

/// A whole room, page by page after a cursor.
async fn forwards(client: &Client, limit: u32, source: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut after = 0;
    loop {
        let page = ask(client, "general", json!({"limit": limit, "after": after})).await;
        found.extend(shown(&page, source));
        if !page.more {
            return found;
        }
        assert!(page.through > after, "a page that brings nothing");
        after = page.through;
    }
}

/// A whole room, by every kind of request.
async fn everything(client: &Client, source: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for body in [
        json!({}),
        json!({"after": 0}),
        json!({"before": i64::MAX}),
        json!({"around": 48}),
    ] {
        found.push(shown(&ask(client, "general", body).await, source));
    }
    for limit in [1, 4] {
        found.push(backwards(client, &HISTORY.subject(&["general"]), limit, source).await);
        found.push(forwards(client, limit, source).await);
    }
    found
}

/// The numbers from `first` on, with tombstones for the deleted ones.
fn numbers(first: usize) -> Vec<String> {
    let shown = |number: usize| {
        if [1, 22].contains(&number) {
            "deleted".to_owned()
        } else {
            number.to_string()
        }
    };
    (first..=25).map(shown).collect()
}

#[tokio::test]
async fn while_postgresql_is_away_the_configured_days_count_by_our_clock() {
    let world = World::with_own_postgres().await;
    let client = world.client("publisher").await;
    // Only PostgreSQL knows that this room keeps its messages.
    sqlx::raw_sql("insert into retention values ('general', null)")
        .execute(&world.database().await)
        .await
        .unwrap();
    let moment = publish_around_a_moment(&world, &client).await;
    world.postgres().stop().await;
    let (function, clock) = history_with(&world, "2").await;
    let at = |time: SystemTime| *clock.lock().unwrap() = time;
    assert_eq!(everything(&client, "log").await, vec![numbers(1); 8]);
    at(moment + 2 * DAY - Duration::from_secs(60));
    assert_eq!(
        everything(&client, "log").await,
        vec![numbers(1); 8],
        "a minute before"
    );
    at(moment + 2 * DAY);
    assert_eq!(
        everything(&client, "log").await,
        vec![numbers(21); 8],
        "at their time, and their tombstones with them"
    );
    for limit in [1, 2, 5] {
        let direct = backwards(&client, &DM_HISTORY.subject(&["bob", "ann"]), limit, "log").await;
        assert_eq!(direct, ["7", "8", "9"], "both directions, {limit} a page");
    }
    let quiet = ask(&client, "quiet", json!({"limit": 3})).await;
    assert!(
        quiet.messages.is_empty() && !quiet.more && quiet.source == "log",
        "nothing is there, and that is no error: {quiet:?}"
    );
    // Also of a stream that was trimmed. But a message that was trimmed before it expired may be
    // stored.
    let trimmer = world.client("enforce-retention").await;
    trimmer
        .request(
            protocol::js_api::STREAM_PURGE,
            json!({"seq": 5}).to_string().into(),
        )
        .await
        .unwrap();
    let page = async |room: &str| {
        let got = ask(&client, room, json!({})).await;
        (got.messages.len(), got.more)
    };
    assert_eq!(
        (page("general").await, page("quiet").await),
        ((5, false), (0, false))
    );
    at(moment);
    assert_eq!(
        (page("general").await, page("quiet").await),
        ((23, true), (18, true))
    );
    at(SystemTime::now() + 2 * DAY);
    assert_eq!(
        (page("general").await, page("quiet").await),
        ((0, false), (0, false))
    );
    world.postgres().start().await;
    let source = async || ask(&client, "general", json!({})).await.source;
    eventually("PostgreSQL is there again", SOON, async || {
        (source().await == "both").then_some(())
    })
    .await;
    assert_eq!(
        page("general").await,
        (24, false),
        "it knows better, and that nothing but a tombstone is missing"
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn where_nothing_expires_nothing_does_while_postgresql_is_away() {
    let world = World::with_own_postgres().await;
    let client = world.client("publisher").await;
    publish(&client, "general", "1").await;
    world.postgres().stop().await;
    let (function, clock) = history_with(&world, "0").await;
    *clock.lock().unwrap() += 36_500 * DAY;
    assert_eq!(ask(&client, "general", json!({})).await.texts(), ["1"]);
    function.stop().await.unwrap();
}

#[tokio::test]
async fn messages_that_expire_before_they_are_stored_leave_paging_an_end() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    let moment = publish_around_a_moment(&world, &client).await;
    let sql = format!(
        "create or replace function room_cutoff(asked text) returns table (cutoff timestamptz)
         language sql stable as
         $$ select to_timestamp({} / 1000.0) $$",
        unix_ms(moment)
    );
    sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(&database)
        .await
        .unwrap();
    assert_eq!(everything(&client, "both").await, vec![numbers(21); 8]);
    function.stop().await.unwrap();
}
