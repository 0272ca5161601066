//! An audit costs what it looks at, however much is stored, and whatever the statistics say.

use runtime::{Database, Settings, Vars};
use sqlx::AssertSqlSafe;
use testing::{SOON, World};

/// Messages in as many rooms, behind what is there.
const GROW: &str = "
    insert into rooms (name) select 'room-' || n from generate_series($1::bigint, $2) as n;
    insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
    select n, (select min(id) from rooms) + n - 1, 'ann', 'id-' || n, false, 'hello', now(), now()
      from generate_series($1::bigint, $2) as n;
    insert into changes (seq, room_id, target, sender, id, mode, changed_by, received_at)
    select 1000000 + n, 1, n, 'ann', 'id-' || n, 'soft', 'ann', now() from generate_series($1::bigint, $2) as n;
    insert into outbox (first_seq, last_seq, seqs) select n, n, array[n] from generate_series($1::bigint, $2) as n;";

#[tokio::test]
async fn no_plan_reads_a_whole_table() {
    let world = World::start().await;
    let settings = Settings::read(&Vars::from_pairs(world.vars("stream-bootstrap")).unwrap()).unwrap();
    let connected = Database::new(&settings, "stream-bootstrap").unwrap();
    let database = world.database().await;
    let grow = async |from: u32, to: u32| {
        let sql = GROW.replace("$1", &from.to_string()).replace("$2", &to.to_string());
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&database).await.unwrap();
    };
    let plans = async |stage: &str| {
        for (name, statement, types, arguments) in STATEMENTS {
            let plan = connected.run(SOON, async |connection| {
                sqlx::raw_sql("deallocate all").execute(&mut *connection).await?;
                sqlx::raw_sql(AssertSqlSafe(format!("prepare asked ({types}) as {statement}"))).execute(&mut *connection).await?;
                let explain = AssertSqlSafe(format!("explain execute asked ({arguments})"));
                sqlx::query_scalar::<_, String>(explain).persistent(false).fetch_all(connection).await
            });
            let plan = plan.await.unwrap().join("\n");
            for table in ["messages", "rooms", "changes", "dead_letters", "duplicates", "outbox"] {
                assert!(!plan.contains(&format!("Seq Scan on {table}")), "{name}, {stage}:\n{plan}");
            }
        }
    };
    plans("nothing is there").await;
    // One page of each, and the statistics say so: a plan of that moment is kept while the tables grow.
    grow(1, 20).await;
    sqlx::raw_sql("analyze").execute(&database).await.unwrap();
    plans("twenty rooms").await;
    grow(21, 1_000).await;
    plans("a thousand rooms, and statistics of twenty").await;
    sqlx::raw_sql("analyze").execute(&database).await.unwrap();
    plans("a thousand rooms").await;
    grow(1_001, 100_000).await;
    plans("a hundred thousand rooms, and statistics of a thousand").await;
    sqlx::raw_sql("analyze").execute(&database).await.unwrap();
    plans("a hundred thousand rooms").await;
}

/// Name, text, types and arguments.
const STATEMENTS: [(&str, &str, &str, &str); 1] =
    [("elsewhere", crate::audit::ELSEWHERE, "bigint[], text[], text[]", "'{1,2}', '{ann,bob}', '{id-1,id-2}'")];
