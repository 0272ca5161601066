//! Hard deletions beside very many dead letters.

use super::changes::{delete, message};
use std::time::Instant;

use super::*;

const DEAD_LETTERS: i64 = 50_000;

/// In MiB, what the process has had in memory at most since it was asked to forget.
fn peak_mib(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim()
        .trim_end_matches(" kB")
        .trim()
        .parse::<u64>()
        .unwrap()
        / 1_024
}

/// Dead letters of four kilobytes each, all of which a hard deletion may have to empty.
async fn fill(database: &PgPool) {
    sqlx::query(
        r#"insert into dead_letters (seq, subject, headers, payload, reason, received_at)
           select 1000000 + n, 'chat.general', '',
                  convert_to('{"user":"ann","id":"other-' || n || '","text":"' || repeat('x',
                    4000) || '"}', 'UTF8'),
                  'refused_by_database', now()
             from generate_series(1, $1) as n"#,
    )
    .bind(DEAD_LETTERS)
    .execute(database)
    .await
    .unwrap();
}

#[tokio::test]
async fn a_hard_deletion_does_not_load_every_dead_letter() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    fill(&database).await;
    let dead_letter = r#"insert into dead_letters
                    (seq, subject, headers, payload, reason, received_at)
                    values (77, 'chat.general', '',
                      convert_to('{"user":"ann","id":"s","text":"secret"}', 'UTF8'),
                            'refused_by_database', now())"#;
    sqlx::query(dead_letter).execute(&database).await.unwrap();
    let running = world.spawn("persist-message").await;
    let (first, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    settled(&world).await;
    let before = peak_mib(running.id());
    delete(&bootstrap, first, "s", "hard").await;
    // Meanwhile others are stored.
    eventually("the tombstone stands", SOON, async || {
        (count(&database, "select count(*) from messages where deleted").await == 1).then_some(())
    })
    .await;
    let begun = Instant::now();
    publish(
        &publisher,
        "chat.other",
        None,
        &message("not held up", None),
    )
    .await;
    stored(&database, 2, SOON).await;
    let beside = begun.elapsed();
    settled(&world).await;
    let emptied = count(
        &database,
        "select seq from dead_letters where outcome = 'erased' and payload = ''",
    )
    .await;
    assert_eq!(emptied, 77);
    let grown = peak_mib(running.id()).saturating_sub(before);
    assert!(grown < 64, "{grown} MiB for {DEAD_LETTERS} dead letters");
    assert_eq!(
        count(
            &database,
            "select count(*) from dead_letters where sender is null"
        )
        .await,
        0
    );
    // Once they are read, the next one finds its own by the index.
    let (second, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("t")),
    )
    .await;
    settled(&world).await;
    let begun = Instant::now();
    delete(&bootstrap, second, "t", "hard").await;
    settled(&world).await;
    let after = begun.elapsed();
    eprintln!(
        "stored beside it after {beside:?}, the next deletion took {after:?}, memory grew by \
         {grown} MiB"
    );
    assert!(running.terminate().await.success());
}

/// Whatever an operator did about a dead letter, it holds the text until somebody empties it.
#[tokio::test]
async fn a_hard_deletion_empties_letters_that_were_dropped_or_retried() {
    let world = World::start().await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let letters = r#"
        insert into dead_letters (seq, subject, headers, payload, reason, received_at, outcome,
          outcome_at, outcome_seq)
        select seq, 'chat.general', '', convert_to('{"user":"ann","id":"' || id ||
          '","text":"secret"}', 'UTF8'),
               'refused_by_database', now(), outcome, now(), outcome_seq
          from (values (77, 's', 'dropped', null), (78, 's', 'retried', 1), (79, 'other',
            'dropped', null))
               as dead_letter (seq, id, outcome, outcome_seq)"#;
    sqlx::query(letters).execute(&database).await.unwrap();
    let running = world.spawn("persist-message").await;
    let (first, _) = publish(
        &publisher,
        "chat.general",
        None,
        &message("secret", Some("s")),
    )
    .await;
    delete(&bootstrap, first, "s", "hard").await;
    settled(&world).await;
    let left: Vec<(i64, String)> =
        sqlx::query_as("select seq, outcome from dead_letters where payload <> ''")
            .fetch_all(&database)
            .await
            .unwrap();
    assert_eq!(left, [(79, "dropped".to_owned())]);
    let erased =
        "select count(*) from dead_letters where outcome = 'erased' and outcome_seq is null";
    assert_eq!(count(&database, erased).await, 2);
    assert!(running.terminate().await.success());
}
