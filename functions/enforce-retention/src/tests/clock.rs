//! One clock that is wrong destroys nothing, and what is swept is said.

use super::*;

const OFTEN: (&str, &str) = ("RETENTION_INTERVAL_MS", "50");

/// As if PostgreSQL had been started again on a host whose clock is `days` ahead: sessions that begin now, and everybody's do,
/// find another `now()` before PostgreSQL's own.
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
         create or replace function wrong_clock.now() returns timestamptz language sql stable parallel safe as
             $$ select pg_catalog.now() + {days} * interval '1 day' $$;
         alter database {name} set search_path = {search_path};
         select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}' and pid <> pg_backend_pid()"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
        .execute(database)
        .await
        .unwrap();
}

/// What the gauge says, and how often sweeping failed.
async fn sweeping(client: &Client) -> (u64, u64) {
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

#[tokio::test]
async fn a_clock_that_is_weeks_ahead_destroys_nothing() {
    let world = World::start().await;
    let (client, operator) = (
        world.client("publisher").await,
        world.client("operator").await,
    );
    let (database, _history) = (world.database().await, world.spawn("get-history").await);
    say(&client, "chat.general", 5).await;
    store(&world).await;
    let retention = world.spawn_with("enforce-retention", &[OFTEN]).await;
    let noted = async || {
        sqlx::query_scalar::<_, i64>("select count(*) from log_clock")
            .fetch_one(&database)
            .await
            .unwrap()
    };
    eventually("it knows the clock", SOON, async || {
        (noted().await == 1).then_some(())
    })
    .await;

    set_clock_ahead(&database, 40).await;
    let before = sweeping(&operator).await.1;
    // The first errors may be the sessions that were ended.
    let noticed = |&(apart, errors): &(u64, u64)| apart > 0 && errors > before + 3;
    let (apart, _) = eventually("it noticed, several times", SOON, async || {
        Some(sweeping(&operator).await).filter(noticed)
    })
    .await;
    assert!((39 * 86_400..=41 * 86_400).contains(&apart), "{apart}");
    let refused = ask(&operator, RETENTION_RUN.subject(&[]), json!({})).await;
    assert!(
        refused["error"]["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("hours ahead of NATS'")),
        "{refused}"
    );
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
        "readers go by NATS' clock, too"
    );

    // Behind is no better: then nothing would expire.
    set_clock_ahead(&database, -40).await;
    let complaint = "hours behind NATS'";
    eventually("it noticed", SOON, async || {
        retention.stderr().contains(complaint).then_some(())
    })
    .await;

    set_clock_ahead(&database, 0).await;
    eventually("the clocks agree", SOON, async || {
        (sweeping(&operator).await.0 == 0).then_some(())
    })
    .await;
    age(&database, 3, 31).await;
    eventually("the old ones went", SOON, async || {
        (count(&database, "messages").await == 2).then_some(())
    })
    .await;
    let line = "what has expired was swept messages=3 deletions=0 moves=0 rooms=1 received_until=";
    eventually("it says what it took", SOON, async || {
        retention.stderr().contains(line).then_some(())
    })
    .await;
    assert_eq!(seqs(&history(&client, "general", json!({})).await), [4, 5]);
    assert!(retention.terminate().await.success());
}

#[tokio::test]
async fn readers_believe_a_clock_only_as_far_as_nats_bears_it_out() {
    let world = World::start().await;
    let database = world.database().await;
    let hours = async |sql: &str| {
        let sql = format!("select round(extract(epoch from now() - {sql}) / 3600)::int");
        sqlx::query_scalar::<_, i32>(sqlx::AssertSqlSafe(sql))
            .fetch_one(&database)
            .await
            .unwrap()
    };
    assert_eq!(
        (
            hours("believed_now()").await,
            hours("cutoff('general')").await
        ),
        (0, 30 * 24),
        "nobody has noted NATS' clock"
    );
    let note = "insert into log_clock values (true, now() - interval '100 hours', '6 hours')";
    sqlx::raw_sql(note).execute(&database).await.unwrap();
    assert_eq!(
        (
            hours("believed_now()").await,
            hours("cutoff('general')").await
        ),
        (94, 94 + 30 * 24)
    );
    let ms = "to_timestamp(cutoff_ms('general') / 1000.0)";
    assert_eq!(hours(ms).await, 94 + 30 * 24);
    // The newest message carries NATS' time, too.
    sqlx::raw_sql(
        "insert into rooms (name) values ('general');
         insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
         select 1, id, 'ann', 'seq:1', true, 'x', now(), now() - interval '10 hours' from rooms",
    )
    .execute(&database)
    .await
    .unwrap();
    assert_eq!(hours("believed_now()").await, 4);
    sqlx::raw_sql("update messages set received_at = now()")
        .execute(&database)
        .await
        .unwrap();
    assert_eq!(hours("believed_now()").await, 0);
    // A room's own days, those of direct messages, for ever, and no row at all.
    sqlx::raw_sql("insert into retention values ('general', 1), ('dm.*', 2), ('forever', null)")
        .execute(&database)
        .await
        .unwrap();
    assert_eq!(
        (
            hours("cutoff('general')").await,
            hours("cutoff('dm.a.b')").await,
            hours("cutoff('other')").await
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
