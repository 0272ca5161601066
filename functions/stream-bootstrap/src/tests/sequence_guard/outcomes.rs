//! Dead letters with an outcome: the decision stays valid, whatever stream comes back.

use super::*;

async fn settle(database: &PgPool, seq: i64, outcome: &str) {
    sqlx::query(
        "update dead_letters
            set outcome = $2, outcome_at = now(),
                headers = case $2 when 'erased' then '' else headers end,
                payload = case $2 when 'erased' then '' else payload end
          where seq = $1",
    )
    .bind(seq)
    .bind(outcome)
    .execute(database)
    .await
    .unwrap();
}

#[tokio::test]
async fn dead_letters_with_an_outcome_are_not_appended() {
    let (world, admin, database) = three_unstored().await;
    close(&admin).await;
    for (seq, text) in [(1, "one"), (2, "two"), (3, "three")] {
        salvage(&database, seq, text).await;
    }
    settle(&database, 1, "dropped").await;
    settle(&database, 3, "erased").await;
    advance(&admin).await;
    let running = start(&world).await.unwrap();
    assert_eq!(texts(&entries(&admin).await), [(501, "two")]);
    assert_eq!(
        dead_letters(&database).await,
        [1, 3].map(|seq| (seq, "below_fence".to_owned()))
    );
    let found = check(&world).await;
    assert!(found.ok, "what has an outcome waits for nothing: {found:?}");
    running.stop().await.unwrap();
}

/// A stream that was created by hand or restored holds again what was dropped or erased.
#[tokio::test]
async fn a_dead_letter_with_an_outcome_is_not_salvaged_again() {
    let (world, admin, database) = three_unstored().await;
    salvage(&database, 1, "one").await;
    settle(&database, 1, "dropped").await;
    // Dead letters with another reason, erased: only sequence and time of receipt are left. The
    // third one was another message, of the lost stream; the message at that sequence now was not
    // erased.
    let erased = "
        insert into dead_letters
               (seq, subject, headers, payload, reason, received_at, outcome, outcome_at)
        values ($1, 'chat.general', '', '', 'text_too_long',
                'epoch'::timestamptz + $2 * interval '1 ms', 'erased', now())";
    for (seq, received_ms) in [(2_i64, received_ms(&admin, 2).await), (3, 0)] {
        sqlx::query(erased)
            .bind(seq)
            .bind(received_ms)
            .execute(&database)
            .await
            .unwrap();
    }
    start(&world).await.unwrap().stop().await.unwrap();
    assert_eq!(texts(&entries(&admin).await), [(501, "three")]);
    let left = [
        (1, "below_fence"),
        (2, "text_too_long"),
        (3, "text_too_long"),
    ];
    assert_eq!(
        dead_letters(&database).await,
        left.map(|(seq, reason)| (seq, reason.to_owned()))
    );
}

/// An operator or an author gives an outcome while dead letters are appended: the row is locked, so
/// either the append happens first, or it does not happen.
#[tokio::test]
async fn an_outcome_given_meanwhile_is_waited_for() {
    let (world, admin, database) = three_unstored().await;
    close(&admin).await;
    salvage(&database, 1, "one").await;
    salvage(&database, 2, "two").await;
    advance(&admin).await;
    let mut erasing = database.begin().await.unwrap();
    let erase = "
        update dead_letters set outcome = 'erased', outcome_at = now(), payload = '' where seq = 2";
    sqlx::query(erase).execute(&mut *erasing).await.unwrap();
    let (running, ()) = tokio::join!(start(&world), async {
        let waits = "
            select count(*) from pg_stat_activity
             where datname = current_database() and wait_event_type = 'Lock'";
        eventually("it waits for the dead letter", SOON, async || {
            (sqlx::query_scalar::<_, i64>(waits)
                .fetch_one(&database)
                .await
                .unwrap()
                > 0)
            .then_some(())
        })
        .await;
        erasing.commit().await.unwrap();
    });
    assert_eq!(texts(&entries(&admin).await), [(501, "one")]);
    assert_eq!(
        dead_letters(&database).await,
        [(2, "below_fence".to_owned())]
    );
    running.unwrap().stop().await.unwrap();
}
