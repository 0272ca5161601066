//! A database that other programs use: it is left unchanged, and the error says how to share it.

use serde_json::{Value, json};
use sqlx::AssertSqlSafe;

use super::{apply, ask, bare, check, start, start_with};
use protocol::endpoints::BOOTSTRAP_APPLY;
use testing::{SOON, World, eventually};

async fn execute(world: &World, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(&world.database().await)
        .await
        .unwrap();
}

#[tokio::test]
async fn tables_of_another_program_stay_and_a_schema_of_its_own_works() {
    let world = bare().await;
    execute(
        &world,
        "create table users (id int); create table messages (id int)",
    )
    .await;
    let line = start(&world).await.unwrap_err().to_string();
    assert!(
        ["42P07", "schema of its own", "alter role"]
            .iter()
            .all(|words| line.contains(words)),
        "{line}"
    );
    let made: bool = sqlx::query_scalar("select to_regclass('_sqlx_migrations') is not null")
        .fetch_one(&world.database().await)
        .await
        .unwrap();
    assert!(!made, "what did not succeed leaves nothing behind");

    // Another application that uses sqlx.
    execute(
        &world,
        "create table _sqlx_migrations (version bigint primary key, description text not null,
            installed_on timestamptz not null default now(), success boolean not null,
            checksum bytea not null, execution_time bigint not null);
         insert into _sqlx_migrations values (20240101120000, 'shop', now(), true, '\\x00', 1)",
    )
    .await;
    let line = start(&world).await.unwrap_err().to_string();
    assert!(
        ["20240101120000", "schema of its own", "alter role"]
            .iter()
            .all(|words| line.contains(words)),
        "{line}"
    );

    execute(
        &world,
        "create role beside_others login; create schema chat authorization beside_others;
         alter role beside_others set search_path = chat",
    )
    .await;
    let url = world
        .database_url()
        .replace("scrollback@", "beside_others@");
    let running = start_with(&world, &[("DATABASE_URL", &url)]).await.unwrap();
    let found = check(&world).await;
    assert!(found.ok, "{}", json!(found.differences));
    running.stop().await.unwrap();
    let shop: i64 = sqlx::query_scalar("select count(*) from public._sqlx_migrations")
        .fetch_one(&world.database().await)
        .await
        .unwrap();
    assert_eq!(shop, 1);
}

#[tokio::test]
async fn a_database_that_cannot_hold_every_character_is_refused() {
    let world = bare().await;
    for encoding in ["LATIN1", "SQL_ASCII"] {
        let name = format!("encoded_{}", encoding.to_lowercase());
        let create = format!(
            "create database {name} template template0 encoding '{encoding}'
                    locale_provider libc locale 'C'"
        );
        execute(&world, &create).await;
        let line = start_with(&world, &[("DATABASE_URL", &world.postgres().url(&name))])
            .await
            .unwrap_err()
            .to_string();
        assert!(
            [encoding, name.as_str(), "encoding 'UTF8'", "DATABASE_URL"]
                .iter()
                .all(|words| line.contains(words)),
            "{line}"
        );
    }
}

/// As after a failover, when an old session still reaches the former primary.
#[tokio::test]
async fn a_session_from_when_the_database_was_read_only_is_not_kept() {
    let world = bare().await;
    let running = start(&world).await.unwrap();
    execute(
        &world,
        "do $$ begin
             execute format('alter database %I set default_transaction_read_only = on',
                            current_database());
         end $$;
         select pg_terminate_backend(pid) from pg_stat_activity
          where datname = current_database() and application_name = 'stream-bootstrap'",
    )
    .await;
    let operator = world.client("operator").await;
    eventually("applying is refused", SOON, async || {
        let reply: Value = ask(&operator, BOOTSTRAP_APPLY.subject(&[]), json!({})).await;
        (!reply["error"].is_null()).then_some(())
    })
    .await;
    execute(
        &world,
        "set transaction read write;
         do $$ begin
             execute format('alter database %I reset default_transaction_read_only',
                            current_database());
         end $$",
    )
    .await;
    apply(&world).await;
    running.stop().await.unwrap();
}
