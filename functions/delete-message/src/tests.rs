//! Deleting as clients see it, on real servers; the worker and get-history are the real binaries.

use std::collections::HashMap;

use async_nats::Client;
use futures::StreamExt;
use serde_json::{Value, json};

use crate::function;
use protocol::endpoints::{DELETE, DM_DELETE, DM_HISTORY, HISTORY};
use protocol::{header, js_api};
use service::config::Vars;
use service::function::Running;
use testing::{SOON, World, eventually};

async fn start(world: &World) -> Running {
    let mut vars: HashMap<String, String> = world.vars("delete-message");
    vars.insert("DELETE_MODERATORS".to_owned(), "mod, other-mod".to_owned());
    function().start(Vars::from_pairs(vars)).await.unwrap()
}

/// The reply's `seq`, or the error's code and message.
async fn delete(
    client: &Client,
    user: &str,
    room: &str,
    body: Value,
) -> Result<u64, (u64, String)> {
    delete_at(client, DELETE.subject(&[user, room]), &body.to_string()).await
}

async fn delete_at(client: &Client, subject: String, body: &str) -> Result<u64, (u64, String)> {
    let reply = client
        .request(subject, body.to_owned().into())
        .await
        .unwrap();
    let answer: Value = serde_json::from_slice(&reply.payload).unwrap();
    if let Some(code) = reply
        .headers
        .as_ref()
        .and_then(|headers| headers.get(header::SERVICE_ERROR_CODE))
    {
        return Err((
            code.as_str().parse().unwrap(),
            answer["error"]["reason"].as_str().unwrap().to_owned(),
        ));
    }
    assert_eq!(answer["status"], "deleted");
    Ok(answer["seq"].as_u64().unwrap())
}

async fn say(client: &Client, subject: &str, user: &str, text: &str, id: Option<&str>) -> u64 {
    let body = json!({"user": user, "text": text, "id": id}).to_string();
    let ack = client
        .request(subject.to_owned(), body.into())
        .await
        .unwrap();
    serde_json::from_slice::<Value>(&ack.payload).unwrap()["seq"]
        .as_u64()
        .expect("an acknowledgement")
}

/// Position, text and whether it is a tombstone; and where the page came from.
async fn page(client: &Client, subject: String) -> (Vec<(u64, String, bool)>, String) {
    let reply = client.request(subject, "".into()).await.unwrap();
    let source = reply
        .headers
        .unwrap()
        .get(header::SOURCE)
        .expect("a page")
        .as_str()
        .to_owned();
    let messages: Vec<protocol::message::Message> = serde_json::from_slice(&reply.payload).unwrap();
    (
        messages
            .into_iter()
            .map(|message| (message.seq.get(), message.text, message.deleted))
            .collect(),
        source,
    )
}

async fn general(client: &Client) -> Vec<(u64, String, bool)> {
    page(client, HISTORY.subject(&["general"])).await.0
}

async fn comes_from(client: &Client, source: &str) {
    eventually(&format!("history from {source}"), SOON, async || {
        (page(client, HISTORY.subject(&["general"])).await.1 == source).then_some(())
    })
    .await;
}

async fn is_in_stream(client: &Client, seq: u64) -> bool {
    let reply = client
        .request(
            js_api::MESSAGE_GET,
            json!({ "seq": seq }).to_string().into(),
        )
        .await
        .unwrap();
    serde_json::from_slice::<Value>(&reply.payload).unwrap()["error"].is_null()
}

fn text(seq: u64, text: &str) -> (u64, String, bool) {
    (seq, text.to_owned(), false)
}

fn tombstone(seq: u64) -> (u64, String, bool) {
    (seq, String::new(), true)
}

#[tokio::test]
async fn a_sender_deletes_and_every_reader_sees_it() {
    let world = World::start().await;
    let function = start(&world).await;
    let _history = world.spawn("get-history").await;
    let client = world.client("publisher").await;
    let mut live = client.subscribe("live.>").await.unwrap();
    let by_seq = say(&client, "chat.general", "ann", "one", Some("a")).await;
    let by_id = say(&client, "chat.general", "ann", "two", Some("b")).await;
    let plain = say(&client, "chat.general", "ann", "three", None).await;
    assert_eq!(
        delete(&client, "ann", "general", json!({"seq": by_seq})).await,
        Ok(by_seq)
    );
    assert_eq!(
        delete(
            &client,
            "ann",
            "general",
            json!({"id": "b", "user": "mallory"})
        )
        .await,
        Ok(by_id)
    );
    assert_eq!(
        general(&client).await,
        [tombstone(by_seq), tombstone(by_id), text(plain, "three")],
        "before anything is stored"
    );
    let worker = world.spawn("persist-message").await;
    comes_from(&client, "index").await;
    assert_eq!(
        delete(
            &client,
            "ann",
            "general",
            json!({"id": format!("seq:{plain}")})
        )
        .await,
        Ok(plain)
    );
    assert_eq!(
        general(&client).await,
        [tombstone(by_seq), tombstone(by_id), tombstone(plain)]
    );
    comes_from(&client, "index").await;
    assert_eq!(
        general(&client).await,
        [tombstone(by_seq), tombstone(by_id), tombstone(plain)],
        "after everything is"
    );
    let mut targets = Vec::new();
    while targets.len() < 3 {
        let heard = tokio::time::timeout(SOON, live.next())
            .await
            .unwrap()
            .unwrap();
        if heard.subject.as_str() == "live.change.chat.general" {
            let body: Value = serde_json::from_slice(&heard.payload).unwrap();
            assert_eq!(
                (&body["type"], &body["mode"], &body["by"]),
                (&json!("delete"), &json!("soft"), &json!("ann"))
            );
            assert!(body.get("text").is_none());
            targets.push(body["target"].as_u64().unwrap());
        }
    }
    assert_eq!(targets, [by_seq, by_id, plain]);
    drop(worker);
    function.stop().await.unwrap();
}

#[tokio::test]
async fn only_the_sender_or_a_moderator_deletes() {
    let world = World::start().await;
    let function = start(&world).await;
    let (_history, worker) =
        tokio::join!(world.spawn("get-history"), world.spawn("persist-message"));
    let client = world.client("publisher").await;
    let check = async |stored: bool| {
        let room = if stored { "stored" } else { "unstored" };
        let subject = format!("chat.{room}");
        let anns = say(&client, &subject, "ann", "one", Some(&format!("{room}-a"))).await;
        let same = format!("{room}-same");
        let shared = [
            say(&client, &subject, "ann", "x", Some(&same)).await,
            say(&client, &subject, "bob", "x", Some(&same)).await,
        ];
        let bobs = say(&client, &subject, "bob", "y", Some(&format!("{room}-b"))).await;
        let direct = say(&client, "dm.ann.mod", "ann", "psst", None).await;
        if stored {
            comes_from(&client, "index").await;
            eventually("the room is stored", SOON, async || {
                (page(&client, HISTORY.subject(&[room])).await.1 == "index").then_some(())
            })
            .await;
        }
        let code = async |user: &str, room: &str, body: Value| {
            delete(&client, user, room, body)
                .await
                .map_err(|(code, _)| code)
        };
        assert_eq!(code("bob", room, json!({"seq": anns})).await, Err(403));
        assert_eq!(
            code("bob", room, json!({"seq": anns, "user": "ann"})).await,
            Err(403)
        );
        assert_eq!(
            code("ann", "elsewhere", json!({"seq": anns})).await,
            Err(404)
        );
        assert_eq!(
            code("ann", "elsewhere", json!({"id": format!("{room}-a")})).await,
            Err(404)
        );
        assert_eq!(
            code("ann", room, json!({"seq": anns + 1_000})).await,
            Err(404)
        );
        assert_eq!(code("ann", room, json!({"seq": i64::MAX})).await, Err(404));
        assert_eq!(code("ann", room, json!({"id": "never"})).await, Err(404));
        assert_eq!(
            code("ann", room, json!({"seq": direct})).await,
            Err(404),
            "direct messages are in no room"
        );
        assert_eq!(code("mod", room, json!({"id": same})).await, Err(409));
        // The requesting user's own message comes first, even if others have used the id.
        assert_eq!(code("bob", room, json!({"id": same})).await, Ok(shared[1]));
        assert_eq!(
            code("mod", room, json!({"id": format!("{room}-b")})).await,
            Ok(bobs)
        );
        assert_eq!(
            code("other-mod", room, json!({"seq": anns})).await,
            Ok(anns)
        );
        // A moderator of rooms has no rights in a direct conversation.
        let by_mod = delete_at(
            &client,
            DM_DELETE.subject(&["mod", "ann"]),
            &json!({"seq": direct}).to_string(),
        )
        .await;
        assert_eq!(by_mod.map_err(|(code, _)| code), Err(403));
        let by_ann = delete_at(
            &client,
            DM_DELETE.subject(&["ann", "mod"]),
            &json!({"seq": direct}).to_string(),
        )
        .await;
        assert_eq!(by_ann, Ok(direct));
        let shown = page(&client, DM_HISTORY.subject(&["mod", "ann"])).await.0;
        assert_eq!(shown.last(), Some(&tombstone(direct)));
        let shown = page(&client, HISTORY.subject(&[room])).await.0;
        assert_eq!(
            shown,
            [
                tombstone(anns),
                text(shared[0], "x"),
                tombstone(shared[1]),
                tombstone(bobs)
            ]
        );
    };
    check(true).await;
    assert!(worker.terminate().await.success());
    check(false).await;
    function.stop().await.unwrap();
}

#[tokio::test]
async fn hard_leaves_no_text_anywhere() {
    const SECRET: &str = "correct horse battery staple";
    let world = World::start().await;
    let function = start(&world).await;
    let _history = world.spawn("get-history").await;
    let client = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    let nowhere = async || {
        for table in [
            "messages",
            "changes",
            "duplicates",
            "dead_letters",
            "outbox",
            "rooms",
        ] {
            let sql =
                format!("select count(*) from {table} t where t::text like $1 or t::text like $2");
            let hex: String = SECRET.bytes().map(|byte| format!("{byte:02x}")).collect();
            let found: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
                .bind(format!("%{SECRET}%"))
                .bind(format!("%{hex}%"))
                .fetch_one(&database)
                .await
                .unwrap();
            assert_eq!(found, 0, "{table}");
        }
    };
    // Before the message is stored.
    let early = say(&client, "chat.general", "ann", SECRET, Some("early")).await;
    assert_eq!(
        delete(
            &client,
            "ann",
            "general",
            json!({"id": "early", "mode": "hard"})
        )
        .await,
        Ok(early)
    );
    assert!(!is_in_stream(&bootstrap, early).await);
    // Deleting a deleted message: by seq, by id, and softly.
    for body in [
        json!({"id": "early"}),
        json!({"seq": early}),
        json!({"seq": early, "mode": "hard"}),
    ] {
        assert_eq!(delete(&client, "ann", "general", body).await, Ok(early));
    }
    assert_eq!(
        delete(&client, "bob", "general", json!({"seq": early}))
            .await
            .map_err(|(code, _)| code),
        Err(403)
    );
    assert_eq!(general(&client).await, [tombstone(early)]);
    let _worker = world.spawn("persist-message").await;
    comes_from(&client, "index").await;
    assert_eq!(general(&client).await, [tombstone(early)]);
    nowhere().await;
    // After it is stored, with a duplicate in the stream; first softly.
    let late = say(&client, "chat.general", "ann", SECRET, Some("late")).await;
    let duplicate = say(&client, "chat.general", "ann", SECRET, Some("late")).await;
    comes_from(&client, "index").await;
    assert_eq!(
        delete(&client, "ann", "general", json!({"seq": duplicate})).await,
        Ok(late),
        "the first one is the one that is shown"
    );
    comes_from(&client, "index").await;
    assert!(is_in_stream(&bootstrap, late).await);
    for _ in 0..2 {
        assert_eq!(
            delete(
                &client,
                "ann",
                "general",
                json!({"seq": late, "mode": "hard"})
            )
            .await,
            Ok(late)
        );
        assert!(!is_in_stream(&bootstrap, late).await);
    }
    eventually("the duplicate is gone, too", SOON, async || {
        (!is_in_stream(&bootstrap, duplicate).await).then_some(())
    })
    .await;
    comes_from(&client, "index").await;
    assert_eq!(general(&client).await, [tombstone(early), tombstone(late)]);
    nowhere().await;
    let changes: Vec<String> = sqlx::query_scalar("select mode from changes order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(
        changes,
        ["hard", "soft", "hard"],
        "a delete of a delete is no change"
    );
    // A soft deletion after a hard one appends nothing either.
    assert_eq!(
        delete(&client, "ann", "general", json!({"seq": early})).await,
        Ok(early)
    );
    let info = bootstrap
        .request(js_api::STREAM_INFO, "".into())
        .await
        .unwrap();
    let info: Value = serde_json::from_slice(&info.payload).unwrap();
    assert_eq!(
        info["state"]["last_seq"], 6,
        "three messages, three deletions"
    );
    let last = client
        .request(HISTORY.subject(&["general"]), "".into())
        .await
        .unwrap();
    assert!(!String::from_utf8_lossy(&last.payload).contains(SECRET));
    function.stop().await.unwrap();
}

#[tokio::test]
async fn while_the_database_is_away_the_stream_is_searched() {
    let world = World::builder()
        .own_postgres()
        .administrator()
        .start()
        .await;
    let function = start(&world).await;
    let (_history, _worker) =
        tokio::join!(world.spawn("get-history"), world.spawn("persist-message"));
    let client = world.client("publisher").await;
    let stored = say(&client, "chat.general", "ann", "one", Some("a")).await;
    let trimmed = say(&client, "chat.general", "ann", "two", Some("b")).await;
    let kept = say(&client, "chat.general", "ann", "three", Some("c")).await;
    comes_from(&client, "index").await;
    world.postgres().stop().await;
    comes_from(&client, "log").await;
    let fresh = say(&client, "chat.general", "ann", "four", None).await;
    assert_eq!(
        delete(&client, "ann", "general", json!({"id": "a"})).await,
        Ok(stored)
    );
    assert_eq!(
        delete(
            &client,
            "ann",
            "general",
            json!({"seq": fresh, "mode": "hard"})
        )
        .await,
        Ok(fresh)
    );
    let wanted = [
        tombstone(stored),
        text(trimmed, "two"),
        text(kept, "three"),
        tombstone(fresh),
    ];
    assert_eq!(general(&client).await, wanted);
    let administrator = world.client("administrator").await;
    let purge = administrator
        .request(
            js_api::STREAM_PURGE,
            json!({ "seq": kept }).to_string().into(),
        )
        .await
        .unwrap();
    assert!(serde_json::from_slice::<Value>(&purge.payload).unwrap()["error"].is_null());
    let (code, reason) = delete(&client, "ann", "general", json!({"seq": trimmed}))
        .await
        .unwrap_err();
    assert_eq!(code, 503, "{reason}");
    let (code, _) = delete(&client, "ann", "general", json!({"id": "b"}))
        .await
        .unwrap_err();
    assert_eq!(code, 503);
    world.postgres().start().await;
    comes_from(&client, "index").await;
    assert_eq!(general(&client).await, wanted);
    assert_eq!(
        delete(&client, "ann", "general", json!({"id": "b"})).await,
        Ok(trimmed),
        "trimmed from the stream, and stored"
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_dead_letter_is_no_message() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    sqlx::query(
        "insert into messages select 1, 77, 'old', null, 'o', false, 'from another life',
        now(), now()",
    )
    .execute(&database)
    .await
    .unwrap();
    let seq = say(&client, "chat.general", "ann", "one", None).await;
    let _worker = world.spawn("persist-message").await;
    let operator = world.client("operator").await;
    eventually("it is dead-lettered", SOON, async || {
        let info = operator
            .request(js_api::CONSUMER_INFO, "".into())
            .await
            .ok()?;
        let info: Value = serde_json::from_slice(&info.payload).ok()?;
        (info["ack_floor"]["stream_seq"] == seq).then_some(())
    })
    .await;
    let letters: i64 = sqlx::query_scalar("select count(*) from dead_letters")
        .fetch_one(&database)
        .await
        .unwrap();
    assert_eq!(letters, 1);
    assert_eq!(
        delete(&client, "ann", "general", json!({"seq": seq}))
            .await
            .map_err(|(code, _)| code),
        Err(404)
    );
    let last = world
        .client("stream-bootstrap")
        .await
        .request(js_api::STREAM_INFO, "".into())
        .await
        .unwrap();
    let last: Value = serde_json::from_slice(&last.payload).unwrap();
    assert_eq!(last["state"]["last_seq"], seq, "nothing was appended");
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_full_stream_is_an_error_and_nothing_else() {
    let world = World::builder().administrator().start().await;
    let function = start(&world).await;
    let _history = world.spawn("get-history").await;
    let client = world.client("publisher").await;
    let administrator = world.client("administrator").await;
    let seq = say(&client, "chat.general", "ann", "one", None).await;
    let limit = async |bytes: i64| {
        let info = administrator
            .request(js_api::STREAM_INFO, "".into())
            .await
            .unwrap();
        let mut config = serde_json::from_slice::<Value>(&info.payload).unwrap()["config"].clone();
        config["max_bytes"] = bytes.into();
        let updated = administrator
            .request(js_api::STREAM_UPDATE, config.to_string().into())
            .await
            .unwrap();
        assert!(serde_json::from_slice::<Value>(&updated.payload).unwrap()["error"].is_null());
    };
    limit(200).await;
    let (code, reason) = delete(
        &client,
        "ann",
        "general",
        json!({"seq": seq, "mode": "hard"}),
    )
    .await
    .unwrap_err();
    assert_eq!(code, 503);
    assert!(reason.contains("full"), "{reason}");
    assert_eq!(
        general(&client).await,
        [text(seq, "one")],
        "nothing was erased without its deletion"
    );
    limit(1 << 20).await;
    assert_eq!(
        delete(
            &client,
            "ann",
            "general",
            json!({"seq": seq, "mode": "hard"})
        )
        .await,
        Ok(seq)
    );
    assert_eq!(general(&client).await, [tombstone(seq)]);
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_bad_request_names_what_is_wrong() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let long = "x".repeat(65);
    for (subject, body, hint) in [
        ("chat.delete.ann.general", "", "is missing"),
        ("chat.delete.ann.general", r#"{"seq":"1"}"#, "seq must be"),
        ("chat.delete.ann.general", r#"{"seq":1,"id":"a"}"#, "either"),
        (
            "chat.delete.ann.general",
            r#"{"seq":1,"mode":"gone"}"#,
            "mode must be",
        ),
        (
            "chat.delete.ann.general",
            r#"{"id":"a\u0000"}"#,
            "id must be",
        ),
        ("chat.delete.ann.general", "[1]", "a JSON object"),
        ("chat.delete.ann", r#"{"seq":1}"#, "the subject must be"),
        ("chat.delete.ann.a.b", r#"{"seq":1}"#, "the subject must be"),
        (
            "dm.delete.ann.bob.carol",
            r#"{"seq":1}"#,
            "the subject must be",
        ),
        (
            &format!("chat.delete.ann.{long}"),
            r#"{"seq":1}"#,
            "a room is",
        ),
        (
            &format!("dm.delete.{long}.bob"),
            r#"{"seq":1}"#,
            "a user is",
        ),
    ] {
        let (code, reason) = delete_at(&client, subject.to_owned(), body)
            .await
            .unwrap_err();
        assert_eq!(code, 400, "{subject} {body}: {reason}");
        assert!(reason.contains(hint), "{subject} {body}: {reason}");
    }
    function.stop().await.unwrap();
    let wrong = world
        .command("delete-message")
        .env("DELETE_MODERATORS", "a b")
        .output()
        .await
        .unwrap();
    assert!(!wrong.status.success());
    assert!(
        String::from_utf8_lossy(&wrong.stderr).contains("DELETE_MODERATORS"),
        "{}",
        String::from_utf8_lossy(&wrong.stderr)
    );
}
