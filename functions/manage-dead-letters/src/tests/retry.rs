//! Dead letters back into the stream, with a real worker.

use super::*;

/// A world with a worker that takes texts of at most 100 bytes, and one dead letter whose text is
/// longer.
async fn too_long(fields: Value) -> (World, testing::Process, i64) {
    let world = World::builder().administrator().start().await;
    let worker = world
        .spawn_with("persist-message", &[("MAX_TEXT_BYTES", "100")])
        .await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let mut message = json!({"user": "ann", "text": "t".repeat(200)});
    message
        .as_object_mut()
        .unwrap()
        .extend(fields.as_object().unwrap().clone());
    let seq = publish(
        &publisher,
        "chat.general",
        &[("X-Kept", "yes"), ("Nats-Expected-Last-Sequence", "0")],
        &message.to_string(),
    )
    .await;
    let id = dead_letter_at(&database, seq).await;
    settled(&world.client("operator").await).await;
    (world, worker, id)
}

#[tokio::test]
async fn what_can_be_stored_by_now_is_stored() {
    let (world, worker, id) = too_long(json!({})).await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let function = start_with(&world, &[("MAX_TEXT_BYTES", "100")]).await;
    worker.kill().await;
    let _worker = world.spawn("persist-message").await;
    let listed = list(&operator, json!({})).await;
    assert_eq!(
        (
            &listed["letters"][0]["reason"],
            &listed["letters"][0]["seq"]
        ),
        (&json!("text_too_long"), &json!(1)),
        "{listed}"
    );

    let retried = retry(&operator, id).await.unwrap();
    assert_eq!(retried, json!({"id": id, "seq": 2, "outcome": "stored"}));
    assert_eq!(text_at(&database, 2).await.unwrap(), "t".repeat(200));
    assert_eq!(
        outcome(&database, id).await,
        (Some("retried".to_owned()), Some(2))
    );
    assert!(ids(&operator, json!({})).await.is_empty());
    let page = list(&operator, json!({"outcome": "retried"})).await;
    assert_eq!(
        (&page["letters"][0]["id"], &page["letters"][0]["outcomeSeq"]),
        (&json!(id), &json!(2)),
        "{page}"
    );
    let (code, reason) = retry(&operator, id).await.unwrap_err();
    assert!(
        code == 409
            && reason == format!("dead letter {id} was retried already: the stream has it as 2"),
        "{code} {reason}"
    );

    let admin = world.client("administrator").await;
    let reply = admin
        .request(
            protocol::js_api::MESSAGE_GET,
            json!({"seq": 2}).to_string().into(),
        )
        .await
        .unwrap();
    let reply: Value = serde_json::from_slice(&reply.payload).unwrap();
    let headers = {
        use base64::Engine as _;
        String::from_utf8(
            base64::engine::general_purpose::STANDARD
                .decode(reply["message"]["hdrs"].as_str().unwrap())
                .unwrap(),
        )
        .unwrap()
    };
    assert!(
        headers.contains("X-Kept: yes") && !headers.contains("Expected"),
        "{headers}"
    );
    assert!(
        headers.contains(&format!("Nats-Msg-Id: /retry/{id}/")),
        "{headers}"
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn what_is_still_bad_is_a_dead_letter_again() {
    let (world, _worker, id) = too_long(json!({"id": "a-1"})).await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let function = start(&world).await;
    assert_eq!(
        retry(&operator, id).await.unwrap(),
        json!({"id": id, "seq": 2, "outcome": "dead_letter", "reason": "text_too_long"})
    );
    let again = dead_letter_at(&database, 2).await;
    assert_eq!(ids(&operator, json!({})).await, [again]);
    // And again: a dead letter of its own, which nobody takes for the first one's repetition.
    assert_eq!(retry(&operator, again).await.unwrap()["seq"], 3);
    assert_eq!(
        ids(&operator, json!({"outcome": "retried"})).await,
        [id, again]
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn what_is_stored_under_another_position_is_a_duplicate() {
    let (world, worker, id) = too_long(json!({"id": "a-1"})).await;
    let operator = world.client("operator").await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let function = start(&world).await;
    worker.kill().await;
    let _worker = world.spawn("persist-message").await;
    let message = json!({"user": "ann", "text": "t".repeat(200), "id": "a-1"}).to_string();
    assert_eq!(publish(&publisher, "chat.general", &[], &message).await, 2);
    eventually("sent again, it is stored", SOON, async || {
        text_at(&database, 2).await
    })
    .await;
    settled(&operator).await;
    assert_eq!(
        retry(&operator, id).await.unwrap(),
        json!({"id": id, "seq": 3, "outcome": "duplicate"})
    );
    assert_eq!(text_at(&database, 3).await, None);
    assert_eq!(
        outcome(&database, id).await,
        (Some("retried".to_owned()), Some(3))
    );
    function.stop().await.unwrap();
}

/// Under its own id it would be a dead letter for ever.
#[tokio::test]
async fn a_conflict_is_stored_under_an_id_of_the_retry() {
    let world = World::start().await;
    let operator = world.client("operator").await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let (function, _worker) = tokio::join!(start(&world), world.spawn("persist-message"));
    let message = |text: &str, id: &str| json!({"user": "ann", "text": text, "id": id}).to_string();
    publish(&publisher, "chat.general", &[], &message("one", "1")).await;
    let by_body = publish(
        &publisher,
        "chat.general",
        &[("X-Kept", "yes")],
        &message("two", "1"),
    )
    .await;
    publish(
        &publisher,
        "dm.ann.bob",
        &[("Nats-Msg-Id", "h")],
        &body("ann", "three"),
    )
    .await;
    // As a header that JetStream has forgotten by now.
    let by_header = publish(
        &publisher,
        "dm.ann.bob",
        &[("Scrollback-Original-Id", "h")],
        &body("ann", "four"),
    )
    .await;
    let letters = [
        dead_letter_at(&database, by_body).await,
        dead_letter_at(&database, by_header).await,
    ];
    let listed = list(&operator, json!({"reason": "id_conflict"})).await;
    assert_eq!(listed["letters"].as_array().unwrap().len(), 2, "{listed}");
    assert_eq!(
        show(&operator, letters[0]).await.unwrap()["text"],
        message("two", "1"),
        "as it came"
    );
    for (id, text) in [(letters[0], "two"), (letters[1], "four")] {
        let retried = retry(&operator, id).await.unwrap();
        assert_eq!(retried["outcome"], "stored", "{retried}");
        assert_eq!(
            text_at(&database, retried["seq"].as_i64().unwrap())
                .await
                .as_deref(),
            Some(text)
        );
        unmark(&database, id).await;
        assert_eq!(retry(&operator, id).await.unwrap(), retried, "once");
    }
    function.stop().await.unwrap();
}

/// A dead letter whose id another text has by now conflicts as the message would.
#[tokio::test]
async fn what_conflicts_by_now_is_a_dead_letter_again() {
    let (world, worker, id) = too_long(json!({"id": "a-1"})).await;
    let operator = world.client("operator").await;
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let function = start(&world).await;
    let message = json!({"user": "ann", "text": "shorter", "id": "a-1"}).to_string();
    assert_eq!(publish(&publisher, "chat.general", &[], &message).await, 2);
    eventually("the shorter one is stored", SOON, async || {
        text_at(&database, 2).await
    })
    .await;
    settled(&operator).await;
    worker.kill().await;
    let _worker = world.spawn("persist-message").await;
    assert_eq!(
        retry(&operator, id).await.unwrap(),
        json!({"id": id, "seq": 3, "outcome": "dead_letter", "reason": "id_conflict"})
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn the_id_it_came_with_stays() {
    let world = World::start().await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let (function, _worker) = tokio::join!(start(&world), world.spawn("persist-message"));
    let named = put(
        &database,
        1,
        "dm.ann.bob",
        "NATS/1.0\r\nNats-Msg-Id: first\r\n\r\n",
        body("x", "one").as_bytes(),
        "text_too_long",
    )
    .await;
    let unnamed = put(
        &database,
        2,
        "chat.general",
        "",
        body("ann", "two").as_bytes(),
        "text_too_long",
    )
    .await;
    for id in [named, unnamed] {
        assert_eq!(retry(&operator, id).await.unwrap()["outcome"], "stored");
    }
    let stored: Vec<(String, String, bool)> =
        sqlx::query_as("select sender, id, derived from messages order by seq")
            .fetch_all(&database)
            .await
            .unwrap();
    assert_eq!(stored[0], ("ann".to_owned(), "first".to_owned(), false));
    assert!(
        stored[1].1.starts_with(&format!("/retry/{unnamed}/")) && !stored[1].2,
        "{stored:?}"
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_retry_that_died_before_it_was_marked_appends_once() {
    let (world, worker, id) = too_long(json!({})).await;
    let operator = world.client("operator").await;
    let admin = world.client("administrator").await;
    let database = world.database().await;
    let function = start(&world).await;
    worker.kill().await;
    let _worker = world.spawn("persist-message").await;
    let first = retry(&operator, id).await.unwrap();
    unmark(&database, id).await;
    assert_eq!(
        retry(&operator, id).await.unwrap(),
        first,
        "JetStream remembers it"
    );

    // Longer ago than JetStream remembers, the index does: the message had no id.
    let mut config: Value =
        serde_json::from_str(include_str!("../../../../nats/streams/CHAT_MESSAGES.json")).unwrap();
    let mut window = 100_000_000;
    let late = eventually("JetStream has forgotten it", SOON, async || {
        // Another window each time: nats-server may look for what is too old before it has taken in
        // the new one.
        window += 1;
        config["duplicate_window"] = json!(window);
        admin
            .request(protocol::js_api::STREAM_UPDATE, config.to_string().into())
            .await
            .unwrap();
        unmark(&database, id).await;
        let late = retry(&operator, id).await.unwrap();
        (late["seq"] != first["seq"]).then_some(late)
    })
    .await;
    assert_eq!(
        (&late["outcome"], &first["outcome"]),
        (&json!("duplicate"), &json!("stored"))
    );
    let rows: Vec<i64> = sqlx::query_scalar("select seq from messages")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(rows, [first["seq"].as_i64().unwrap()]);
    function.stop().await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_published_as_it_was_is_refused() {
    let world = World::start().await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let function = start(&world).await;
    for (subject, headers, reason, said) in [
        (
            "chat.general",
            "",
            "below_fence",
            "stream-bootstrap appends it",
        ),
        (
            "chat.general",
            "NATS/1.0\r\nA B: c\r\n\r\n",
            "malformed_headers",
            "headers that cannot be sent",
        ),
        (
            "chat.general",
            "NATS/1.0\r\nA B: c\r\n\r\n",
            "not_json",
            "headers that cannot be sent",
        ),
        (
            "chat.general",
            "",
            "malformed_subject",
            "cannot be published to",
        ),
        (
            "chat.general",
            "",
            "nul_in_subject",
            "cannot be published to",
        ),
        ("chat.a\u{fffd}", "", "not_json", "cannot be published to"),
        (
            "chat.a 5\r\nPING\r\n",
            "",
            "not_json",
            "cannot be published to",
        ),
        (
            "chat.history.general",
            "",
            "unsupported_subject",
            "the stream does not accept",
        ),
        (
            "chat.",
            "",
            "unsupported_subject",
            "the stream does not accept",
        ),
    ] {
        let id = put(&database, 1, subject, headers, subject.as_bytes(), reason).await;
        let (code, reason_given) = retry(&operator, id).await.unwrap_err();
        assert!(
            code == 409 && reason_given.contains(said),
            "{subject:?} {reason}: {code} {reason_given}"
        );
        assert_eq!(outcome(&database, id).await, (None, None));
        discard(&operator, id).await.unwrap();
    }
    let reader = world.client("operator").await;
    let info = reader
        .request(protocol::js_api::STREAM_INFO, "".into())
        .await
        .unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&info.payload).unwrap()["state"]["last_seq"],
        0,
        "nothing was appended"
    );
    function.stop().await.unwrap();
}
