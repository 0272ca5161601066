//! Faults of the database, on a real server: sessions that end, slow queries, a server that stops.

use std::time::Duration;

use futures::future::join_all;
use sqlx::{AssertSqlSafe, PgPool};
use tokio::time::Instant;

use crate::database::Database;
use crate::error::{Class, DatabaseError};
use crate::settings::Settings;
use testing::{SOON, World, eventually};

mod lock;

const NAME: &str = "under-test";
/// The deadline that the functions give a query.
const LIMIT: Duration = Duration::from_secs(5);

/// As the functions are configured.
fn settings(url: &str) -> Settings {
    Settings {
        url: url.into(),
        connections: 4,
        idle_timeout: Duration::from_secs(5 * 60),
        max_lifetime: Duration::from_secs(30 * 60),
    }
}

fn connect(url: &str) -> Database {
    Database::new(&settings(url), NAME).unwrap()
}

async fn execute(pool: &PgPool, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(pool)
        .await
        .unwrap();
}

/// Changes a setting of the database that `pool` is connected to, for sessions that begin later.
async fn set(pool: &PgPool, what: &str) {
    let name: String = sqlx::query_scalar("select current_database()::text")
        .fetch_one(pool)
        .await
        .unwrap();
    execute(pool, &format!("alter database {name} {what}")).await;
}

async fn one(database: &Database) -> Option<i32> {
    let asked = database.run_if_there(LIMIT, async |connection| {
        sqlx::query_scalar("select 1").fetch_one(connection).await
    });
    asked.await.unwrap()
}

async fn sleep(database: &Database, seconds: i32, limit: Duration) -> Option<()> {
    let slept = database.run_if_there(limit, async |connection| {
        sqlx::query("select pg_sleep($1)")
            .bind(f64::from(seconds))
            .execute(connection)
            .await
            .map(|_| ())
    });
    slept.await.unwrap()
}

/// Uses as many connections as there may be.
async fn warm(database: &Database) {
    let slept = join_all((0..4).map(|_| {
        database.run(SOON, async |connection| {
            sqlx::query("select pg_sleep(0.1)")
                .execute(connection)
                .await
        })
    }));
    assert!(slept.await.iter().all(Result::is_ok));
}

async fn sessions(pool: &PgPool) -> i64 {
    let sql = "select count(*) from pg_stat_activity \
               where application_name = $1 and datname = current_database()";
    sqlx::query_scalar(sql)
        .bind(NAME)
        .fetch_one(pool)
        .await
        .unwrap()
}

async fn end_sessions(pool: &PgPool) {
    let sql = "select count(pg_terminate_backend(pid)) from pg_stat_activity \
               where application_name = $1 and datname = current_database()";
    let _: i64 = sqlx::query_scalar(sql)
        .bind(NAME)
        .fetch_one(pool)
        .await
        .unwrap();
    eventually("the sessions have ended", SOON, async || {
        (sessions(pool).await == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn sessions_that_were_ended_cost_no_request_its_reply() {
    let world = World::bare().await;
    let pool = world.database().await;
    let database = connect(&world.database_url());
    for _ in 0..3 {
        warm(&database).await;
        end_sessions(&pool).await;
        assert_eq!(join_all((0..8).map(|_| one(&database))).await, [Some(1); 8]);
        warm(&database).await;
        end_sessions(&pool).await;
        // The same for a write in a transaction.
        let written = database.run(LIMIT, async |connection| {
            let mut transaction = sqlx::Connection::begin(connection).await?;
            sqlx::query("create table if not exists written ()")
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await
        });
        written.await.unwrap();
    }
    set(&pool, "set idle_session_timeout = '50ms'").await;
    warm(&database).await;
    end_sessions(&pool).await;
    for _ in 0..3 {
        assert_eq!(one(&database).await, Some(1));
        eventually("PostgreSQL ends the idle session", SOON, async || {
            (sessions(&pool).await == 0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_database_that_was_read_only_is_written_to_as_soon_as_it_can_be() {
    let world = World::bare().await;
    let pool = world.database().await;
    let database = connect(&world.database_url());
    execute(&pool, "create table notes (note int)").await;
    set(&pool, "set default_transaction_read_only = on").await;
    let write = async || {
        let note = database.run(LIMIT, async |connection| {
            sqlx::query("insert into notes values (1)")
                .execute(connection)
                .await
        });
        note.await.map(|_| ())
    };
    warm(&database).await;
    for _ in 0..3 {
        let error = write().await.unwrap_err();
        assert_eq!(
            (error.class, error.sqlstate.as_deref()),
            (Class::Transient, Some("25006")),
            "{error}"
        );
        assert!(error.to_string().contains("read-only"), "{error}");
        // Reads succeed all the while.
        assert_eq!(one(&database).await, Some(1));
    }
    warm(&database).await;
    let name: String = sqlx::query_scalar("select current_database()::text")
        .fetch_one(&pool)
        .await
        .unwrap();
    let reset = format!(
        "set default_transaction_read_only = off; \
         alter database {name} reset default_transaction_read_only"
    );
    execute(&pool, &reset).await;
    for _ in 0..4 {
        write().await.unwrap();
    }
}

#[tokio::test]
async fn a_query_that_is_slow_for_one_costs_no_other_request_its_reply() {
    let world = World::bare().await;
    let database = Database::new(
        &Settings {
            connections: 2,
            ..settings(&world.database_url())
        },
        NAME,
    )
    .unwrap();
    let slow = async || assert_eq!(sleep(&database, 60, Duration::from_millis(500)).await, None);
    let others = async || {
        for _ in 0..50 {
            assert_eq!(one(&database).await, Some(1), "only another query is slow");
        }
    };
    for _ in 0..3 {
        tokio::join!(slow(), others());
        others().await;
    }
    // Waiting for a connection does not mean that PostgreSQL is away either.
    let waiting = join_all((0..4).map(|_| sleep(&database, 60, Duration::from_millis(300))));
    assert_eq!(waiting.await, [None; 4]);
    others().await;
}

#[tokio::test]
async fn a_query_that_was_given_up_ends_on_the_server() {
    let world = World::bare().await;
    let pool = world.database().await;
    let database = connect(&world.database_url());
    execute(&pool, "create table locked ()").await;
    let mut connection = pool.acquire().await.unwrap();
    let mut transaction = sqlx::Connection::begin(&mut *connection).await.unwrap();
    sqlx::query("lock table locked")
        .execute(&mut *transaction)
        .await
        .unwrap();
    let given_up = Instant::now();
    let waits = async |connection: &mut sqlx::PgConnection| {
        sqlx::query("select from locked").execute(connection).await
    };
    let (slept, waited) = tokio::join!(
        sleep(&database, 60, Duration::from_millis(300)),
        database.run(Duration::from_millis(300), waits)
    );
    assert_eq!(slept, None);
    assert!(
        waited
            .unwrap_err()
            .to_string()
            .contains("did not answer within 300ms")
    );
    eventually("both have ended on the server", SOON, async || {
        (sessions(&pool).await == 0).then_some(())
    })
    .await;
    // If their connections stayed open, they would run for 5 and 20 seconds.
    assert!(
        given_up.elapsed() < Duration::from_secs(4),
        "{:?}",
        given_up.elapsed()
    );
}

#[tokio::test]
async fn a_server_that_is_away_is_noticed_once_and_its_return_too() {
    let world = World::builder().bare().own_postgres().start().await;
    let database = connect(&world.database_url());
    warm(&database).await;
    world.postgres().stop().await;
    let begun = Instant::now();
    assert_eq!(join_all((0..8).map(|_| one(&database))).await, [None; 8]);
    assert!(
        begun.elapsed() < LIMIT,
        "a refused connection is no reason to wait: {:?}",
        begun.elapsed()
    );
    let error = database
        .run(SOON, async |connection| {
            sqlx::query("select").execute(connection).await
        })
        .await
        .unwrap_err();
    assert_eq!(
        (error.class, error.to_string().as_str()),
        (
            Class::Transient,
            "the connection to PostgreSQL broke or was refused"
        )
    );
    world.postgres().start().await;
    eventually("PostgreSQL is back", SOON, async || one(&database).await).await;
    // A server that is there and silent, as behind a cut network.
    warm(&database).await;
    world.postgres().pause().await;
    assert_eq!(sleep(&database, 0, LIMIT).await, None);
    let begun = Instant::now();
    assert_eq!(join_all((0..50).map(|_| one(&database))).await, [None; 50]);
    assert!(
        begun.elapsed() < LIMIT / 2,
        "all requests noticed: {:?}",
        begun.elapsed()
    );
    world.postgres().resume();
    eventually("PostgreSQL is back", SOON, async || one(&database).await).await;
}

#[tokio::test]
async fn an_error_that_an_operator_fixes_is_returned_at_once() {
    let world = World::builder().bare().own_postgres().start().await;
    let pool = world.database().await;
    let roles = "create role plain login password 'right'; create role nobody_yet login; \
                 create table messages ()";
    execute(&pool, roles).await;
    let refusal = async |url: &str, sql: &'static str| -> DatabaseError {
        let database = connect(url);
        let begun = Instant::now();
        let error = database
            .run(SOON, async |connection| {
                sqlx::raw_sql(sql).execute(connection).await
            })
            .await
            .unwrap_err();
        assert!(begun.elapsed() < SOON / 2);
        // The circuit breaker stays closed.
        let again = database.run_if_there(LIMIT, async |connection| {
            sqlx::raw_sql(sql).execute(connection).await
        });
        assert_eq!(again.await.unwrap_err().to_string(), error.to_string());
        assert_eq!(error.class, Class::Deployment, "{error}");
        error
    };
    let url = world.database_url();
    let as_plain = url.replace("scrollback@", "plain@");
    for (url, sql, named) in [
        (
            format!("{url}_not"),
            "select",
            ["3D000", "no such database"],
        ),
        (
            as_plain.clone(),
            "create table notes ()",
            ["42501", "search_path"],
        ),
        (
            as_plain.clone(),
            "select from messages",
            ["42501", "lacks a right"],
        ),
        (
            url.clone(),
            "create table messages ()",
            ["42P07", "schema of its own"],
        ),
        (
            url.clone(),
            "select from missing",
            ["42P01", "stream-bootstrap"],
        ),
        (
            format!("{url}?sslmode=require"),
            "select",
            ["does not offer TLS", "sslmode"],
        ),
    ] {
        let line = refusal(&url, sql).await.to_string();
        assert!(named.iter().all(|words| line.contains(words)), "{line}");
    }
    let hba: String = sqlx::query_scalar("show hba_file")
        .fetch_one(&pool)
        .await
        .unwrap();
    let rules = "host all plain 127.0.0.1/32 scram-sha-256'||chr(10)||\
                 'host all scrollback 127.0.0.1/32 trust";
    let write_rules = format!(
        "copy (select unnest(string_to_array('{rules}', chr(10)))) to '{hba}'; \
         select pg_reload_conf()"
    );
    execute(&pool, &write_rules).await;
    let wrong = url.replace("scrollback@", "plain:wrong@");
    eventually("the new rules hold", SOON, async || {
        let asked = connect(&wrong)
            .run(SOON, async |connection| {
                sqlx::query("select").execute(connection).await
            })
            .await;
        asked.is_err().then_some(())
    })
    .await;
    let line = refusal(&wrong, "select").await.to_string();
    assert!(
        ["28P01", "DATABASE_URL", ".env", "volume"]
            .iter()
            .all(|words| line.contains(words)),
        "{line}"
    );
    let line = refusal(&url.replace("scrollback@", "nobody_yet@"), "select")
        .await
        .to_string();
    assert!(
        ["28000", "pg_hba.conf"]
            .iter()
            .all(|words| line.contains(words)),
        "{line}"
    );
}

#[tokio::test]
async fn no_password_is_printed() {
    let database = connect("postgres://somebody:hunter2@127.0.0.1:1/nowhere");
    assert!(!format!("{database:?}").contains("hunter2"), "{database:?}");
}
