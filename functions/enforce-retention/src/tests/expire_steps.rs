//! Deletes many expired messages in small steps.

use std::time::Instant;

use super::*;

const EXPIRED: i64 = 200_000;
/// Messages of rooms that keep them longer, before those of a room that does not: more than one
/// step scans.
const YOUNG: i64 = 6_000;

/// Stores rows far below the stream's first sequence, as a worker would have.
async fn fill(database: &PgPool) {
    sqlx::raw_sql("insert into rooms (name) values ('general'), ('forever'), ('short')")
        .execute(database)
        .await
        .unwrap();
    sqlx::raw_sql(
        "insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
         select seq, (select id from rooms
                       where name = case when seq % 100 = 0 then 'forever' else 'general' end),
                'zoe', 'seq:' || seq, true, 'old', now(), now() - interval '31 days'
           from generate_series(1, 200000) as seq;
         insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
         select seq, (select id from rooms
                       where name = case when seq > 206000 then 'short' else 'general' end),
                'zoe', 'seq:' || seq, true, 'young', now(), now() - interval '2 days'
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
    let client = world.client("publisher").await;
    let database = world.database().await;
    // As stream-bootstrap does: the stream continues above what is stored.
    let bootstrap = world.client("stream-bootstrap").await;
    let purge = js_api::STREAM_PURGE.to_owned();
    ask(&bootstrap, purge, json!({"seq": 300_001})).await;
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
    let mut published = 0;
    let mut left_over = old().await;
    let mut since = Instant::now();
    while left_over > EXPIRED / 100 + YOUNG {
        publish_texts(&client, "chat.general", 20).await;
        published += 20;
        let now = old().await;
        if now < left_over {
            left_over = now;
            since = Instant::now();
        }
        assert!(
            since.elapsed() < SOON,
            "{left_over} are left, and none was deleted for {SOON:?}"
        );
    }
    settled(&world).await;
    assert_eq!(
        left().await,
        EXPIRED / 100 + YOUNG + published,
        "what is kept for ever or young, and what was published meanwhile"
    );
    let stored: i64 = sqlx::query_scalar("select count(*) from messages where seq > 300000")
        .fetch_one(&database)
        .await
        .unwrap();
    assert_eq!(stored, published);
    let high: i64 = sqlx::query_scalar("select seq from swept")
        .fetch_one(&database)
        .await
        .unwrap();
    assert_eq!(high, 206_100);
    assert_eq!(run(&world, true).await.expired, 0);

    // A room that kept messages for ever no longer does: it is scanned from its beginning.
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
    assert_eq!(left().await, YOUNG + published);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn the_configured_days_are_the_default() {
    let world = World::start().await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    let days = async || {
        sqlx::query_scalar::<_, Option<i32>>("select days from retention where room = '*'")
            .fetch_one(&database)
            .await
            .unwrap()
    };
    publish_texts(&client, "chat.general", 3).await;
    store(&world).await;
    age(&database, 2, 10).await;
    let running = start(&world, &[("EXPIRE_DAYS", "0"), SELDOM]).await;
    eventually("it is written", SOON, async || {
        days().await.is_none().then_some(())
    })
    .await;
    age(&database, 2, 100_000).await;
    assert_eq!(run(&world, false).await.expired, 0, "for ever");
    running.stop().await.unwrap();
    let running = start(&world, &[("EXPIRE_DAYS", "9"), SELDOM]).await;
    eventually("they are deleted", SOON, async || {
        (count(&database, "messages").await == 1).then_some(())
    })
    .await;
    assert_eq!(days().await, Some(9));
    running.stop().await.unwrap();
}
