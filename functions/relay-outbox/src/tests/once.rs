//! Each event is published once, also after a replay or a restore.

use super::*;

/// Neither stream nor table know that these were published. JetStream still remembers their ids,
/// and accepts the others.
#[tokio::test]
async fn what_jetstream_remembers_is_not_published_again() {
    let (world, admin, database) = world().await;
    advance(&admin, 100).await;
    store(&database, 1, 30, 1).await;
    let relay = world.spawn("relay-outbox").await;
    assert_eq!(published(&admin, &database, 30).await, up_to(30));
    relay.kill().await;
    admin
        .request("$JS.API.STREAM.PURGE.CHAT_EVENTS", "".into())
        .await
        .unwrap();
    sqlx::query("update relayed set seq = 0")
        .execute(&database)
        .await
        .unwrap();
    insert_rows(&mut database.acquire().await.unwrap(), 1, 30, 1).await;
    store(&database, 31, 33, 1).await;
    let _relay = world.spawn("relay-outbox").await;
    assert_eq!(published(&admin, &database, 3).await, [31, 32, 33]);
}

#[tokio::test]
async fn nothing_is_published_twice_after_a_replay() {
    let (world, admin, database) = world().await;
    forget_ids(&admin).await;
    advance(&admin, 30_000).await;
    store(&database, 1, 2_500, 6).await;
    let relay = world.spawn("relay-outbox").await;
    assert_eq!(published(&admin, &database, 2_500).await, up_to(2_500));

    // Like a restored database, which does not know what was published. More rows than are deleted
    // at once.
    let mut transaction = database.begin().await.unwrap();
    sqlx::query("update relayed set seq = 0")
        .execute(&mut *transaction)
        .await
        .unwrap();
    let single_rows = "
        insert into outbox (first_seq, last_seq, seqs)
        select seq, seq, array[seq] from generate_series(1::bigint, 2500) as seq";
    sqlx::query(single_rows)
        .execute(&mut *transaction)
        .await
        .unwrap();
    for _ in 0..10 {
        insert_rows(&mut transaction, 1, 2_500, 2_500).await;
    }
    transaction.commit().await.unwrap();
    wake(&world).await;
    store(&database, 2_501, 2_600, 3).await;
    assert_eq!(published(&admin, &database, 2_600).await, up_to(2_600));

    // The stream has dropped everything, for instance because of its age; the table remembers.
    relay.kill().await;
    admin
        .request("$JS.API.STREAM.PURGE.CHAT_EVENTS", "".into())
        .await
        .unwrap();
    insert_rows(&mut database.acquire().await.unwrap(), 1, 2_600, 6).await;
    store(&database, 2_601, 2_700, 3).await;
    let _relay = world.spawn("relay-outbox").await;
    assert_eq!(
        published(&admin, &database, 100).await,
        (2_601..=2_700).collect::<Vec<u64>>()
    );
    assert_eq!(relayed(&database).await, 2_700);
}
