//! Erases what a user wrote: nothing of it is left anywhere, and nothing else is changed.

use async_nats::HeaderMap;

use super::*;

const SECRET: &str = "correct horse battery staple";

/// Writes everything a user may write: rooms, conversations, duplicates, and what cannot be stored.
async fn write(client: &Client, user: &str, many: usize) {
    let body = |text: String| json!({"user": user, "text": text}).to_string();
    for number in 0..many {
        client
            .publish(
                format!("chat.room-{}", number % 7),
                body(format!("{SECRET} {number}")).into(),
            )
            .await
            .unwrap();
    }
    client.flush().await.unwrap();
    let with_id = json!({"user": user, "text": SECRET, "id": "mine"});
    for subject in ["chat.general", "chat.general", "chat.other"] {
        publish(client, subject, with_id.clone()).await;
    }
    publish(
        client,
        "admin.alerts",
        json!({"user": user, "text": SECRET}),
    )
    .await;
    publish(
        client,
        &format!("dm.{user}.zoe"),
        json!({"user": user, "text": SECRET}),
    )
    .await;
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", format!("{user}-header"));
    client
        .publish_with_headers("chat.general", headers, body(SECRET.to_owned()).into())
        .await
        .unwrap();
    // What cannot be stored.
    publish(
        client,
        "chat.general",
        json!({"user": user, "text": 7, "note": SECRET}),
    )
    .await;
    publish(
        client,
        "chat.general",
        json!({"user": user, "text": SECRET.repeat(3_000)}),
    )
    .await;
    publish(client, &format!("dm.{user}.zoe"), json!({"note": SECRET})).await;
}

const OTHERS: usize = 9;

/// Repeats a request that failed and is retryable, and sets `refused` then: a busy disk may not
/// acknowledge within the short time of a part.
async fn erase(world: &World, body: Value, refused: &mut bool) -> Erased {
    let client = world.client("operator").await;
    let reply = eventually("an answer", SOON, async || {
        let reply = ask(&client, RETENTION_ERASE.subject(&[]), body.clone()).await;
        let retryable = reply["error"]["retryable"] == true;
        *refused |= retryable;
        (!retryable).then_some(reply)
    })
    .await;
    serde_json::from_value(reply.clone()).unwrap_or_else(|error| panic!("{error}: {reply}"))
}

/// Erases part by part; returns the sum, and how many parts. The sum is too small if a part failed
/// after it had started.
async fn erase_all(
    world: &World,
    user: &str,
    dry_run: bool,
    refused: &mut bool,
) -> (Erased, usize) {
    let mut sum = erase(world, json!({"user": user, "dry_run": dry_run}), refused).await;
    let mut parts = 1;
    while sum.more {
        let part = erase(
            world,
            json!({"user": user, "dry_run": dry_run, "after": sum.through}),
            refused,
        )
        .await;
        sum = Erased {
            deletions: sum.deletions + part.deletions,
            underway: sum.underway + part.underway,
            letters: sum.letters + part.letters,
            unfit: sum.unfit + part.unfit,
            waiting: sum.waiting + part.waiting,
            ..part
        };
        parts += 1;
        assert!(parts < 2_000, "{sum:?}");
    }
    (sum, parts)
}

/// Sequences in the stream whose payload is by `user` and contains the secret.
async fn in_stream_of(world: &World, user: &str) -> Vec<u64> {
    let reader = world.client("enforce-retention").await;
    let (first, last) = range(world).await;
    let mut found = Vec::new();
    let stream = async_nats::jetstream::new(reader);
    let stream = stream.get_stream(protocol::subject::STREAM).await.unwrap();
    for seq in first..=last {
        let Ok(message) = stream.get_raw_message(seq).await else {
            continue;
        };
        let text = String::from_utf8_lossy(&message.payload).into_owned();
        let by = text.contains(&format!(r#""user":"{user}""#))
            || message.subject.starts_with(&format!("dm.{user}."));
        if by && text.contains(SECRET) {
            found.push(seq);
        }
    }
    found
}

async fn in_database(database: &PgPool, user: &str) -> (i64, i64) {
    let sql = "
        select count(*), count(*) filter (where deleted and text = '')
          from messages where sender = $1";
    sqlx::query_as(sql)
        .bind(user)
        .fetch_one(database)
        .await
        .unwrap()
}

const STORED: usize = 2_000;
const UNSTORED: usize = 500;
/// How many deletions erasing ann takes. One id has three messages in the stream, and one row. In
/// another room it is a conflict, and becomes a dead letter.
const WANTED: u64 = (STORED + UNSTORED + OTHERS - 3) as u64;

/// Messages of ann and bob: stored ones, expired ones that only the stream still holds, and some
/// that are not stored yet. Returns the last sequence that is stored.
async fn write_all(world: &World, client: &Client, database: &PgPool) -> u64 {
    write(client, "ann", STORED).await;
    write(client, "bob", 50).await;
    store(world).await;
    let (_, stored) = range(world).await;
    sqlx::raw_sql("delete from messages where sender = 'ann' and seq <= 10")
        .execute(database)
        .await
        .unwrap();
    for number in 0..UNSTORED {
        let late = json!({"user": "ann", "text": format!("{SECRET}, late {number}")});
        publish(client, "chat.general", late).await;
    }
    stored
}

#[tokio::test]
async fn nothing_of_a_user_is_left_and_their_sequences_remain() {
    let world = World::start().await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    let stored = write_all(&world, &client, &database).await;
    let bob_in_stream = in_stream_of(&world, "bob").await;
    let bob_in_database = in_database(&database, "bob").await;
    // Only a short time for each part.
    let running = start(&world, &[("REQUEST_DEADLINE_MS", "800"), SELDOM]).await;
    let mut refused = false;
    check_dry_run(&world, stored, &mut refused).await;
    let (done, parts) = erase_all(&world, "ann", false, &mut refused).await;
    assert!(refused || done.deletions >= WANTED, "{done:?}");
    assert!(parts > 1, "{parts}: {done:?}");
    let Erased {
        letters,
        unfit,
        waiting,
        ..
    } = done;
    assert_eq!((letters, unfit, waiting), (4, 3, 0), "{done:?}");
    // Again, before a worker has applied the deletions: nothing is appended twice.
    let (_, last) = range(&world).await;
    let (again, _) = erase_all(&world, "ann", false, &mut refused).await;
    assert_eq!(again.deletions, 0, "{again:?}");
    assert_eq!(range(&world).await.1, last);
    assert!(again.underway > 0);
    let (dry, _) = erase_all(&world, "ann", true, &mut refused).await;
    assert_eq!((dry.deletions, dry.underway), (0, WANTED), "{dry:?}");

    store(&world).await;
    check_erased(&world, &database).await;
    assert_eq!(in_stream_of(&world, "bob").await, bob_in_stream);
    assert_eq!(in_database(&database, "bob").await, bob_in_database);
    let (nothing, _) = erase_all(&world, "ann", false, &mut refused).await;
    assert_eq!((nothing.deletions, nothing.underway), (0, 0), "{nothing:?}");
    assert_eq!((nothing.letters, nothing.unfit), (0, 0), "{nothing:?}");
    running.stop().await.unwrap();
}

async fn check_dry_run(world: &World, stored: u64, refused: &mut bool) {
    let (dry, _) = erase_all(world, "ann", true, refused).await;
    assert_eq!((dry.deletions, dry.dry_run), (WANTED, true), "{dry:?}");
    assert_eq!((dry.letters, dry.unfit), (4, 3), "{dry:?}");
    // Another part does not count again what the first part has counted.
    let request = json!({"user": "ann", "dry_run": true, "after": stored});
    let rest = erase(world, request, refused).await;
    assert_eq!(rest.deletions, UNSTORED as u64, "{rest:?}");
    assert_eq!(rest.unfit, 0, "{rest:?}");
    let held = in_stream_of(world, "ann").await.len() as u64;
    assert_eq!(held, WANTED + 3, "a dry run does nothing");
}

async fn check_erased(world: &World, database: &PgPool) {
    assert_eq!(in_stream_of(world, "ann").await, [0_u64; 0]);
    // The id with three messages has one row.
    let tombstones = i64::try_from(WANTED).unwrap() - 2;
    assert_eq!(in_database(database, "ann").await, (tombstones, tombstones));
    let erased = "
        select count(*) from dead_letters
         where outcome = 'erased' and payload = '' and headers = ''";
    let dead_letters: i64 = sqlx::query_scalar(erased)
        .fetch_one(database)
        .await
        .unwrap();
    assert_eq!(dead_letters, 4);
}

#[tokio::test]
async fn what_is_no_dead_letter_yet_stays_until_it_is() {
    let world = World::start().await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    publish(
        &client,
        "chat.general",
        json!({"user": "ann", "note": SECRET}),
    )
    .await;
    let running = start(&world, &[SELDOM]).await;
    let first = erase(&world, json!({"user": "ann"}), &mut false).await;
    assert_eq!((first.waiting, first.unfit, first.more), (1, 0, false));
    store(&world).await;
    assert_eq!(
        count(&database, "dead_letters").await,
        1,
        "the guarantee holds"
    );
    let second = erase(&world, json!({"user": "ann"}), &mut false).await;
    assert_eq!((second.waiting, second.unfit, second.letters), (0, 1, 1));
    assert!(!in_stream(&world, 1).await);
    let refused = ask(
        &world.client("operator").await,
        RETENTION_ERASE.subject(&[]),
        json!({}),
    )
    .await;
    assert_eq!(refused["error"]["code"], 400);
    running.stop().await.unwrap();
}
