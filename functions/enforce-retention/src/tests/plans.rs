//! What a step costs is what it takes: no plan reads all rooms, or all messages, also one that was made before there were any.

use sqlx::AssertSqlSafe;

use super::*;
use crate::{erase, sweep};
use timeline::chat::open_database;

/// How PostgreSQL would run a statement with these arguments, asked as the function itself connects.
async fn plan(world: &World, statement: &str, types: &str, arguments: &str) -> String {
    let vars = Vars::from_pairs(world.vars("enforce-retention")).unwrap();
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

async fn all_are_ranges(world: &World, when: &str) {
    let seqs: Vec<String> = (1..=5_000).map(|seq| seq.to_string()).collect();
    let seqs = format!("'{{{}}}'", seqs.join(","));
    for (what, statement, types, arguments) in [
        ("walk", sweep::WALK, "bigint, text", "1, '*'".to_owned()),
        (
            "walk of a room",
            sweep::WALK_ROOM,
            "bigint, text",
            "1, 'room-7'".to_owned(),
        ),
        (
            "walk of deletions",
            sweep::CHANGES,
            "bigint, text",
            "1, '*'".to_owned(),
        ),
        ("delete", sweep::DELETE, "bigint[]", seqs.clone()),
        (
            "delete deletions",
            sweep::DELETE_CHANGES,
            "bigint[]",
            seqs.clone(),
        ),
        (
            "what a user wrote",
            erase::THEIRS,
            "text, text, boolean",
            "'zoe', '', false".to_owned(),
        ),
        (
            "which are stored",
            erase::INDEXED,
            "bigint[], text",
            format!("{seqs}, 'zoe'"),
        ),
    ] {
        let plan = plan(world, statement, types, &arguments).await;
        // The one row of `swept` has no index that would help.
        let read_through =
            |line: &str| line.contains("Seq Scan") && !line.contains("Seq Scan on swept");
        assert!(!plan.lines().any(read_through), "{when}: {what}\n{plan}");
    }
}

#[tokio::test]
async fn a_step_reads_no_table_through() {
    let world = World::start().await;
    let database = world.database().await;
    all_are_ranges(&world, "empty").await;
    for rooms in [1_000, 100_000] {
        let fill = format!(
            "insert into rooms (name) select 'room-' || n from generate_series(1, {rooms}) n on conflict do nothing;
             insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
             select n, 1 + n % {rooms}, 'zoe', 'id-' || n, false, 'x', now(), now() from generate_series(1, 20000) n on conflict do nothing"
        );
        sqlx::raw_sql(AssertSqlSafe(fill))
            .execute(&database)
            .await
            .unwrap();
        all_are_ranges(&world, "without statistics").await;
        sqlx::raw_sql("analyze").execute(&database).await.unwrap();
        all_are_ranges(&world, "with statistics").await;
    }
}
