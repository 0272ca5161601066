//! A round costs as much as it relays, however much is stored, and whatever the statistics say.

use sqlx::AssertSqlSafe;

use service::config::Vars;
use testing::{SOON, World, at_every_size};
use timeline::chat::open_database;

#[tokio::test]
async fn no_plan_reads_a_whole_table() {
    let world = World::start().await;
    let vars = Vars::from_pairs(world.vars("relay-outbox"));
    let connected = open_database(&vars, "relay-outbox").unwrap();
    let plans = async |stage: &str| {
        for (name, statement, types, arguments) in STATEMENTS {
            let plan = connected.run(SOON, async |connection| {
                sqlx::raw_sql("deallocate all")
                    .execute(&mut *connection)
                    .await?;
                sqlx::raw_sql(AssertSqlSafe(format!(
                    "prepare asked ({types}) as {statement}"
                )))
                .execute(&mut *connection)
                .await?;
                let explain = AssertSqlSafe(format!("explain execute asked ({arguments})"));
                sqlx::query_scalar::<_, String>(explain)
                    .persistent(false)
                    .fetch_all(connection)
                    .await
            });
            let plan = plan.await.unwrap().join("\n");
            for table in [
                "messages",
                "rooms",
                "changes",
                "dead_letters",
                "duplicates",
                "outbox",
            ] {
                assert!(
                    !plan.contains(&format!("Seq Scan on {table}")),
                    "{name}, {stage}:\n{plan}"
                );
            }
        }
    };
    at_every_size(&world.database().await, plans).await;
}

/// Name, text, types and arguments.
const STATEMENTS: [(&str, &str, &str, &str); 3] = [
    ("messages", crate::round::MESSAGES, "bigint[]", "'{1,2,3}'"),
    ("changes", crate::round::CHANGES, "bigint[]", "'{1,2,3}'"),
    (
        "delete",
        crate::receipts::DELETE_PUBLISHED,
        "bigint[]",
        "'{1,2,3}'",
    ),
];
