//! A request costs as much as it concerns: no plan may read the rooms or the messages of other
//! users.

use sqlx::AssertSqlSafe;

use super::SOON;
use service::config::Vars;
use testing::World;
use timeline::chat::open_database;

/// The plan of a statement with these arguments, in a session like the function's.
async fn plan(world: &World, statement: &str, types: &str, arguments: &str) -> String {
    let vars = Vars::from_pairs(world.vars("track-receipts"));
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

/// The plan of each statement, by name.
async fn plans(world: &World, names: &str) -> Vec<(&'static str, String)> {
    vec![
        (
            "above",
            plan(
                world,
                crate::unread::ABOVE,
                "bigint, text, text[]",
                &format!("40000, 'b-7', '{names}'"),
            )
            .await,
        ),
        (
            "deduplication lookup",
            plan(
                world,
                timeline::dedup::LOOKUP,
                "text[], text[]",
                &format!("'{names}', '{names}'"),
            )
            .await,
        ),
        (
            "read cursors",
            plan(
                world,
                timeline::cursors::READ,
                "text, text[]",
                &format!("'b-7', '{names}'"),
            )
            .await,
        ),
        (
            "room cursors",
            plan(
                world,
                crate::unread::ROOM_CURSORS,
                "text, bigint, bigint",
                "'b-7', 501, 10000",
            )
            .await,
        ),
        (
            "passed",
            plan(
                world,
                crate::delivered::PASSED,
                "text, bigint, bigint, bigint",
                "'b-7', 0, 40000, 10000",
            )
            .await,
        ),
    ]
}

/// No plan reads a whole table or a whole index: each reads a key or a range of an index.
async fn all_are_ranges(world: &World, when: &str) {
    let names: Vec<String> = (0..1_000).map(|number| format!("room-{number}")).collect();
    for (what, plan) in plans(world, &format!("{{{}}}", names.join(","))).await {
        assert!(!plan.contains("Seq Scan"), "{when}: {what}\n{plan}");
        let lines: Vec<&str> = plan.lines().collect();
        for (place, line) in lines.iter().enumerate() {
            let is_scan = line.contains("Index Scan") || line.contains("Index Only Scan");
            let is_range = lines
                .get(place + 1)
                .is_some_and(|next| next.trim_start().starts_with("Index Cond"));
            assert!(!is_scan || is_range, "{when}: {what}: {line}\n{plan}");
        }
    }
}

#[tokio::test]
async fn no_request_reads_the_rooms_of_all_other_users() {
    let world = World::start().await;
    all_are_ranges(&world, "empty").await;
    let pool = world.database().await;
    for rooms in [1_000, 100_000] {
        let fill = format!(
            "insert into rooms (name) select 'room-' || n from generate_series(1, {rooms}) n
             on conflict do nothing"
        );
        sqlx::raw_sql(AssertSqlSafe(fill))
            .execute(&pool)
            .await
            .unwrap();
        all_are_ranges(&world, "without statistics").await;
        sqlx::raw_sql("analyze").execute(&pool).await.unwrap();
        all_are_ranges(&world, "with statistics").await;
    }
    world.store_conversations().await;
    all_are_ranges(&world, "with messages").await;
    let passed = plan(
        &world,
        crate::delivered::PASSED,
        "text, bigint, bigint, bigint",
        "'b-7', 0, 40000, 10000",
    )
    .await;
    assert!(passed.contains("messages_recipient_seq_idx"), "{passed}");
    let above = plan(
        &world,
        crate::unread::ABOVE,
        "bigint, text, text[]",
        "40000, 'b-7', '{general}'",
    )
    .await;
    assert!(above.contains("messages_recipient_seq_idx"), "{above}");
}
