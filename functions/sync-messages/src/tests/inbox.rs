//! A full inbox: every message comes once, in order, and a page costs a page.

use serde_json::Value;
use sqlx::{AssertSqlSafe, PgPool, Row as _};

use super::*;
use protocol::endpoints::{DELIVERED, DM_INBOX};

const STORED: u64 = 10_400;
const IN_LOG: u64 = 700;
/// The stream counts as stored up to here.
const FLOOR: u64 = 60_000;
const PAGE: usize = 500;

/// Two of every five positions hold a direct message to bob, from one of twenty users. The others
/// hold what bob wrote, what others wrote to each other, and a message of a room.
async fn fill(database: &PgPool) {
    sqlx::raw_sql(
        "insert into rooms (name) select 'dm.bob.peer-' || peer from generate_series(0, 19) as peer;
         insert into rooms (name) values ('general'), ('dm.ann.carol');
         insert into messages (seq, room_id, sender, recipient, id, derived, text, sent_at,
             received_at)
         select seq, (select id from rooms where name = case seq % 5 when 3 then 'dm.ann.carol'
             when 4 then 'general' else 'dm.bob.peer-' || peer end),
                case seq % 5 when 2 then 'bob' when 3 then 'ann' when 4 then 'ann'
                    else 'peer-' || peer end,
                case seq % 5 when 2 then 'peer-' || peer when 3 then 'carol' when 4 then null
                    else 'bob' end,
                'seq:' || seq, true, 'hello', now(), now()
           from (select seq, seq % 20 as peer from generate_series(1, 26000) as seq) as seqs;
         analyze",
    )
    .execute(database)
    .await
    .unwrap();
}

async fn page(client: &Client, limit: usize) -> (SyncPage, String) {
    ask_raw(
        client,
        DM_INBOX.subject(&["bob"]),
        &json!({ "limit": limit }).to_string(),
    )
    .await
    .unwrap()
}

#[tokio::test]
async fn ten_thousand_messages_come_once_each_and_in_order() {
    let world = World::builder().administrator().start().await;
    let _receipts = world.spawn("track-receipts").await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    let admin = world.client("administrator").await;
    admin
        .request(
            js_api::STREAM_PURGE,
            json!({ "seq": FLOOR + 1 }).to_string().into(),
        )
        .await
        .unwrap();
    fill(&database).await;
    let mut waiting: Vec<u64> = (1..=26_000).filter(|seq| seq % 5 < 2).collect();
    assert_eq!(waiting.len() as u64, STORED);
    for number in 0..IN_LOG {
        let from = format!("peer-{}", number % 30);
        waiting.push(
            append(
                &client,
                &format!("dm.{from}.bob"),
                &json!({"user": from, "text": "hello"}).to_string(),
            )
            .await,
        );
        append(
            &client,
            "dm.ann.carol",
            r#"{"user":"ann","text":"not for bob"}"#,
        )
        .await;
    }
    let mut got = Vec::new();
    let mut sources = Vec::new();
    loop {
        let (before, _) = page(&client, PAGE).await;
        // Bob's client stops before it confirms, and receives the same page again.
        let (page, source) = page(&client, PAGE).await;
        assert_eq!(page, before);
        assert!(
            page.messages.len() <= PAGE && (page.messages.len() == PAGE || !page.more),
            "{} of {}",
            page.messages.len(),
            got.len()
        );
        got.extend(page.messages.iter().map(|message| message.seq.get()));
        sources.push(source);
        let confirmed = client
            .request(
                DELIVERED.subject(&["bob"]),
                json!({"through": page.through}).to_string().into(),
            )
            .await
            .unwrap();
        assert_eq!(
            serde_json::from_slice::<Value>(&confirmed.payload).unwrap(),
            json!({"through": page.through, "moved": true})
        );
        if !page.more {
            break;
        }
    }
    assert!(
        got == waiting,
        "{} of {}, each once and in order",
        got.len(),
        waiting.len()
    );
    sources.dedup();
    assert_eq!(sources, ["index", "both"]);
    assert_eq!(page(&client, PAGE).await.0.messages.len(), 0);
    function.stop().await.unwrap();
}

/// Every node of a plan.
fn nodes<'a>(plan: &'a Value, found: &mut Vec<&'a Value>) {
    found.push(plan);
    for below in plan["Plans"].as_array().into_iter().flatten() {
        nodes(below, found);
    }
}

#[tokio::test]
async fn a_page_of_a_full_inbox_is_one_range_of_its_index() {
    let world = World::start().await;
    let database = world.database().await;
    fill(&database).await;
    let mut connection = database.acquire().await.unwrap();
    let prepared = format!(
        "prepare inbox (text, bigint, bigint, bigint, bigint) as {}",
        crate::query::INBOX
    );
    sqlx::raw_sql(AssertSqlSafe(prepared))
        .execute(&mut *connection)
        .await
        .unwrap();
    // With a plan for these values, and with one for all values; at the beginning of the inbox, and
    // far behind it.
    for (mode, cursor) in [
        ("custom", 0),
        ("generic", 0),
        ("custom", 20_000),
        ("generic", 20_000),
    ] {
        let set = format!("set plan_cache_mode = force_{mode}_plan");
        sqlx::raw_sql(AssertSqlSafe(set))
            .execute(&mut *connection)
            .await
            .unwrap();
        let explain = format!(
            "explain (analyze, timing off, format json) execute inbox ('bob', {cursor}, {}, 1000000,
             100000)",
            PAGE + 1
        );
        let plan = sqlx::raw_sql(AssertSqlSafe(explain))
            .fetch_one(&mut *connection)
            .await
            .unwrap();
        let plan: Value =
            serde_json::from_str(&plan.try_get_unchecked::<String, _>(0).unwrap()).unwrap();
        let mut found = Vec::new();
        nodes(&plan[0]["Plan"], &mut found);
        let reads: Vec<&&Value> = found
            .iter()
            .filter(|node| node["Relation Name"] == "messages")
            .collect();
        assert_eq!(reads.len(), 1, "{mode}: {plan:#}");
        assert_eq!(
            reads[0]["Index Name"], "messages_recipient_seq_idx",
            "{mode}: {plan:#}"
        );
        let range = reads[0]["Index Cond"].as_str().unwrap();
        assert!(
            range.contains("ROW(recipient, seq) > ") && range.contains("ROW(recipient, seq) <= "),
            "{mode}: {range}"
        );
        // It reads as many rows as the page has, and filters none out.
        assert_eq!(
            reads[0]["Actual Rows"].as_f64(),
            Some((PAGE + 1) as f64),
            "{mode}: {plan:#}"
        );
        assert_eq!(
            reads[0]["Rows Removed by Filter"]
                .as_f64()
                .unwrap_or_default(),
            0.0,
            "{mode}: {plan:#}"
        );
    }
}
