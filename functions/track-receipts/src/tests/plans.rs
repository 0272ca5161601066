//! What a request costs is what it is about: no plan may read the rooms, or the mail, of all the others.

use runtime::{Database, Settings, Vars};
use sqlx::AssertSqlSafe;
use testing::World;

use super::SOON;

/// How PostgreSQL would run a statement with these arguments, asked as the function itself connects.
async fn plan(world: &World, statement: &str, types: &str, arguments: &str) -> String {
    let settings = Settings::read(&Vars::from_pairs(world.vars("track-receipts")).unwrap()).unwrap();
    let connected = Database::new(&settings, "test").unwrap();
    let plan = connected.run(SOON, async |connection| {
        sqlx::raw_sql(AssertSqlSafe(format!("prepare asked ({types}) as {statement}"))).execute(&mut *connection).await?;
        sqlx::query_scalar::<_, String>(AssertSqlSafe(format!("explain execute asked ({arguments})"))).fetch_all(connection).await
    });
    plan.await.unwrap().join("\n")
}

#[tokio::test]
async fn nobody_reads_the_rooms_of_all_the_others() {
    let world = World::start().await;
    world.store_conversations().await;
    let concerned = plan(&world, crate::delivered::CONCERNED, "text, bigint, bigint, bigint", "'b-7', 0, 40000, 10000").await;
    assert!(concerned.contains("messages_recipient_seq_idx") && !concerned.contains("Seq Scan"), "{concerned}");
    let above = plan(&world, crate::unread::ABOVE, "bigint, text, text[]", "40000, 'b-7', '{general}'").await;
    assert!(above.contains("messages_recipient_seq_idx") && !above.contains("Seq Scan"), "{above}");
}
