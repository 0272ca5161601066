//! A step costs as much as it deletes: no plan reads all rooms or all messages, and neither does
//! one that was made while the tables were empty.

use sqlx::AssertSqlSafe;

use super::*;
use crate::{erase, expire};
use timeline::chat::open_database;

/// PostgreSQL's plan for a statement with these arguments, in a session like the function's own.
async fn plan(world: &World, statement: &str, types: &str, arguments: &str) -> String {
    let vars = Vars::from_pairs(world.vars("enforce-retention"));
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
        ("scan", expire::SCAN, "bigint, text", "1, '*'".to_owned()),
        (
            "scan of a room",
            expire::SCAN_ROOM,
            "bigint, text",
            "1, 'room-7'".to_owned(),
        ),
        (
            "scan of deletions",
            expire::SCAN_CHANGES,
            "bigint, text",
            "1, '*'".to_owned(),
        ),
        ("delete", expire::DELETE, "bigint[]", seqs.clone()),
        (
            "delete deletions",
            expire::DELETE_CHANGES,
            "bigint[]",
            seqs.clone(),
        ),
        (
            "what a user wrote",
            erase::USER_MESSAGES,
            "text, text, boolean",
            "'zoe', '', false".to_owned(),
        ),
        (
            "which are stored",
            erase::STORED,
            "bigint[], text",
            format!("{seqs}, 'zoe'"),
        ),
    ] {
        let plan = plan(world, statement, types, &arguments).await;
        // Table `swept` has one row and needs no index.
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
            "insert into rooms (name) select 'room-' || n from generate_series(1, {rooms}) n
                 on conflict do nothing;
             insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
             select n, 1 + n % {rooms}, 'zoe', 'id-' || n, false, 'x', now(), now()
               from generate_series(1, 20000) n on conflict do nothing"
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
