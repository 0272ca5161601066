//! Plans at every size a database may have, with statistics that are right and statistics that are
//! old.

use sqlx::{AssertSqlSafe, PgPool};

/// Messages in as many rooms, behind what is there.
const GROW: &str = "
    insert into rooms (name) select 'room-' || n from generate_series($1::bigint, $2) as n;
    insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
    select n, (select min(id) from rooms) + n - 1, 'ann', 'id-' || n, false, 'hello', now(), now()
      from generate_series($1::bigint, $2) as n;
    insert into changes (seq, room_id, target, sender, id, mode, changed_by, received_at)
    select 1000000 + n, 1, n, 'ann', 'id-' || n, 'soft', 'ann', now()
      from generate_series($1::bigint, $2) as n;
    insert into outbox (first_seq, last_seq, seqs) select n, n, array[n]
      from generate_series($1::bigint, $2) as n;";

/// Calls `check` with the name of each stage: nothing there, then twenty, a thousand and a hundred
/// thousand rooms, each with the statistics of the stage before it and with its own.
///
/// # Panics
///
/// When PostgreSQL does not take the rows.
pub async fn at_every_size(database: &PgPool, check: impl AsyncFn(&str)) {
    let execute = async |sql: String| {
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(database)
            .await
            .expect("PostgreSQL takes it");
    };
    check("nothing is there").await;
    // The statistics of twenty say that each table is one page: a plan of that moment is kept while
    // the tables grow.
    let mut before = 0;
    for rooms in [20, 1_000, 100_000] {
        execute(
            GROW.replace("$1", &(before + 1).to_string())
                .replace("$2", &rooms.to_string()),
        )
        .await;
        check(&format!("{rooms} rooms, and statistics of {before}")).await;
        execute("analyze".to_owned()).await;
        check(&format!("{rooms} rooms")).await;
        before = rooms;
    }
}
