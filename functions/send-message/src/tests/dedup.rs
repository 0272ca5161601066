//! Resends: within JetStream's window, after it, after the log was trimmed, before the index has
//! them.

use super::*;
use protocol::header;

/// One second of memory.
const SHORT_WINDOW_NS: u64 = 1_000_000_000;

/// The `Nats-Msg-Id` of the message at a sequence.
async fn message_id(world: &World, seq: u64) -> String {
    let (_, _, headers) = at(&world.client("send-message").await, seq).await.unwrap();
    let line = headers
        .lines()
        .find_map(|line| line.strip_prefix("Nats-Msg-Id: "))
        .unwrap();
    line.to_owned()
}

/// Waits until JetStream would take this `Nats-Msg-Id` again.
async fn forgotten(client: &Client, message_id: &str) {
    eventually("JetStream has forgotten the id", SOON, async || {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(header::MESSAGE_ID, message_id);
        headers.insert("Nats-Expected-Last-Msg-Id", "never");
        let reply = client
            .request_with_headers("chat.general", headers, "".into())
            .await
            .ok()?;
        let reply: Value = serde_json::from_slice(&reply.payload).ok()?;
        (reply["error"]["err_code"] == 10_070).then_some(())
    })
    .await;
}

async fn stored(world: &World, count: i64) {
    let database = world.database().await;
    eventually("all is stored", SOON, async || {
        let found: i64 = sqlx::query_scalar("select count(*) from messages")
            .fetch_one(&database)
            .await
            .unwrap();
        (found == count).then_some(())
    })
    .await;
}

/// Every way of using `id` again once it stands at `seq` in "general" with text "hello".
async fn check_again(client: &Client, id: &str, seq: u64) {
    check_again_of(client, "ann", id, seq).await;
}

async fn check_again_of(client: &Client, user: &str, id: &str, seq: u64) {
    for _ in 0..2 {
        let again = send(client, user, "general", json!({"text": "hello", "id": id}))
            .await
            .unwrap();
        assert_eq!(
            (again.seq.get(), again.duplicate, again.message_id.as_str()),
            (seq, true, id)
        );
    }
    for (room, text) in [("general", "other text"), ("other", "hello")] {
        let (code, reason) = send(client, user, room, json!({"text": text, "id": id}))
            .await
            .unwrap_err();
        assert!(
            code == 409 && reason.contains("this id belongs to another message"),
            "{code} {reason}"
        );
    }
}

#[tokio::test]
async fn the_same_id_again_is_the_same_message() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    for id in ["a", "with: colon", "line\r\nbreak", " a", "\u{e9}%"] {
        let first = send(
            &client,
            "ann",
            "general",
            json!({"text": "hello", "id": id}),
        )
        .await
        .unwrap();
        assert!(!first.duplicate, "{id:?}");
        check_again(&client, id, first.seq.get()).await;
    }
    let bobs = send(
        &client,
        "bob",
        "general",
        json!({"text": "hello", "id": "a"}),
    )
    .await
    .unwrap();
    assert_eq!(
        (bobs.seq.get(), bobs.duplicate),
        (6, false),
        "another sender's id is another id"
    );
    let one = send(&client, "ann", "general", json!({"text": "hello"}));
    let two = send(&client, "ann", "general", json!({"text": "hello"}));
    let (one, two) = tokio::join!(one, two);
    assert_ne!(
        one.unwrap().seq,
        two.unwrap().seq,
        "without an id it is said twice"
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn an_old_id_is_found_in_the_index_and_after_the_log_was_trimmed() {
    let (world, _bootstrap) = world_with("duplicate_window", json!(SHORT_WINDOW_NS)).await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let _worker = world.spawn("persist-message").await;
    let first = send(
        &client,
        "ann",
        "general",
        json!({"text": "hello", "id": "a"}),
    )
    .await
    .unwrap()
    .seq
    .get();
    stored(&world, 1).await;
    forgotten(&client, &message_id(&world, first).await).await;
    check_again(&client, "a", first).await;
    let administrator = world.client("administrator").await;
    administrator
        .request(js_api::STREAM_PURGE, "".into())
        .await
        .unwrap();
    check_again(&client, "a", first).await;
    assert_eq!(
        last_seq(&administrator).await,
        first,
        "nothing was appended"
    );
    let next = send(
        &client,
        "ann",
        "general",
        json!({"text": "hello", "id": "b"}),
    )
    .await
    .unwrap();
    assert_eq!((next.seq.get(), next.duplicate), (first + 1, false));
    function.stop().await.unwrap();
}

#[tokio::test]
async fn an_old_id_that_nobody_stored_yet_is_found_in_the_log() {
    let (world, _bootstrap) = world_with("duplicate_window", json!(SHORT_WINDOW_NS)).await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let first = send(
        &client,
        "ann",
        "general",
        json!({"text": "hello", "id": "a"}),
    )
    .await
    .unwrap()
    .seq
    .get();
    // A trusted publisher needs no header.
    client
        .request(
            "chat.general",
            r#"{"user":"ann","text":"hello","id":"b"}"#.into(),
        )
        .await
        .unwrap();
    forgotten(&client, &message_id(&world, first).await).await;
    check_again(&client, "a", first).await;
    check_again(&client, "b", first + 1).await;
    let administrator = world.client("administrator").await;
    assert_eq!(
        last_seq(&administrator).await,
        first + 1,
        "nothing was appended"
    );
    assert_eq!(
        send(&client, "ann", "general", json!({"text": "x", "id": "c"}))
            .await
            .unwrap()
            .seq
            .get(),
        first + 2
    );
    let _worker = world.spawn("persist-message").await;
    stored(&world, 3).await;
    check_again(&client, "a", first).await;
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_crowd_of_resends_and_doubles_is_distinguished() {
    let world = World::start().await;
    let function = start_with(&world, &FLOOD).await;
    let client = world.client("publisher").await;
    let body =
        |number: usize| json!({"text": format!("text {number}"), "id": format!("id-{number}")});
    let mut first = HashMap::new();
    for number in 0..20 {
        first.insert(
            number,
            send(&client, "ann", "general", body(number))
                .await
                .unwrap()
                .seq,
        );
    }
    // Numbers below 20 are resends, each of the others comes three times at once, once with another
    // text.
    let sends = (0..240).map(|index| {
        let client = &client;
        let number = index % 60;
        let body = if index >= 180 {
            json!({"text": "another", "id": format!("id-{number}")})
        } else {
            body(number)
        };
        async move {
            (
                number,
                index >= 180,
                send(client, "ann", "general", body).await,
            )
        }
    });
    let mut new = HashMap::new();
    for (number, other, answer) in futures::future::join_all(sends).await {
        match answer {
            Ok(ack) if !ack.duplicate => assert_eq!(
                new.insert(number, (ack.seq, other)),
                None,
                "{number} is new once"
            ),
            Ok(ack) => assert_eq!(*first.entry(number).or_insert(ack.seq), ack.seq, "{number}"),
            Err((code, reason)) => assert_eq!(code, 409, "{number} {other}: {reason}"),
        }
    }
    assert_eq!(new.len(), 40);
    for (number, (seq, other)) in new {
        assert!(number >= 20);
        assert!(
            other || first.get(&number).is_none_or(|again| *again == seq),
            "{number}: the resends have its place"
        );
    }
    let reader = world.client("send-message").await;
    assert_eq!(last_seq(&reader).await, 60);
    function.stop().await.unwrap();
}

#[tokio::test]
async fn while_the_database_is_away_only_what_may_be_a_resend_waits() {
    let world = World::with_own_postgres().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let first = send(
        &client,
        "ann",
        "general",
        json!({"text": "hello", "id": "a"}),
    )
    .await
    .unwrap()
    .seq
    .get();
    world.postgres().stop().await;
    let (code, reason) = send(
        &client,
        "ann",
        "general",
        json!({"text": "hello", "id": "new"}),
    )
    .await
    .unwrap_err();
    assert!(
        code == 503 && reason.contains("the database is away"),
        "{code} {reason}"
    );
    check_again(&client, "a", first).await;
    let made = send(&client, "ann", "general", json!({"text": "no id"}))
        .await
        .unwrap();
    assert_eq!(made.seq.get(), first + 1);
    world.postgres().start().await;
    let new = async || {
        send(
            &client,
            "ann",
            "general",
            json!({"text": "hello", "id": "new"}),
        )
        .await
        .ok()
    };
    assert_eq!(
        eventually("the database is back", SOON, new)
            .await
            .seq
            .get(),
        first + 2
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn the_id_of_a_deleted_message_brings_nothing_back() {
    let (world, _bootstrap) = world_with("duplicate_window", json!(SHORT_WINDOW_NS)).await;
    let function = start(&world).await;
    let _delete = world.spawn("delete-message").await;
    let client = world.client("publisher").await;
    let delete = async |id: &str, mode: &str| {
        let body = json!({"id": id, "mode": mode}).to_string();
        let reply = client
            .request(
                protocol::endpoints::DELETE.subject(&["ann", "general"]),
                body.into(),
            )
            .await
            .unwrap();
        assert_eq!(
            serde_json::from_slice::<Value>(&reply.payload).unwrap()["status"],
            "deleted"
        );
    };
    let again = async |id: &str, text: &str| {
        send(&client, "ann", "general", json!({"text": text, "id": id}))
            .await
            .map(|ack| (ack.seq.get(), ack.duplicate))
            .map_err(|error| error.0)
    };
    let soft = send(
        &client,
        "ann",
        "general",
        json!({"text": "hello", "id": "soft"}),
    )
    .await
    .unwrap()
    .seq
    .get();
    let hard = send(
        &client,
        "ann",
        "general",
        json!({"text": "hello", "id": "hard"}),
    )
    .await
    .unwrap()
    .seq
    .get();
    let name = message_id(&world, hard).await;
    delete("soft", "soft").await;
    delete("hard", "hard").await;
    forgotten(&client, &name).await;
    // Before anything is stored, and afterwards.
    let check = async || {
        assert_eq!(again("soft", "hello").await, Ok((soft, true)));
        assert_eq!(again("soft", "another").await, Err(409));
        assert_eq!(again("hard", "hello").await, Ok((hard, true)));
    };
    check().await;
    let _worker = world.spawn("persist-message").await;
    stored(&world, 2).await;
    check().await;
    let administrator = world.client("administrator").await;
    assert_eq!(
        last_seq(&administrator).await,
        hard + 2,
        "two messages, two deletions"
    );
    administrator
        .request(js_api::STREAM_PURGE, "".into())
        .await
        .unwrap();
    assert_eq!(
        again("soft", "anything").await,
        Ok((soft, true)),
        "nothing is left to compare it with"
    );
    function.stop().await.unwrap();
}

/// JetStream looks for duplicates in the whole stream, by a header that each publisher chooses.
/// Whatever a publisher writes there, and in whosever name, bob's own messages are his.
#[tokio::test]
async fn nobody_takes_an_id_that_somebody_is_going_to_use() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let squat = async |message_id: &str, subject: &str, body: Value| {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(header::MESSAGE_ID, message_id);
        let reply = client
            .request_with_headers(subject.to_owned(), headers, body.to_string().into())
            .await
            .unwrap();
        serde_json::from_slice::<Value>(&reply.payload).unwrap()
    };
    let mallory = json!({"user": "mallory", "text": "hello", "id": "b-1"});
    for name in ["bob:b-1", "b-1", "bob", "mallory:b-1", "bob:general:b-1"] {
        assert_eq!(
            squat(name, "chat.general", mallory.clone()).await["duplicate"],
            Value::Null
        );
        squat(name, "dm.mallory.bob", mallory.clone()).await;
    }
    let first = send(
        &client,
        "bob",
        "general",
        json!({"text": "hello", "id": "b-1"}),
    )
    .await
    .unwrap();
    assert_eq!((first.seq.get(), first.duplicate), (6, false));
    check_again_of(&client, "bob", "b-1", 6).await;
    // Who hears it live knows its name afterwards, and then it is taken.
    let name = message_id(&world, 6).await;
    assert_eq!(
        squat(&name, "chat.general", mallory.clone()).await["duplicate"],
        true
    );
    check_again_of(&client, "bob", "b-1", 6).await;
    let reader = world.client("send-message").await;
    assert_eq!(last_seq(&reader).await, 6);
    function.stop().await.unwrap();
}

/// Side by side in a batch, too, and with a database that is away.
#[tokio::test]
async fn a_replica_finds_what_another_one_sent() {
    let (world, _bootstrap) = world_with("max_msgs_per_subject", json!(-1)).await;
    let one = start_with(&world, &FLOOD).await;
    let client = world.client("publisher").await;
    let body = |number: usize| json!({"text": number.to_string(), "id": number.to_string()});
    let all = async || {
        let send = async |number: usize| {
            send(&client, &format!("user-{number}"), "general", body(number)).await
        };
        let sends = (0..40).map(send);
        futures::future::join_all(sends)
            .await
            .into_iter()
            .map(Result::unwrap)
            .collect::<Vec<SendAck>>()
    };
    let first = all().await;
    one.stop().await.unwrap();
    let another = start_with(&world, &FLOOD).await;
    send(&client, "ann", "general", json!({"text": "x", "id": "x"}))
        .await
        .unwrap();
    for (first, again) in first.iter().zip(all().await) {
        assert_eq!((again.seq, again.duplicate), (first.seq, true));
    }
    world.postgres().stop().await;
    for (first, again) in first.iter().zip(all().await) {
        assert_eq!((again.seq, again.duplicate), (first.seq, true));
    }
    another.stop().await.unwrap();
}

/// What JetStream has forgotten and the database lost stands in the log; it is not appended again.
#[tokio::test]
async fn an_emptied_database_brings_no_id_back() {
    let (world, _bootstrap) = world_with("duplicate_window", json!(SHORT_WINDOW_NS)).await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let worker = world.spawn("persist-message").await;
    let send_x = async |text: &str| {
        send(&client, "ann", "general", json!({"text": text, "id": text}))
            .await
            .unwrap()
    };
    let first = send(
        &client,
        "ann",
        "general",
        json!({"text": "hello", "id": "a"}),
    )
    .await
    .unwrap()
    .seq
    .get();
    send_x("b").await;
    stored(&world, 2).await;
    let name = message_id(&world, first).await;
    forgotten(&client, &name).await;
    check_again(&client, "a", first).await;
    let database = world.database().await;
    sqlx::raw_sql("truncate messages, rooms, changes, duplicates, dead_letters")
        .execute(&database)
        .await
        .unwrap();
    check_again(&client, "a", first).await;
    // Something is stored on top of it, and so the highest sequence says nothing any more.
    send_x("c").await;
    stored(&world, 1).await;
    check_again(&client, "a", first).await;
    // Everything is gone, its tables, too, and recreated.
    sqlx::raw_sql("drop schema public cascade; create schema public")
        .execute(&database)
        .await
        .unwrap();
    let operator = world.client("operator").await;
    let apply = async || {
        let reply = operator
            .request(protocol::endpoints::BOOTSTRAP_APPLY.subject(&[]), "".into())
            .await
            .ok()?;
        serde_json::from_slice::<Value>(&reply.payload).ok()?["done"]
            .is_array()
            .then_some(())
    };
    eventually("the tables are there", SOON, apply).await;
    check_again(&client, "a", first).await;
    // A replay brings all of it back.
    let replayed = operator
        .request(
            protocol::endpoints::BOOTSTRAP_REPLAY.subject(&[]),
            "".into(),
        )
        .await
        .unwrap();
    assert!(
        String::from_utf8_lossy(&replayed.payload).contains("through"),
        "{replayed:?}"
    );
    stored(&world, 3).await;
    check_again(&client, "a", first).await;
    assert_eq!(send_x("d").await.seq.get(), first + 3);
    assert!(worker.terminate().await.success());
    function.stop().await.unwrap();
}

/// A backup is a database that was: what was stored since is not there, and storing goes on behind
/// it.
#[tokio::test]
async fn a_restored_database_brings_no_id_back() {
    let (world, _bootstrap) = world_with("duplicate_window", json!(SHORT_WINDOW_NS)).await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let _worker = world.spawn("persist-message").await;
    let mut places = Vec::new();
    for id in ["a", "b", "c"] {
        places.push(
            send(
                &client,
                "ann",
                "general",
                json!({"text": "hello", "id": id}),
            )
            .await
            .unwrap()
            .seq
            .get(),
        );
    }
    stored(&world, 3).await;
    forgotten(&client, &message_id(&world, places[2]).await).await;
    check_again(&client, "c", places[2]).await;
    let database = world.database().await;
    sqlx::raw_sql("delete from messages where seq > 1")
        .execute(&database)
        .await
        .unwrap();
    client
        .request("chat.general", r#"{"user":"eve","text":"x"}"#.into())
        .await
        .unwrap();
    stored(&world, 2).await;
    for (id, seq) in ["a", "b", "c"].into_iter().zip(&places) {
        check_again(&client, id, *seq).await;
    }
    // Another process finds less, but what is missing at the end, it finds.
    sqlx::raw_sql("delete from messages where seq > 1")
        .execute(&database)
        .await
        .unwrap();
    function.stop().await.unwrap();
    let function = start(&world).await;
    check_again(&client, "c", places[2]).await;
    assert_eq!(last_seq(&world.client("send-message").await).await, 4);
    function.stop().await.unwrap();
}
