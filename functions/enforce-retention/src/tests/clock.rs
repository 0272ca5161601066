//! A wrong clock destroys nothing, and a log line reports what was deleted.

use super::*;

const OFTEN: (&str, &str) = ("RETENTION_INTERVAL_MS", "50");

/// As if PostgreSQL had been restarted on a host whose clock is `days` ahead: all sessions end, and
/// new ones find another `now()` before PostgreSQL's own.
async fn set_clock_ahead(database: &PgPool, days: i32) {
    let name: String = sqlx::query_scalar("select current_database()::text")
        .fetch_one(database)
        .await
        .unwrap();
    let search_path = if days == 0 {
        "public"
    } else {
        "wrong_clock, public, pg_catalog"
    };
    let sql = format!(
        "create schema if not exists wrong_clock;
         create or replace function wrong_clock.now() returns timestamptz
             language sql stable parallel safe as
             $$ select pg_catalog.now() + {days} * interval '1 day' $$;
         alter database {name} set search_path = {search_path};
         select pg_terminate_backend(pid) from pg_stat_activity
          where datname = '{name}' and pid <> pg_backend_pid()"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
        .execute(database)
        .await
        .unwrap();
}

/// The gauge of the clocks' difference, and how many runs of the expire job failed.
async fn expire_job(client: &Client) -> (u64, u64) {
    let stats = ask(client, "$SRV.STATS.enforce-retention".to_owned(), json!({})).await;
    let endpoints = stats["endpoints"].as_array().unwrap();
    let sweep = endpoints
        .iter()
        .find(|endpoint| endpoint["name"] == "sweep")
        .unwrap();
    (
        sweep["data"]["clock_disagreement_s"]
            .as_u64()
            .unwrap_or_default(),
        sweep["num_errors"].as_u64().unwrap(),
    )
}

/// Sets PostgreSQL's clock ahead, and waits until the function has noticed several times.
async fn check_clock_ahead(database: &PgPool, operator: &Client) {
    set_clock_ahead(database, 40).await;
    let before = expire_job(operator).await.1;
    // The first errors may come from the sessions that were terminated.
    let noticed = |&(apart, errors): &(u64, u64)| apart > 0 && errors > before + 3;
    let (apart, _) = eventually("it noticed, several times", SOON, async || {
        Some(expire_job(operator).await).filter(noticed)
    })
    .await;
    assert!((39 * 86_400..=41 * 86_400).contains(&apart), "{apart}");
    let refused = ask(operator, RETENTION_RUN.subject(&[]), json!({})).await;
    assert!(
        refused["error"]["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("hours ahead of NATS'")),
        "{refused}"
    );
}

#[tokio::test]
async fn a_clock_that_is_weeks_ahead_destroys_nothing() {
    let world = World::start().await;
    let client = world.client("publisher").await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let _history = world.spawn("get-history").await;
    publish_texts(&client, "chat.general", 5).await;
    store(&world).await;
    let retention = world.spawn_with("enforce-retention", &[OFTEN]).await;
    let written = async || {
        sqlx::query_scalar::<_, i64>("select count(*) from log_clock")
            .fetch_one(&database)
            .await
            .unwrap()
    };
    eventually("NATS' time is written", SOON, async || {
        (written().await == 1).then_some(())
    })
    .await;

    check_clock_ahead(&database, &operator).await;
    let complaint = "PostgreSQL's clock is 960 hours ahead of NATS'";
    assert!(
        retention.stderr().contains(complaint),
        "{}",
        retention.stderr()
    );
    assert_eq!(count(&database, "messages").await, 5);
    assert_eq!(
        seqs(&history(&client, "general", json!({})).await),
        [1, 2, 3, 4, 5],
        "readers use NATS' clock, too"
    );

    // A clock that is behind is refused too, because then nothing would expire.
    set_clock_ahead(&database, -40).await;
    let complaint = "hours behind NATS'";
    eventually("it noticed", SOON, async || {
        retention.stderr().contains(complaint).then_some(())
    })
    .await;

    set_clock_ahead(&database, 0).await;
    eventually("the clocks agree", SOON, async || {
        (expire_job(&operator).await.0 == 0).then_some(())
    })
    .await;
    age(&database, 3, 31).await;
    eventually("the old ones went", SOON, async || {
        (count(&database, "messages").await == 2).then_some(())
    })
    .await;
    let line =
        "expired messages were deleted messages=3 deletions=0 moves=0 rooms=1 received_until=";
    eventually("a log line reports what was deleted", SOON, async || {
        retention.stderr().contains(line).then_some(())
    })
    .await;
    assert_eq!(seqs(&history(&client, "general", json!({})).await), [4, 5]);
    assert!(retention.terminate().await.success());
}

/// How many hours before PostgreSQL's clock a time is.
async fn hours(database: &PgPool, sql: &str) -> i32 {
    let sql = format!("select round(extract(epoch from now() - {sql}) / 3600)::int");
    sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
        .fetch_one(database)
        .await
        .unwrap()
}

#[tokio::test]
async fn readers_trust_a_clock_only_within_the_tolerance() {
    let world = World::start().await;
    let database = world.database().await;
    assert_eq!(
        (
            hours(&database, "believed_now()").await,
            hours(&database, "cutoff('general')").await
        ),
        (0, 30 * 24),
        "nobody has written NATS' time"
    );
    let set_time = "insert into log_clock values (true, now() - interval '100 hours', '6 hours')";
    sqlx::raw_sql(set_time).execute(&database).await.unwrap();
    assert_eq!(
        (
            hours(&database, "believed_now()").await,
            hours(&database, "cutoff('general')").await
        ),
        (94, 94 + 30 * 24)
    );
    let ms = "to_timestamp(cutoff_ms('general') / 1000.0)";
    assert_eq!(hours(&database, ms).await, 94 + 30 * 24);
    // The newest message has NATS' time, too.
    sqlx::raw_sql(
        "insert into rooms (name) values ('general');
         insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
         select 1, id, 'ann', 'seq:1', true, 'x', now(), now() - interval '10 hours' from rooms",
    )
    .execute(&database)
    .await
    .unwrap();
    assert_eq!(hours(&database, "believed_now()").await, 4);
    sqlx::raw_sql("update messages set received_at = now()")
        .execute(&database)
        .await
        .unwrap();
    assert_eq!(hours(&database, "believed_now()").await, 0);
}

#[tokio::test]
async fn each_room_has_its_own_cutoff() {
    let world = World::start().await;
    let database = world.database().await;
    // A room's own days, those of direct messages, "for ever", and no row at all.
    sqlx::raw_sql("insert into retention values ('general', 1), ('dm.*', 2), ('forever', null)")
        .execute(&database)
        .await
        .unwrap();
    assert_eq!(
        (
            hours(&database, "cutoff('general')").await,
            hours(&database, "cutoff('dm.a.b')").await,
            hours(&database, "cutoff('other')").await
        ),
        (24, 48, 720)
    );
    let endless: (bool, Option<i64>) =
        sqlx::query_as("select isfinite(cutoff('forever')), cutoff_ms('forever')")
            .fetch_one(&database)
            .await
            .unwrap();
    assert_eq!(endless, (false, None));
    sqlx::raw_sql("delete from retention")
        .execute(&database)
        .await
        .unwrap();
    let endless: bool = sqlx::query_scalar("select isfinite(cutoff('general'))")
        .fetch_one(&database)
        .await
        .unwrap();
    assert!(!endless, "a mistake must not cost messages");
}
