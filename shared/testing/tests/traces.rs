//! One trace from send to store to query, received by a real OTLP receiver.

use futures::StreamExt;

use testing::{OtlpReceiver, SOON, World, eventually};

#[tokio::test]
async fn send_store_and_query_are_in_one_trace() {
    let world = World::start().await;
    let receiver = OtlpReceiver::start().await;
    let vars = receiver.vars();
    // Otherwise the demonstration would wait for the schedule of the batch processor.
    let mut quick = vars.clone();
    quick.push(("OTEL_BSP_SCHEDULE_DELAY", "100"));
    let (history, worker) = tokio::join!(
        world.spawn_with("get-history", &quick),
        world.spawn_with("persist-message", &quick)
    );
    // The demonstration calls these as well; other tests check their spans.
    let others = [
        "send-message",
        "sync-messages",
        "delete-message",
        "track-receipts",
        "relay-outbox",
    ];
    let _others = futures::future::join_all(others.map(|name| world.spawn(name))).await;
    let mut demo = world.command_as("demo", "publisher");
    demo.env("OPERATOR_USER", "operator")
        .env("OPERATOR_PASS", world.nats().password("operator"));
    for (name, value) in &quick {
        demo.env(name, value);
    }
    let output = demo.output().await.unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    let wanted = [
        "send chat.{room}",
        "process chat.{room}",
        "get-history chat.history.>",
        "select messages",
    ];
    let spans = receiver
        .wait_for("send, store and query in one trace", SOON, |spans| {
            spans
                .iter()
                .filter(|span| span.name == wanted[0])
                .any(|send| {
                    wanted.iter().all(|name| {
                        spans
                            .iter()
                            .any(|span| span.name == *name && span.trace_id == send.trace_id)
                    })
                })
        })
        .await;
    let named = |name: &str| {
        spans
            .iter()
            .find(|span| span.name == name)
            .unwrap_or_else(|| panic!("no span {name}"))
    };
    let send = named("send chat.{room}");
    assert_eq!(
        named("process chat.{room}").parent_span_id.as_ref(),
        Some(&send.span_id),
        "the store is the send's child"
    );
    assert_eq!(
        send.attributes.get("messaging.system").map(String::as_str),
        Some("nats")
    );
    let query = spans
        .iter()
        .find(|span| span.name == "select messages" && span.trace_id == send.trace_id)
        .unwrap();
    assert_eq!(
        query.attributes.get("db.system.name").map(String::as_str),
        Some("postgresql")
    );

    // The batch has a trace of its own, with a link to the message it stored, and the statement as
    // its child.
    let spans = receiver
        .wait_for("the batch's own trace", SOON, |spans| {
            spans.iter().any(|receive| {
                receive.name == "receive CHAT_MESSAGES"
                    && receive.trace_id != send.trace_id
                    && receive
                        .links
                        .iter()
                        .any(|link| link == &(send.trace_id.clone(), send.span_id.clone()))
                    && spans.iter().any(|span| {
                        span.name == "insert messages" && span.trace_id == receive.trace_id
                    })
            })
        })
        .await;
    assert!(spans.iter().any(|span| span.service == "persist-message"));
    assert!(history.terminate().await.success() && worker.terminate().await.success());
}

#[tokio::test]
async fn an_acknowledged_send_is_in_the_trace_of_its_request() {
    let world = World::start().await;
    let receiver = OtlpReceiver::start().await;
    let mut quick = receiver.vars();
    quick.push(("OTEL_BSP_SCHEDULE_DELAY", "100"));
    let (send, worker) = tokio::join!(
        world.spawn_with("send-message", &quick),
        world.spawn_with("persist-message", &quick)
    );
    let publisher = world.client("publisher").await;
    let ack = publisher
        .request(
            "chat.send.ann.general",
            r#"{"text":"xyzzy","id":"a"}"#.into(),
        )
        .await
        .unwrap();
    assert!(ack.payload.starts_with(br#"{"type":"ack""#), "{ack:?}");
    let wanted = [
        "send-message chat.send.>",
        "send chat.{room}",
        "select messages",
        "process chat.{room}",
    ];
    let spans = receiver
        .wait_for(
            "request, lookup, send and store in one trace",
            SOON,
            |spans| {
                spans
                    .iter()
                    .filter(|span| span.name == wanted[0])
                    .any(|one| {
                        wanted.iter().all(|name| {
                            spans
                                .iter()
                                .any(|span| span.name == *name && span.trace_id == one.trace_id)
                        })
                    })
            },
        )
        .await;
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    for pair in [
        (wanted[1], wanted[0]),
        (wanted[2], wanted[1]),
        (wanted[3], wanted[1]),
    ] {
        assert_eq!(
            named(pair.0).parent_span_id.as_ref(),
            Some(&named(pair.1).span_id),
            "{pair:?}"
        );
    }
    let logs = format!("{}{}", send.stderr(), worker.stderr());
    assert!(send.terminate().await.success() && worker.terminate().await.success());
    assert!(
        !receiver.contains("xyzzy") && !logs.contains("xyzzy"),
        "a text in a signal or a log"
    );
}

#[tokio::test]
async fn an_event_is_in_the_trace_of_its_message() {
    let world = World::start().await;
    let receiver = OtlpReceiver::start().await;
    let mut quick = receiver.vars();
    quick.push(("OTEL_BSP_SCHEDULE_DELAY", "100"));
    let (_send, _worker, _relay) = tokio::join!(
        world.spawn_with("send-message", &quick),
        world.spawn_with("persist-message", &quick),
        world.spawn_with("relay-outbox", &quick)
    );
    let publisher = world.client("publisher").await;
    let mut events = publisher.subscribe("events.v1.>").await.unwrap();
    publisher
        .request("chat.send.ann.general", r#"{"text":"hello"}"#.into())
        .await
        .unwrap();
    let spans = receiver
        .wait_for("send and event", SOON, |spans| {
            ["send chat.{room}", "send events.v1.chat.{room}"]
                .iter()
                .all(|name| spans.iter().any(|span| span.name == *name))
        })
        .await;
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    let send = named("send chat.{room}");
    let event = named("send events.v1.chat.{room}");
    assert_eq!(
        (&event.trace_id, event.parent_span_id.as_ref()),
        (&send.trace_id, Some(&send.span_id))
    );
    let headers = events.next().await.unwrap().headers.unwrap();
    let names = |header: &str, span: &str| headers.get(header).unwrap().as_str().contains(span);
    assert!(
        names("traceparent", &event.span_id) && names("ce-traceparent", &send.span_id),
        "{headers:?}"
    );
}

#[tokio::test]
async fn no_text_appears_in_any_signal_or_log() {
    let world = World::start().await;
    let receiver = OtlpReceiver::start().await;
    let mut vars = receiver.vars();
    vars.extend([
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
        ("OTEL_BLRP_SCHEDULE_DELAY", "50"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "100"),
    ]);
    let (history, worker) = tokio::join!(
        world.spawn_with("get-history", &vars),
        world.spawn_with("persist-message", &vars)
    );
    let database = world.database().await;
    sqlx::query("alter table messages add constraint no_secrets check (text not like 'secret-%')")
        .execute(&database)
        .await
        .unwrap();
    let publisher = world.client("publisher").await;
    for body in [
        r#"{"user":"ann","text":"good-xyzzy"}"#,
        r#"{"user":"ann","text":"secret-xyzzy"}"#,
        r#"{"user":"ann","text":"a\u0000xyzzy"}"#,
        r#"{"user":"ann","text":"xyzzy"#,
    ] {
        publisher
            .request("chat.general", body.into())
            .await
            .unwrap();
    }
    eventually("three dead letters", SOON, async || {
        let letters: i64 = sqlx::query_scalar("select count(*) from dead_letters")
            .fetch_one(&database)
            .await
            .unwrap();
        (letters == 3).then_some(())
    })
    .await;
    publisher
        .request("chat.history.general", "".into())
        .await
        .unwrap();
    publisher
        .request("chat.history.general", r#"{"limit":"xyzzy"}"#.into())
        .await
        .unwrap();
    let logs = format!("{}{}", history.stderr(), worker.stderr());
    assert!(history.terminate().await.success() && worker.terminate().await.success());
    assert!(
        !receiver.spans().is_empty()
            && !receiver.metrics().is_empty()
            && !receiver.logs().is_empty()
    );
    assert!(!receiver.contains("xyzzy"), "a text in a signal");
    assert!(!logs.contains("xyzzy"), "a text in a log: {logs}");
}

#[tokio::test]
async fn a_503_and_the_query_behind_it_are_errors() {
    let world = World::start().await;
    let receiver = OtlpReceiver::start().await;
    let mut vars = receiver.vars();
    vars.push(("REQUEST_DEADLINE_MS", "1000"));
    let _send = world.spawn_with("send-message", &vars).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    let mut holder = database.begin().await.unwrap();
    sqlx::query("lock table messages in access exclusive mode")
        .execute(&mut *holder)
        .await
        .unwrap();
    let reply = client
        .request(
            "chat.send.ann.general",
            r#"{"text":"xyzzy","id":"a"}"#.into(),
        )
        .await
        .unwrap();
    assert_eq!(
        reply
            .headers
            .unwrap()
            .get("Nats-Service-Error-Code")
            .unwrap()
            .as_str(),
        "503"
    );
    let failed = |span: &testing::Span, name: &str| span.name == name && span.status == "error";
    let spans = receiver
        .wait_for("the query and the request, failed", SOON, |spans| {
            [
                "select messages",
                "send chat.{room}",
                "send-message chat.send.>",
            ]
            .iter()
            .all(|name| spans.iter().any(|span| failed(span, name)))
        })
        .await;
    let query = spans
        .iter()
        .find(|span| failed(span, "select messages"))
        .unwrap();
    assert_eq!(query.attributes["error.type"], "timeout");
    holder.rollback().await.unwrap();

    // An error from PostgreSQL is recorded by its SQLSTATE, never by its text.
    sqlx::query("alter table messages rename column text to words")
        .execute(&database)
        .await
        .unwrap();
    client
        .request(
            "chat.send.ann.general",
            r#"{"text":"xyzzy","id":"b"}"#.into(),
        )
        .await
        .unwrap();
    let with_state = |span: &testing::Span| {
        span.attributes
            .get("error.type")
            .is_some_and(|kind| kind == "42703")
    };
    receiver
        .wait_for("the query's SQLSTATE", SOON, |spans| {
            spans
                .iter()
                .any(|span| span.status == "error" && with_state(span))
        })
        .await;
    assert!(!receiver.contains("xyzzy"), "a text in a signal");
}

#[tokio::test]
async fn the_span_of_a_dead_letter_is_an_error_with_its_reason() {
    let world = World::start().await;
    let receiver = OtlpReceiver::start().await;
    let _worker = world.spawn_with("persist-message", &receiver.vars()).await;
    let publisher = world.client("publisher").await;
    for (trace, body) in [
        ("a", r#"{"user":"ann","text":"well"}"#),
        ("b", r#"{"user":"ann","text":"xyzzy"#),
    ] {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(
            "traceparent",
            format!("00-{}-{}-01", trace.repeat(32), trace.repeat(16)).as_str(),
        );
        publisher
            .request_with_headers("chat.general", headers, body.into())
            .await
            .unwrap();
    }
    let spans = receiver
        .wait_for("both messages", SOON, |spans| {
            spans
                .iter()
                .filter(|span| span.name == "process chat.{room}")
                .count()
                == 2
        })
        .await;
    let of = |trace: &str| {
        spans
            .iter()
            .find(|span| span.name.starts_with("process") && span.trace_id == trace.repeat(32))
            .unwrap()
    };
    assert_eq!((of("a").status, of("b").status), ("unset", "error"));
    assert_eq!(of("b").attributes["error.type"], "not_json");
}

#[tokio::test]
async fn no_span_is_named_after_a_room_or_a_user() {
    let world = World::start().await;
    let receiver = OtlpReceiver::start().await;
    let vars = receiver.vars();
    let names = [
        "send-message",
        "persist-message",
        "relay-outbox",
        "delete-message",
        "get-history",
        "sync-messages",
        "track-receipts",
    ];
    let _all = futures::future::join_all(names.map(|name| world.spawn_with(name, &vars))).await;
    let publisher = world.client("publisher").await;
    let ask = async |subject: &str, body: &str| {
        let reply = publisher
            .request(subject.to_owned(), body.to_owned().into())
            .await
            .unwrap();
        assert!(
            reply
                .headers
                .as_ref()
                .is_none_or(|headers| headers.get("Nats-Service-Error").is_none()),
            "{subject}: {:?}",
            reply.payload
        );
        reply
    };
    for (send, delete) in [
        ("chat.send.ann1.room1", "chat.delete.ann1.room1"),
        ("dm.send.ann1.bob1", "dm.delete.ann1.bob1"),
    ] {
        let ack = ask(send, r#"{"text":"hello"}"#).await;
        let ack: serde_json::Value = serde_json::from_slice(&ack.payload).unwrap();
        let delete_it = format!(r#"{{"seq":{},"mode":"soft"}}"#, ack["seq"]);
        ask(delete, &delete_it).await;
    }
    ask("chat.history.room1", "").await;
    ask("dm.history.ann1.bob1", "").await;
    ask("chat.inbox.bob1", "").await;
    ask("chat.read.bob1.room1", r#"{"through":1}"#).await;
    let mut events = vec![
        "send events.v1.chat.{room}",
        "send events.v1.dm.{user}.{peer}",
    ];
    events.extend([
        "send chat.{room}",
        "send dm.{user}.{peer}",
        "send change.chat.{room}",
        "send change.dm.{user}.{peer}",
    ]);
    events.extend([
        "process chat.{room}",
        "process dm.{user}.{peer}",
        "process change.chat.{room}",
    ]);
    let spans = receiver
        .wait_for("a span of each kind", SOON, |spans| {
            events
                .iter()
                .all(|name| spans.iter().any(|span| span.name == *name))
        })
        .await;
    for span in &spans {
        for one in ["ann1", "bob1", "room1"] {
            assert!(
                !span.name.contains(one),
                "{} is named after {one}",
                span.name
            );
        }
    }
    let destination = |span: &&testing::Span| {
        span.attributes
            .get("messaging.destination.name")
            .is_some_and(|name| name == "chat.room1")
    };
    let send = spans
        .iter()
        .filter(destination)
        .find(|span| span.name == "send chat.{room}")
        .expect("the subject is an attribute");
    assert_eq!(
        send.attributes["messaging.destination.template"],
        "chat.{room}"
    );
}

#[tokio::test]
async fn identical_requests_at_the_same_moment_cost_one_query() {
    let world = World::start().await;
    let receiver = OtlpReceiver::start().await;
    let mut vars = receiver.vars();
    vars.push(("OTEL_BSP_SCHEDULE_DELAY", "50"));
    let history = world.spawn_with("get-history", &vars).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    client
        .request("chat.history.general", "".into())
        .await
        .unwrap();

    let mut holder = database.begin().await.unwrap();
    sqlx::query("lock table messages in access exclusive mode")
        .execute(&mut *holder)
        .await
        .unwrap();
    let inbox = client.new_inbox();
    let mut replies = client.subscribe(inbox.clone()).await.unwrap();
    let ask = async || {
        client
            .publish_with_reply("chat.history.general", inbox.clone(), "".into())
            .await
            .unwrap()
    };
    ask().await;
    eventually("the first reading waits for the table", SOON, async || {
        let waiting = "select exists (select from pg_stat_activity
            where wait_event_type = 'Lock' and query like '%from messages%')";
        sqlx::query_scalar::<_, bool>(waiting)
            .fetch_one(&database)
            .await
            .unwrap()
            .then_some(())
    })
    .await;
    for _ in 0..50 {
        ask().await;
    }
    // Requests on the same subscription that need no database: when they are answered, the fifty
    // have been received.
    for _ in 0..10 {
        client
            .request("chat.history.general", "[]".into())
            .await
            .unwrap();
    }
    holder.rollback().await.unwrap();
    for _ in 0..51 {
        assert_eq!(replies.next().await.unwrap().payload.as_ref(), b"[]");
    }
    assert!(history.terminate().await.success());
    let queries = receiver
        .spans()
        .iter()
        .filter(|span| span.name == "select messages")
        .count();
    assert_eq!(
        queries, 3,
        "one before, one that was under way, one for all who came meanwhile"
    );
}
