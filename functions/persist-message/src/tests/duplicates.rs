//! A message that stands in the stream more than once, and its deletion: in whichever order, the
//! text of every copy goes.

use super::changes::{delete, is_gone, message, rows};
use super::*;

fn tombstone(seq: u64) -> Vec<(i64, String, bool)> {
    vec![(seq as i64, String::new(), true)]
}

#[tokio::test]
async fn a_copy_stored_with_the_deletion_does_not_take_the_tombstones_place() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let (first, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    delete(&bootstrap, first, "s", "hard").await;
    // delete-message erases it before anybody has stored it.
    let deleter = world.client("delete-message").await;
    let erased = deleter
        .request(
            protocol::js_api::MESSAGE_DELETE,
            json!({ "seq": first }).to_string().into(),
        )
        .await
        .unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&erased.payload).unwrap()["success"],
        true
    );
    let (copy, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    let running = worker(&world).await;
    settled(&world).await;
    assert_eq!(
        rows(&database).await,
        tombstone(first),
        "where live readers and sync learn that it is"
    );
    assert!(is_gone(&bootstrap, copy).await, "the text stays nowhere");
    let (again, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    settled(&world).await;
    assert!(is_gone(&bootstrap, again).await);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_copy_and_a_deletion_stored_at_once_leave_no_text() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let running = worker(&world).await;
    let (first, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    settled(&world).await;
    // The replica that records the duplicate has looked for a deletion by then, and has to wait.
    let mut held = database.begin().await.unwrap();
    sqlx::query("insert into duplicates values ($1, 'somebody', 'else')")
        .bind(first as i64 + 1)
        .execute(&mut *held)
        .await
        .unwrap();
    let (copy, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    blocked(&database, "into duplicates").await;
    delete(&bootstrap, first, "s", "hard").await;
    eventually("the deletion is stored", SOON, async || {
        (rows(&database).await == tombstone(first)).then_some(())
    })
    .await;
    eventually("the message is erased", SOON, async || {
        is_gone(&bootstrap, first).await.then_some(())
    })
    .await;
    held.rollback().await.unwrap();
    settled(&world).await;
    assert!(
        is_gone(&bootstrap, copy).await,
        "one of the two sees the other"
    );
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_message_that_takes_the_place_of_its_copys_tombstone_is_erased() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let (first, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    let (mut other, held) = taken(&world, 1).await;
    let (copy, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    let running = worker(&world).await;
    stored(&database, 1, SOON).await;
    delete(&bootstrap, copy, "s", "hard").await;
    eventually("the copy is erased", SOON, async || {
        is_gone(&bootstrap, copy).await.then_some(())
    })
    .await;
    nak(&mut other, &held[0]).await;
    settled(&world).await;
    assert_eq!(rows(&database).await, tombstone(first));
    assert!(is_gone(&bootstrap, first).await);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn the_place_a_copy_names_and_the_messages_own_are_both_erased() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let running = worker(&world).await;
    let (first, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    let (copy, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    settled(&world).await;
    delete(&bootstrap, copy, "s", "hard").await;
    settled(&world).await;
    assert_eq!(rows(&database).await, tombstone(first));
    assert!(is_gone(&bootstrap, first).await && is_gone(&bootstrap, copy).await);
    running.stop().await.unwrap();
}

/// A batch stored its rows and applied its deletions in one transaction, in two passes over the
/// keys.
#[tokio::test]
async fn rows_and_tombstones_never_wait_for_each_other() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let (first, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("to be deleted", Some("a")),
    )
    .await;
    let running = worker(&world).await;
    settled(&world).await;
    running.stop().await.unwrap();
    // One batch: a row with a key behind the deletion's.
    publish(
        &publisher,
        "chat.general",
        None,
        &message("a row", Some("z")),
    )
    .await;
    delete(&bootstrap, first, "a", "soft").await;
    let mut held = database.begin().await.unwrap();
    sqlx::query("select from messages where id = 'a' for update")
        .execute(&mut *held)
        .await
        .unwrap();
    let running = worker(&world).await;
    blocked(&database, "insert into messages").await;
    // Another replica with both, in the order of the keys.
    let row = "insert into messages select 2, room_id, sender, null, 'z', false, text, now(),
      now() from messages where id = 'a'
               on conflict do nothing";
    sqlx::query(row)
        .execute(&mut *held)
        .await
        .expect("nobody who waits for us holds this key");
    held.commit().await.unwrap();
    settled(&world).await;
    let deadlocks: i64 = sqlx::query_scalar(
        "select deadlocks from pg_stat_database where datname = current_database()",
    )
    .fetch_one(&database)
    .await
    .unwrap();
    assert_eq!(deadlocks, 0);
    assert_eq!(
        rows(&database).await,
        [
            (first as i64, String::new(), true),
            (2, "a row".to_owned(), false)
        ]
    );
    running.stop().await.unwrap();
}

/// The same for dead letters: the replica that writes one has looked for a deletion by then.
#[tokio::test]
async fn a_dead_letter_and_a_deletion_stored_at_once_leave_no_text() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let running = worker(&world).await;
    let (first, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    settled(&world).await;
    // The same dead letter, as somebody else is just about to write it.
    let conflicting = message("another secret", Some("s"));
    let mut held = database.begin().await.unwrap();
    sqlx::query(
        "insert into dead_letters (seq, subject, headers, payload, reason,
          received_at) values ($1, 'chat.general', '', $2, 'id_conflict', now())",
    )
    .bind(first as i64 + 1)
    .bind(conflicting.as_bytes())
    .execute(&mut *held)
    .await
    .unwrap();
    let (conflict, _) = publish(&publisher, "chat.general", None, &conflicting).await;
    blocked(&database, "into dead_letters").await;
    delete(&bootstrap, first, "s", "hard").await;
    eventually("the deletion is stored", SOON, async || {
        (rows(&database).await == tombstone(first)).then_some(())
    })
    .await;
    eventually("the message is erased", SOON, async || {
        is_gone(&bootstrap, first).await.then_some(())
    })
    .await;
    held.rollback().await.unwrap();
    settled(&world).await;
    assert!(is_gone(&bootstrap, conflict).await);
    assert_eq!(
        count(
            &database,
            "select count(*) from dead_letters where payload <> ''"
        )
        .await,
        0,
        "one of the two sees the other"
    );
    running.stop().await.unwrap();
}
