//! Which dead letters a page holds.

use super::*;

#[tokio::test]
async fn letters_are_found_by_what_they_are() {
    let world = World::start().await;
    let function = start(&world).await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let odd = r"chat.(a|b)[c]{2}^$?+\d";
    let mut made = Vec::new();
    for (subject, reason) in [
        ("chat.general", "not_json"),
        ("chat.generally", "text_too_long"),
        ("dm.ann.bob", "not_json"),
        (odd, "not_json"),
        ("chatxgeneral", "unsupported_subject"),
        ("change.dm.ann.bob", "malformed_change"),
        ("chat.a*", "missing_text"),
        ("chat.ab", "missing_text"),
        ("chat.line\nbreak", "missing_text"),
    ] {
        made.push(put(&database, made.len() as i64 + 1, subject, "", b"x", reason).await);
    }
    let at = |places: &[usize]| {
        places
            .iter()
            .map(|place| made[*place])
            .collect::<Vec<i64>>()
    };
    for (filter, wanted) in [
        (json!({}), at(&[0, 1, 2, 3, 4, 5, 6, 7, 8])),
        (json!({"reason": "not_json"}), at(&[0, 2, 3])),
        (json!({"subject": "chat.general"}), at(&[0])),
        (json!({"subject": "chat.*"}), at(&[0, 1, 3, 6, 7, 8])),
        (json!({"subject": "*.*"}), at(&[0, 1, 3, 6, 7, 8])),
        (json!({"subject": "dm.>"}), at(&[2])),
        (json!({"subject": ">"}), at(&[0, 1, 2, 3, 4, 5, 6, 7, 8])),
        (json!({"subject": "*.ann.>"}), at(&[2])),
        (json!({"subject": "*.dm.ann.*"}), at(&[5])),
        (json!({"subject": odd}), at(&[3])),
        // No regular expression gets through.
        (json!({"subject": "chat.a*"}), at(&[6])),
        (json!({"subject": "chat.gen.*"}), at(&[])),
        (json!({"subject": "(?i)CHAT.*"}), at(&[])),
        (json!({"subject": "***:.*"}), at(&[])),
        (
            json!({"subject": "chat.*", "reason": "not_json"}),
            at(&[0, 3]),
        ),
    ] {
        assert_eq!(ids(&operator, filter.clone()).await, wanted, "{filter}");
    }
    discard(&operator, made[0]).await.unwrap();
    for (place, outcome) in [(1, "retried"), (2, "erased")] {
        let settle = "update dead_letters set outcome = $2, outcome_at = now() where id = $1";
        sqlx::query(settle)
            .bind(made[place])
            .bind(outcome)
            .execute(&database)
            .await
            .unwrap();
    }
    for (outcome, wanted) in [
        ("waiting", at(&[3, 4, 5, 6, 7, 8])),
        ("dropped", at(&[0])),
        ("retried", at(&[1])),
        ("erased", at(&[2])),
        ("all", at(&[0, 1, 2, 3, 4, 5, 6, 7, 8])),
    ] {
        assert_eq!(
            ids(&operator, json!({"outcome": outcome})).await,
            wanted,
            "{outcome}"
        );
    }
    assert_eq!(
        ids(
            &operator,
            json!({"outcome": "dropped", "subject": "chat.*", "reason": "not_json"})
        )
        .await,
        at(&[0])
    );
    function.stop().await.unwrap();
}

/// PostgreSQL can do with the largest pattern that is taken.
#[tokio::test]
async fn the_largest_pattern_is_a_question_like_any_other() {
    let world = World::start().await;
    let function = start(&world).await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let deep = vec!["t"; 32].join(".");
    let id = put(&database, 1, &deep, "", b"x", "unsupported_subject").await;
    let long = format!("chat.{}", "(".repeat(4_091));
    let other = put(&database, 2, &long, "", b"x", "name_too_long").await;
    assert_eq!(
        ids(&operator, json!({"subject": vec!["*"; 32].join(".")})).await,
        [id]
    );
    assert_eq!(
        ids(
            &operator,
            json!({"subject": format!("{}.>", vec!["*"; 31].join("."))})
        )
        .await,
        [id]
    );
    assert_eq!(ids(&operator, json!({ "subject": long })).await, [other]);
    function.stop().await.unwrap();
}

#[tokio::test]
async fn pages_contain_every_dead_letter_once() {
    let world = World::builder()
        .nats_setting("max_payload", "64KB")
        .start()
        .await;
    let function = start(&world).await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let mut made = Vec::new();
    for number in 0..60 {
        // In JSON each of these takes six bytes.
        let subject = format!(
            "chat.{}",
            "\u{1}".repeat(if number < 30 { 1 } else { 1_000 })
        );
        made.push(put(&database, number, &subject, "", b"x", "not_json").await);
    }
    let mut found = Vec::new();
    let mut after = 0;
    let mut sizes = Vec::new();
    loop {
        let reply = operator
            .request(
                DEADLETTERS_LIST.subject(&[]),
                json!({"limit": 25, "after": after}).to_string().into(),
            )
            .await
            .unwrap();
        assert!(reply.payload.len() < 64 * 1024, "{}", reply.payload.len());
        let page: protocol::dead_letters::DeadLetterPage =
            serde_json::from_slice(&reply.payload).unwrap();
        sizes.push(page.letters.len());
        found.extend(page.letters.iter().map(|dead_letter| dead_letter.id.get()));
        assert!(found.len() <= made.len(), "{found:?}");
        after = *found.last().unwrap();
        if !page.more {
            break;
        }
    }
    assert_eq!(found, made);
    assert!(
        sizes[0] == 25 && (6..25).contains(&sizes[1]),
        "what would not fit came on the next page: {sizes:?}"
    );
    // As many as there are is all there is.
    assert_eq!(
        list(&operator, json!({"limit": 5, "after": made[54]})).await["more"],
        false
    );
    assert_eq!(
        list(&operator, json!({"limit": 5, "after": made[53]})).await["more"],
        true
    );
    function.stop().await.unwrap();
}
