//! What the database refuses: one row, with what stands behind it in the batch; or everything.

use super::changes::{delete, is_gone, message, rows};
use super::*;

#[tokio::test]
async fn one_row_the_database_refuses_costs_nobody_else() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    sqlx::query("alter table messages add constraint no_poison check (text <> 'poison')")
        .execute(&database)
        .await
        .unwrap();
    for number in 0..101 {
        let text = if number == 50 {
            "poison".to_owned()
        } else {
            number.to_string()
        };
        publish(
            &publisher,
            "chat.general",
            None,
            &json!({"user": "ann", "text": text}).to_string(),
        )
        .await;
    }
    let worker = worker(&world).await;
    stored(&database, 100, WITHIN).await;
    settled(&world).await;
    let dead_letter: (i64, String, String) =
        sqlx::query_as("select seq, reason, detail from dead_letters")
            .fetch_one(&database)
            .await
            .unwrap();
    assert_eq!(
        (dead_letter.0, dead_letter.1.as_str()),
        (51, "refused_by_database")
    );
    assert!(
        dead_letter.2.contains("23514")
            && dead_letter.2.contains("no_poison")
            && !dead_letter.2.contains("ann"),
        "{}",
        dead_letter.2
    );
    worker.stop().await.unwrap();
}

#[tokio::test]
async fn a_refused_message_does_not_take_others_with_its_id_along() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    sqlx::query("alter table messages add constraint no_poison check (text <> 'poison')")
        .execute(&database)
        .await
        .unwrap();
    let say = async |text: &str, id: &str| {
        publish(&publisher, "chat.general", None, &message(text, Some(id)))
            .await
            .0
    };
    // All in one batch.
    let refused = say("poison", "mixed").await;
    let good = say("good", "mixed").await;
    let again = say("good", "mixed").await;
    let twice = [say("poison", "twice").await, say("poison", "twice").await];
    let kept = say("kept", "kept").await;
    let copy = say("kept", "kept").await;
    let running = worker(&world).await;
    settled(&world).await;
    let letters: Vec<(i64, String)> =
        sqlx::query_as("select seq, reason from dead_letters order by seq")
            .fetch_all(&database)
            .await
            .unwrap();
    let expected =
        [refused, twice[0], twice[1]].map(|seq| (seq as i64, "refused_by_database".to_owned()));
    assert_eq!(letters, expected);
    assert_eq!(
        rows(&database).await,
        [
            (good as i64, "good".to_owned(), false),
            (kept as i64, "kept".to_owned(), false)
        ]
    );
    let duplicates: Vec<i64> = sqlx::query_scalar("select seq from duplicates order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(
        duplicates,
        [again as i64, copy as i64],
        "duplicates move with their row when the batch is halved"
    );
    delete(&bootstrap, kept, "kept", "hard").await;
    settled(&world).await;
    assert!(is_gone(&bootstrap, kept).await && is_gone(&bootstrap, copy).await);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_database_that_refuses_everything_fills_no_dead_letters() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    sqlx::query("alter table messages add constraint nothing check (false)")
        .execute(&database)
        .await
        .unwrap();
    for number in 0..20 {
        publish(
            &publisher,
            "chat.general",
            None,
            &message(&number.to_string(), Some(&number.to_string())),
        )
        .await;
    }
    delete(&bootstrap, 1, "0", "soft").await;
    let running = world.spawn("persist-message").await;
    eventually("it says so", SOON, async || {
        running.stderr().contains("known to be good").then_some(())
    })
    .await;
    assert!(
        running.stderr().contains("23514") && running.stderr().contains("nothing"),
        "{}",
        running.stderr()
    );
    assert_eq!(
        count(&database, "select count(*) from dead_letters").await,
        0
    );
    sqlx::query("alter table messages drop constraint nothing")
        .execute(&database)
        .await
        .unwrap();
    stored(&database, 20, SOON).await;
    settled(&world).await;
    assert_eq!(
        count(&database, "select count(*) from dead_letters").await,
        0
    );
    assert!(running.terminate().await.success());
}

#[tokio::test]
async fn a_database_that_cannot_hold_every_character_is_refused_at_start() {
    let world = World::start().await;
    let create = "create database latin template template0 encoding 'LATIN1' locale_provider libc
      locale 'C'";
    sqlx::query(create)
        .execute(&world.database().await)
        .await
        .unwrap();
    let mut command = world.command("persist-message");
    let output = command
        .env("DATABASE_URL", world.postgres().url("latin"))
        .output()
        .await
        .unwrap();
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{line}");
    assert!(
        ["LATIN1", "encoding 'UTF8'", "DATABASE_URL"]
            .iter()
            .all(|words| line.contains(words)),
        "{line}"
    );
    assert_eq!(
        count(&world.database().await, "select count(*) from dead_letters").await,
        0
    );
}
