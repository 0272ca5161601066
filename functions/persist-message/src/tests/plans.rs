//! What a batch costs does not grow with what is stored: every plan goes by an index, also when
//! PostgreSQL knows nothing about the tables yet.

use std::sync::atomic::{AtomicU32, Ordering};

use sqlx::AssertSqlSafe;

use super::*;
use crate::{changes, dead_letters, store};
use postgres::database::Database;
use timeline::chat::open_database;

/// Statement, types of its parameters, arguments, and the tables it may not scan.
const STATEMENTS: [(&str, &str, &str, &str); 6] = [
    ("rooms", store::FIND_ROOMS, "text[]", "'{room-1,room-2}'"),
    (
        "met",
        store::CLASSIFY_COLLISIONS,
        "bigint[], text[], text[], bool[], int[], text[], timestamptz[]",
        "'{1}', '{ann}', '{id-1}', '{f}', '{1}', '{x}', '{2026-01-01}'",
    ),
    (
        "deleted",
        store::FIND_DELETED,
        "text[], text[], bool[]",
        "'{ann}', '{id-1}', '{f}'",
    ),
    (
        "places",
        changes::FIND_DUPLICATES,
        "text[], text[], bool[]",
        "'{ann}', '{id-1}', '{f}'",
    ),
    (
        "move",
        changes::MOVE_TOMBSTONES,
        "bigint[], int[], text[], text[], text[], bool[], timestamptz[], timestamptz[]",
        "'{1}', '{1}', '{ann}', '{null}', '{id-1}', '{f}', '{2026-01-01}', '{2026-01-01}'",
    ),
    (
        "letters",
        dead_letters::OF_MESSAGES,
        "text[], text[], bigint, bigint",
        "'{ann}', '{id-1}', 0, 50",
    ),
];

/// How PostgreSQL would run a statement with these arguments, asked as the function itself
/// connects.
async fn plan(
    connected: &Database,
    name: &str,
    statement: &str,
    types: &str,
    arguments: &str,
) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let asked = format!("asked_{}", COUNT.fetch_add(1, Ordering::Relaxed));
    let plan = connected.run(SOON, async |connection| {
        sqlx::raw_sql(AssertSqlSafe(format!(
            "prepare {asked} ({types}) as {statement}"
        )))
        .execute(&mut *connection)
        .await?;
        sqlx::query_scalar::<_, String>(AssertSqlSafe(format!(
            "explain execute {asked} ({arguments})"
        )))
        .fetch_all(connection)
        .await
    });
    plan.await
        .unwrap_or_else(|error| panic!("{name}: {error}"))
        .join("\n")
}

#[tokio::test]
async fn a_batch_reads_nothing_of_what_it_is_not_about() {
    let world = World::start().await;
    let database = world.database().await;
    let vars = Vars::from_pairs(world.vars("persist-message"));
    let connected = open_database(&vars, "test").unwrap();
    sqlx::raw_sql(
        "alter table rooms set (autovacuum_enabled = false);
         alter table messages set (autovacuum_enabled = false);
         alter table dead_letters set (autovacuum_enabled = false);
         alter table duplicates set (autovacuum_enabled = false);
         alter table changes set (autovacuum_enabled = false)",
    )
    .execute(&database)
    .await
    .unwrap();
    let check = async |what: &str| {
        for (name, statement, types, arguments) in STATEMENTS {
            let plan = plan(&connected, name, statement, types, arguments).await;
            assert!(!plan.contains("Seq Scan"), "{name}, {what}:\n{plan}");
        }
    };
    for (rooms, what) in [
        (1_000, "1,000 rooms, nothing known"),
        (100_000, "100,000 rooms, nothing known"),
    ] {
        sqlx::query(
            "insert into rooms (name) select 'room-' || n from generate_series(1,
          $1) as n on conflict do nothing",
        )
        .bind(rooms)
        .execute(&database)
        .await
        .unwrap();
        sqlx::query(
            "insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
             select n, n, 'user-' || n % 100, 'id-' || n, false, 'hello', now(),
               now() from generate_series(1, least($1, 10000)) as n
             on conflict do nothing",
        )
        .bind(rooms)
        .execute(&database)
        .await
        .unwrap();
        sqlx::query(
            "insert into dead_letters (seq, subject, headers, payload, reason, received_at,
              sender, message_id)
             select n, 'chat.general', '', 'x', 'id_conflict', now(), 'user-' || n % 100,
               'id-' || n from generate_series(1, least($1, 10000)) as n
             on conflict do nothing",
        )
        .bind(rooms)
        .execute(&database)
        .await
        .unwrap();
        sqlx::query(
            "insert into changes (seq, room_id, target, sender, id, mode, changed_by, received_at)
             select n, n, n, 'user-' || n % 100, 'id-' || n, 'hard', 'ann',
               now() from generate_series(1, least($1, 10000)) as n
             on conflict do nothing",
        )
        .bind(rooms)
        .execute(&database)
        .await
        .unwrap();
        sqlx::query(
            "insert into duplicates (seq, sender, id)
             select n, 'user-' || n % 100, 'id-' || n from generate_series(1, least($1,
               10000)) as n on conflict do nothing",
        )
        .bind(rooms)
        .execute(&database)
        .await
        .unwrap();
        check(what).await;
    }
    sqlx::raw_sql("analyze").execute(&database).await.unwrap();
    check("100,000 rooms, analyzed").await;
}

#[tokio::test]
async fn every_table_has_a_primary_key() {
    let world = World::start().await;
    let without: Vec<String> = sqlx::query_scalar(
        "select relname::text from pg_class join pg_namespace on pg_namespace.oid = relnamespace
          where nspname = 'public' and relkind in ('r', 'p')
            and not exists (select from pg_constraint where conrelid = pg_class.oid and contype =
              'p')",
    )
    .fetch_all(&world.database().await)
    .await
    .unwrap();
    assert_eq!(without, Vec::<String>::new());
}
