//! An id used again: for the same text it is the same message, for another text it is a dead
//! dead letter.

use super::changes::{delete, received_ms, rows};
use super::*;
use testing::RawMessage;

type DeadLetter = (i64, String, String);

async fn letters(database: &PgPool) -> Vec<DeadLetter> {
    let letters: Vec<(i64, String, Vec<u8>)> =
        sqlx::query_as("select seq, reason, payload from dead_letters order by seq, id")
            .fetch_all(database)
            .await
            .unwrap();
    let text = |payload: &[u8]| match serde_json::from_slice::<Value>(payload) {
        Ok(body) => body["text"].as_str().unwrap_or_default().to_owned(),
        Err(_) => String::new(),
    };
    letters
        .iter()
        .map(|(seq, reason, payload)| (*seq, reason.clone(), text(payload)))
        .collect()
}

fn conflict(seq: u64, text: &str) -> DeadLetter {
    (seq as i64, "id_conflict".to_owned(), text.to_owned())
}

fn said(text: &str, id: &str) -> String {
    json!({"user": "bot", "text": text, "id": id}).to_string()
}

fn stored_as(seq: u64, text: &str) -> (i64, String, bool) {
    (seq as i64, text.to_owned(), false)
}

const FIRE: &str = "after the restart: fire";

#[tokio::test]
async fn a_used_id_with_another_text_is_a_dead_letter() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let running = worker(&world).await;
    let (first, _) = publish(
        &publisher,
        "chat.gamma",
        None,
        &said("before the restart", "1"),
    )
    .await;
    let (second, _) = publish(&publisher, "chat.gamma", None, &said("second", "2")).await;
    settled(&world).await;
    let (fire, duplicate) = publish(&publisher, "chat.gamma", None, &said(FIRE, "1")).await;
    assert!(!duplicate);
    publish(&publisher, "chat.gamma", None, &said("second", "2")).await;
    let (elsewhere, _) = publish(&publisher, "chat.delta", None, &said("second", "2")).await;
    settled(&world).await;
    assert_eq!(
        rows(&database).await,
        [
            stored_as(first, "before the restart"),
            stored_as(second, "second")
        ]
    );
    assert_eq!(
        letters(&database).await,
        [conflict(fire, FIRE), conflict(elsewhere, "second")]
    );
    assert_eq!(
        count(&database, "select count(*) from duplicates").await,
        1,
        "a true resend is no dead letter"
    );
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_conflict_within_one_batch_is_a_dead_letter() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let (first, _) = publish(
        &publisher,
        "chat.gamma",
        None,
        &said("before the restart", "1"),
    )
    .await;
    publish(
        &publisher,
        "chat.gamma",
        None,
        &said("before the restart", "1"),
    )
    .await;
    let (fire, _) = publish(&publisher, "chat.gamma", None, &said(FIRE, "1")).await;
    let (elsewhere, _) = publish(
        &publisher,
        "dm.bot.ann",
        None,
        &said("before the restart", "1"),
    )
    .await;
    let running = worker(&world).await;
    settled(&world).await;
    assert_eq!(
        rows(&database).await,
        [stored_as(first, "before the restart")]
    );
    assert_eq!(
        letters(&database).await,
        [
            conflict(fire, FIRE),
            conflict(elsewhere, "before the restart")
        ]
    );
    assert_eq!(count(&database, "select count(*) from duplicates").await, 1);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn what_an_earlier_message_displaces_is_a_dead_letter() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let (first, _) = publish(&publisher, "chat.gamma", None, &said("first", "1")).await;
    let (second, _) = publish(&publisher, "chat.gamma", None, &said(FIRE, "1")).await;
    let (mut other, held) = taken(&world, 2).await;
    // As if a third replica had stored the second one.
    sqlx::query(
        "with room as (insert into rooms (name) values ('gamma') returning id)
         insert into messages select $1, id, 'bot', null, '1', false, $2, now(),
           'epoch'::timestamptz + $3 * interval '1 ms' from room",
    )
    .bind(second as i64)
    .bind(FIRE)
    .bind(received_ms(&bootstrap, second).await)
    .execute(&database)
    .await
    .unwrap();
    let running = worker(&world).await;
    nak(&mut other, &held[0]).await;
    eventually("the first one is stored", SOON, async || {
        (rows(&database).await == [stored_as(first, "first")]).then_some(())
    })
    .await;
    assert_eq!(
        letters(&database).await,
        [conflict(second, FIRE)],
        "in the same moment"
    );
    let subject: String = sqlx::query_scalar("select subject from dead_letters")
        .fetch_one(&database)
        .await
        .unwrap();
    assert_eq!(subject, "chat.gamma");
    // It is delivered once more, and is the dead letter that is there already.
    let again: &RawMessage = &held[1];
    nak(&mut other, again).await;
    settled(&world).await;
    assert_eq!(
        (letters(&database).await, rows(&database).await),
        (
            vec![conflict(second, FIRE)],
            vec![stored_as(first, "first")]
        )
    );
    running.stop().await.unwrap();
}

#[tokio::test]
async fn replicas_at_work_together_agree_on_every_conflict() {
    const IDS: usize = 150;
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let mut vars = world.vars("persist-message");
    vars.insert("PERSIST_BATCH".to_owned(), "7".to_owned());
    for text in ["one", "two", "one"] {
        for id in 0..IDS {
            publisher
                .publish("chat.gamma", said(text, &id.to_string()).into())
                .await
                .unwrap();
        }
    }
    logged(&world.client("operator").await, 3 * IDS).await;
    let start = async || {
        function()
            .start(Vars::from_pairs(vars.clone()))
            .await
            .unwrap()
    };
    let running = [start().await, start().await];
    settled(&world).await;
    let expected: Vec<(i64, String, bool)> =
        (1..=IDS as u64).map(|seq| stored_as(seq, "one")).collect();
    assert_eq!(rows(&database).await, expected);
    let expected: Vec<DeadLetter> = (1..=IDS as u64)
        .map(|seq| conflict(IDS as u64 + seq, "two"))
        .collect();
    assert_eq!(letters(&database).await, expected);
    for running in running {
        running.stop().await.unwrap();
    }
}

/// What was said under a deleted id is not known any more; the contract says that sending it again
/// is a resend.
#[tokio::test]
async fn whatever_is_said_under_a_deleted_id_is_a_duplicate() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let running = worker(&world).await;
    let body = |text: &str| json!({"user": "ann", "text": text, "id": "1"}).to_string();
    let (first, _) = publish(&publisher, "chat.general", None, &body("first")).await;
    let (conflicting, _) = publish(&publisher, "chat.general", None, &body("another")).await;
    settled(&world).await;
    assert_eq!(letters(&database).await, [conflict(conflicting, "another")]);
    delete(&bootstrap, first, "1", "hard").await;
    settled(&world).await;
    publish(&publisher, "chat.general", None, &body("a third")).await;
    settled(&world).await;
    assert_eq!(rows(&database).await, [(first as i64, String::new(), true)]);
    assert_eq!(
        letters(&database).await,
        [conflict(conflicting, "")],
        "an id is deleted with all that was said under it"
    );
    running.stop().await.unwrap();
}
