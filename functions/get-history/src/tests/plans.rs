//! Plans: whatever PostgreSQL believes of its tables, every statement of a page uses an index.

use sqlx::{AssertSqlSafe, PgPool};

use super::*;
use timeline::chat::open_database;
use timeline::dedup::LOOKUP;
use timeline::query::{NEWER, NEWER_IN_BYTES, OLDER, OLDER_IN_BYTES};

/// The plan of a statement with these arguments, in a session like the function's.
async fn plan(world: &World, statement: &str, types: &str, arguments: &str) -> String {
    let vars = Vars::from_pairs(world.vars("get-history"));
    let connected = open_database(&vars, "test").unwrap();
    let plan = connected.run(SOON, async |connection| {
        sqlx::raw_sql(AssertSqlSafe(format!(
            "prepare asked ({types}) as {statement}"
        )))
        .execute(&mut *connection)
        .await?;
        sqlx::query_scalar::<_, String>(AssertSqlSafe(format!(
            "explain execute asked ({arguments})"
        )))
        .fetch_all(connection)
        .await
    });
    plan.await.unwrap().join("\n")
}

async fn check(world: &World, state: &str) {
    let last = "9223372036854775807";
    let page = format!("'room-7', {last}, 51, {last}");
    let newer = format!("'room-7', 0, 51, {last}");
    for (statement, types, arguments, index) in [
        (
            OLDER,
            "text, bigint, bigint, bigint",
            page.clone(),
            "messages_room_seq_idx",
        ),
        (
            NEWER,
            "text, bigint, bigint, bigint",
            newer.clone(),
            "messages_room_seq_idx",
        ),
        (
            OLDER_IN_BYTES,
            "text, bigint, bigint, bigint, bigint",
            page + ", 1000000",
            "messages_room_seq_idx",
        ),
        (
            NEWER_IN_BYTES,
            "text, bigint, bigint, bigint, bigint",
            newer + ", 1000000",
            "messages_room_seq_idx",
        ),
        (
            LOOKUP,
            "text[], text[]",
            "'{ann,bob}', '{a,b}'".to_owned(),
            "messages_sender_id_key",
        ),
    ] {
        let plan = plan(world, statement, types, &arguments).await;
        assert!(
            plan.contains(index) && !plan.contains("Seq Scan"),
            "{state}:\n{statement}\n{plan}"
        );
    }
}

async fn fill(database: &PgPool, rooms: u32) {
    let rows = format!(
        "insert into rooms (name) select 'room-' || n from generate_series(1, {rooms}) as n
         on conflict do nothing;
         insert into messages (seq, room_id, sender, recipient, id, derived, text, sent_at,
             received_at)
         select n, (n % {rooms}) + 1, 'user-' || n % 50, null, 'seq:' || n, true, 'hello', now(),
             now()
           from generate_series((select coalesce(max(seq), 0) from messages) + 1, 2 * {rooms}) as n"
    );
    sqlx::raw_sql(AssertSqlSafe(rows))
        .execute(database)
        .await
        .unwrap();
}

#[tokio::test]
async fn every_statement_of_a_page_goes_by_an_index() {
    let world = World::start().await;
    let database = world.database().await;
    // The statistics are missing, and the rows were not there a moment ago.
    sqlx::raw_sql(
        "alter table messages set (autovacuum_enabled = false);
         alter table rooms set (autovacuum_enabled = false)",
    )
    .execute(&database)
    .await
    .unwrap();
    check(&world, "empty").await;
    for rooms in [1_000, 100_000] {
        fill(&database, rooms).await;
        check(&world, &format!("{rooms} rooms, never analyzed")).await;
    }
    sqlx::raw_sql("analyze").execute(&database).await.unwrap();
    check(&world, "analyzed").await;
}
