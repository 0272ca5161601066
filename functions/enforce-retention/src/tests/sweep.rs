//! Sweeping a lot, a little at a time.

use std::time::Instant;

use super::*;

const EXPIRED: i64 = 200_000;
/// Of rooms that keep messages longer, and more than one step walks, before those of a room that does not.
const YOUNG: i64 = 6_000;

/// Rows far below the log's, as a worker would have stored them.
async fn fill(database: &PgPool) {
    sqlx::raw_sql("insert into rooms (name) values ('general'), ('forever'), ('short')")
        .execute(database)
        .await
        .unwrap();
    sqlx::raw_sql(
        "insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
         select seq, (select id from rooms where name = case when seq % 100 = 0 then 'forever' else 'general' end), 'zoe', 'seq:' || seq,
                true, 'old', now(), now() - interval '31 days' from generate_series(1, 200000) as seq;
         insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
         select seq, (select id from rooms where name = case when seq > 206000 then 'short' else 'general' end), 'zoe', 'seq:' || seq, true, 'young', now(), now() - interval '2 days'
           from generate_series(200001, 206100) as seq;
         insert into retention values ('forever', null), ('short', 1); analyze",
    )
    .execute(database)
    .await
    .unwrap();
}

#[tokio::test]
async fn storing_goes_on_while_many_expire() {
    let world = World::start().await;
    let (client, database) = (world.client("publisher").await, world.database().await);
    // As stream-bootstrap would: above what is stored.
    let lifter = world.client("stream-bootstrap").await;
    ask(
        &lifter,
        js_api::STREAM_PURGE.to_owned(),
        json!({"seq": 300_001}),
    )
    .await;
    fill(&database).await;
    let _worker = world.spawn("persist-message").await;
    let running = start(&world, &[SELDOM]).await;
    let left = async || count(&database, "messages").await;
    let old = async || {
        sqlx::query_scalar::<_, i64>("select count(*) from messages where seq < 300000")
            .fetch_one(&database)
            .await
            .unwrap()
    };
    let (mut said, mut waits, mut since) = (0, old().await, Instant::now());
    while waits > EXPIRED / 100 + YOUNG {
        say(&client, "chat.general", 20).await;
        said += 20;
        let now = old().await;
        if now < waits {
            (waits, since) = (now, Instant::now());
        }
        assert!(
            since.elapsed() < SOON,
            "{waits} are left, and none went for {SOON:?}"
        );
    }
    settled(&world).await;
    assert_eq!(
        left().await,
        EXPIRED / 100 + YOUNG + said,
        "what is for ever or young, and what was said meanwhile"
    );
    let stored: i64 = sqlx::query_scalar("select count(*) from messages where seq > 300000")
        .fetch_one(&database)
        .await
        .unwrap();
    assert_eq!(stored, said);
    let high: i64 = sqlx::query_scalar("select seq from swept")
        .fetch_one(&database)
        .await
        .unwrap();
    assert_eq!(high, 206_100);
    assert_eq!(run(&world, true).await.expired, 0);

    // What was for ever no longer is: a room with days of its own is swept from its beginning.
    sqlx::raw_sql("update retention set days = 30 where room = 'forever'")
        .execute(&database)
        .await
        .unwrap();
    assert_eq!(
        (
            run(&world, true).await.expired,
            run(&world, false).await.expired
        ),
        (2_000, 2_000)
    );
    assert_eq!(left().await, YOUNG + said);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn the_configured_days_are_everybodys() {
    let world = World::start().await;
    let (client, database) = (world.client("publisher").await, world.database().await);
    let days = async || {
        sqlx::query_scalar::<_, Option<i32>>("select days from retention where room = '*'")
            .fetch_one(&database)
            .await
            .unwrap()
    };
    say(&client, "chat.general", 3).await;
    store(&world).await;
    age(&database, 2, 10).await;
    let running = start(&world, &[("EXPIRE_DAYS", "0"), SELDOM]).await;
    eventually("it is noted", SOON, async || {
        days().await.is_none().then_some(())
    })
    .await;
    age(&database, 2, 100_000).await;
    assert_eq!(run(&world, false).await.expired, 0, "for ever");
    running.stop().await.unwrap();
    let running = start(&world, &[("EXPIRE_DAYS", "9"), SELDOM]).await;
    eventually("they are swept", SOON, async || {
        (count(&database, "messages").await == 1).then_some(())
    })
    .await;
    assert_eq!(days().await, Some(9));
    running.stop().await.unwrap();
}
