//! No worker, a full log, no log, no database, two operators at once.

use super::*;

/// Changes the stream as the administrator may.
async fn update(admin: &Client, field: &str, value: Value) {
    let mut config: Value =
        serde_json::from_str(include_str!("../../../../nats/streams/CHAT_MESSAGES.json")).unwrap();
    config[field] = value;
    let reply = admin
        .request(protocol::js_api::STREAM_UPDATE, config.to_string().into())
        .await
        .unwrap();
    let reply: Value = serde_json::from_slice(&reply.payload).unwrap();
    assert_eq!(reply.get("error"), None, "{reply}");
}

#[tokio::test]
async fn without_a_worker_it_is_appended_and_marked() {
    let world = World::start().await;
    let function = start_with(&world, &[("REQUEST_DEADLINE_MS", "1000")]).await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let id = put(
        &database,
        7,
        "chat.general",
        "",
        body("ann", "hello").as_bytes(),
        "text_too_long",
    )
    .await;
    assert_eq!(
        retry(&operator, id).await.unwrap(),
        json!({"id": id, "seq": 1, "outcome": "appended"})
    );
    assert_eq!(
        outcome(&database, id).await,
        (Some("retried".to_owned()), Some(1))
    );
    // Another message stands there in the index, and the worker has yet to say that the position is
    // used twice.
    sqlx::query("insert into rooms (name) values ('general')")
        .execute(&database)
        .await
        .unwrap();
    let other = "
        insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
        values (2, 1, 'bob', 'b', false, '', now(), now())";
    sqlx::query(other).execute(&database).await.unwrap();
    let id = put(
        &database,
        8,
        "chat.general",
        "",
        body("ann", "again").as_bytes(),
        "text_too_long",
    )
    .await;
    assert_eq!(
        retry(&operator, id).await.unwrap(),
        json!({"id": id, "seq": 2, "outcome": "appended"})
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_full_log_leaves_the_dead_letter_as_it_was() {
    let world = World::builder().administrator().start().await;
    let function = start(&world).await;
    let operator = world.client("operator").await;
    let admin = world.client("administrator").await;
    let database = world.database().await;
    let id = put(
        &database,
        7,
        "chat.general",
        "",
        &b"t".repeat(8_000),
        "not_json",
    )
    .await;
    update(&admin, "max_bytes", json!(1_000)).await;
    let (code, reason) = retry(&operator, id).await.unwrap_err();
    assert!(
        code == 503 && reason.contains("the stream is full"),
        "{code} {reason}"
    );
    assert_eq!(outcome(&database, id).await, (None, None));
    update(&admin, "max_bytes", json!(1_000_000)).await;
    let _worker = world.spawn("persist-message").await;
    assert_eq!(
        retry(&operator, id).await.unwrap(),
        json!({"id": id, "seq": 1, "outcome": "dead_letter", "reason": "not_json"})
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_log_that_is_away_leaves_the_dead_letter_as_it_was() {
    let world = World::builder().administrator().start().await;
    let function = start(&world).await;
    let operator = world.client("operator").await;
    let admin = world.client("administrator").await;
    let database = world.database().await;
    let id = put(&database, 7, "chat.general", "", b"x", "not_json").await;
    // As while sequences are being lifted.
    update(
        &admin,
        "subjects",
        json!([protocol::subject::GUARD_SUBJECT]),
    )
    .await;
    for _ in 0..2 {
        let (code, reason) = retry(&operator, id).await.unwrap_err();
        assert!(
            code == 503 && reason.contains("the stream is not there"),
            "{code} {reason}"
        );
        assert_eq!(outcome(&database, id).await, (None, None));
        admin
            .request(
                format!("$JS.API.STREAM.DELETE.{}", protocol::subject::STREAM),
                "".into(),
            )
            .await
            .unwrap();
    }
    function.stop().await.unwrap();
}

#[tokio::test]
async fn without_postgresql_every_answer_is_a_503() {
    let world = World::with_own_postgres().await;
    let function = start_with(&world, &[("REQUEST_DEADLINE_MS", "1500")]).await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let id = put(&database, 7, "chat.general", "", b"x", "not_json").await;
    show(&operator, id).await.unwrap();
    world.postgres().pause().await;
    for asked in [
        ask(&operator, DEADLETTERS_LIST.subject(&[]), "").await,
        show(&operator, id).await,
        retry(&operator, id).await,
        discard(&operator, id).await,
    ] {
        let (code, reason) = asked.unwrap_err();
        assert!(
            code == 503 && reason.contains("the database does not answer"),
            "{code} {reason}"
        );
    }
    world.postgres().resume();
    eventually("it answers again", SOON, async || {
        show(&operator, id).await.ok()
    })
    .await;
    let info = operator
        .request(protocol::js_api::STREAM_INFO, "".into())
        .await
        .unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&info.payload).unwrap()["state"]["last_seq"],
        0,
        "what could not be marked was not appended"
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn two_operators_at_once_append_once() {
    let world = World::start().await;
    let (function, _worker) = tokio::join!(start(&world), world.spawn("persist-message"));
    let one = world.client("operator").await;
    let other = world.client("operator").await;
    let database = world.database().await;
    for seq in 1..=5 {
        let id = put(
            &database,
            seq,
            "chat.general",
            "",
            body("ann", "hello").as_bytes(),
            "text_too_long",
        )
        .await;
        let (left, right) = tokio::join!(retry(&one, id), retry(&other, id));
        let (good, bad) = if left.is_ok() {
            (left, right)
        } else {
            (right, left)
        };
        assert_eq!(
            good.unwrap(),
            json!({"id": id, "seq": seq, "outcome": "stored"})
        );
        assert_eq!(
            bad.unwrap_err(),
            (
                409,
                format!("dead letter {id} was retried already: the stream has it as {seq}")
            )
        );
    }
    function.stop().await.unwrap();
}

/// Its author deletes the message while an operator retries it: nothing of it gets into the stream.
#[tokio::test]
async fn a_dead_letter_that_is_being_erased_is_not_appended() {
    let world = World::start().await;
    let function = start(&world).await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let id = put(
        &database,
        7,
        "chat.general",
        "",
        body("ann", "regretted").as_bytes(),
        "text_too_long",
    )
    .await;
    let mut erasing = database.begin().await.unwrap();
    sqlx::query(
        "update dead_letters set outcome = 'erased', outcome_at = now(),
      payload = '' where id = $1",
    )
    .bind(id)
    .execute(&mut *erasing)
    .await
    .unwrap();
    let (retried, ()) = tokio::join!(retry(&operator, id), async {
        let waits = "select count(*) from pg_stat_activity where datname = current_database() and
          wait_event_type = 'Lock'";
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
    let (code, reason) = retried.unwrap_err();
    assert!(
        code == 409 && reason.contains("is erased"),
        "{code} {reason}"
    );
    let info = operator
        .request(protocol::js_api::STREAM_INFO, "".into())
        .await
        .unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&info.payload).unwrap()["state"]["last_seq"],
        0
    );
    function.stop().await.unwrap();
}
