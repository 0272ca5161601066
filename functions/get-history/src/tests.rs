//! Pages as a client sees them, on real servers; the worker is the real binary.

mod deletion;
mod direct;
mod expiry;
mod many;
mod plans;
mod reads;

use std::time::Duration;

use async_nats::Client;
use serde_json::{Value, json};

use crate::function;
use protocol::endpoints::HISTORY;
use protocol::message::Message;
use service::config::Vars;
use service::function::Running;
use testing::{RawClient, SOON, World, eventually};

async fn history(world: &World) -> Running {
    function()
        .start(Vars::from_pairs(world.vars("get-history")))
        .await
        .unwrap()
}

/// A page as a client receives it.
#[derive(Debug)]
struct Got {
    messages: Vec<Message>,
    more: bool,
    through: u64,
    source: String,
    bytes: usize,
}

impl Got {
    fn texts(&self) -> Vec<&str> {
        self.messages
            .iter()
            .map(|message| message.text.as_str())
            .collect()
    }
}

async fn ask_raw(client: &Client, subject: String, body: &str) -> Result<Got, (u64, String)> {
    let reply = client
        .request(subject, body.to_owned().into())
        .await
        .unwrap();
    let headers = reply.headers.expect("a reply has headers");
    let header = |name: &str| {
        headers
            .get(name)
            .unwrap_or_else(|| panic!("no {name}"))
            .as_str()
            .to_owned()
    };
    if headers.get(protocol::header::SERVICE_ERROR).is_some() {
        let body: Value = serde_json::from_slice(&reply.payload).unwrap();
        assert_eq!(
            body["error"]["code"].to_string(),
            header(protocol::header::SERVICE_ERROR_CODE)
        );
        assert_eq!(
            body["error"]["reason"],
            header(protocol::header::SERVICE_ERROR)
        );
        return Err((
            body["error"]["code"].as_u64().unwrap(),
            header(protocol::header::SERVICE_ERROR),
        ));
    }
    Ok(Got {
        bytes: reply.payload.len(),
        messages: serde_json::from_slice(&reply.payload).unwrap(),
        more: header(protocol::header::MORE) == "true",
        through: header(protocol::header::THROUGH).parse().unwrap(),
        source: header(protocol::header::SOURCE),
    })
}

async fn ask(client: &Client, room: &str, body: Value) -> Got {
    ask_raw(client, HISTORY.subject(&[room]), &body.to_string())
        .await
        .unwrap()
}

async fn publish(client: &Client, room: &str, text: &str) -> u64 {
    publish_body(
        client,
        &format!("chat.{room}"),
        &json!({"user": "ann", "text": text}).to_string(),
    )
    .await
}

async fn publish_body(client: &Client, subject: &str, body: &str) -> u64 {
    let ack = client
        .request(subject.to_owned(), body.to_owned().into())
        .await
        .unwrap();
    serde_json::from_slice::<Value>(&ack.payload).unwrap()["seq"]
        .as_u64()
        .unwrap()
}

/// Waits until a page comes from PostgreSQL alone.
async fn stored(client: &Client, room: &str) {
    eventually("the worker has stored everything", SOON, async || {
        (ask(client, room, json!({})).await.source == "index").then_some(())
    })
    .await;
}

/// The pages, which must be the same whatever the stream and PostgreSQL hold of them.
async fn check_pages(client: &Client, source: &str) {
    let texts = |from: usize, to: usize| {
        (from..=to)
            .map(|number| number.to_string())
            .collect::<Vec<_>>()
    };
    let page = async |body: Value| ask(client, "general", body).await;
    // Sequence 2n is general's message n; the odd ones belong to another room.
    for (body, from, to, more, through) in [
        (json!({"limit": 3}), 8, 10, true, None),
        (json!({"limit": 10}), 1, 10, false, None),
        (json!({}), 1, 10, false, None),
        (json!({"limit": 3, "before": 8}), 1, 3, false, Some(7)),
        (json!({"limit": 2, "before": 8}), 2, 3, true, Some(7)),
        (json!({"limit": 2, "before": 9}), 3, 4, true, Some(8)),
        (json!({"limit": 3, "after": 0}), 1, 3, true, Some(6)),
        (json!({"limit": 3, "after": 14}), 8, 10, false, None),
        (json!({"limit": 2, "after": 15}), 8, 9, true, Some(18)),
        (json!({"limit": 4, "around": 10}), 3, 6, true, Some(12)),
        (json!({"limit": 4, "around": 2}), 1, 4, true, Some(8)),
        (json!({"limit": 4, "around": 20}), 7, 10, true, None),
        (json!({"limit": 500, "around": 9}), 1, 10, false, None),
        (json!({"limit": 2, "before": i64::MAX}), 9, 10, true, None),
    ] {
        let got = page(body.clone()).await;
        assert_eq!(got.texts(), texts(from, to), "{body} from {source}");
        assert_eq!(got.more, more, "{body} from {source}");
        assert_eq!(got.source, source, "{body}");
        match through {
            // Between the last message and the cursor the stream has nothing of this room, so both
            // ends are right.
            Some(through) => {
                let last = got.messages.last().unwrap().seq.get();
                assert!(
                    (last..=through).contains(&got.through),
                    "{body} from {source}: through {}",
                    got.through
                );
            }
            None => assert!(
                got.through >= 20,
                "{body} from {source}: through {}",
                got.through
            ),
        }
    }
    for body in [
        json!({"before": 2}),
        json!({"before": 0}),
        json!({"after": i64::MAX}),
    ] {
        let got = page(body.clone()).await;
        assert!(
            got.texts().is_empty() && !got.more,
            "{body} from {source}: {got:?}"
        );
    }
}

async fn publish_two_rooms(client: &Client) {
    for number in 1..=10 {
        publish(client, "other", "x").await;
        assert_eq!(
            publish(client, "general", &number.to_string()).await,
            number * 2
        );
    }
}

#[tokio::test]
async fn pages_are_the_same_from_stream_projection_and_both() {
    let world = World::with_own_postgres().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    publish_two_rooms(&client).await;
    check_pages(&client, "both").await;

    let worker = world.spawn("persist-message").await;
    stored(&client, "general").await;
    // We read "general" before all of "other" is stored; the pages of "general" no longer need the
    // stream.
    check_pages(&client, "index").await;

    world.postgres().stop().await;
    eventually("PostgreSQL is missed", SOON, async || {
        (ask(&client, "general", json!({})).await.source == "log").then_some(())
    })
    .await;
    check_pages(&client, "log").await;
    let while_away = publish(&client, "general", "while away").await;
    assert_eq!(
        ask(&client, "general", json!({"limit": 1})).await.messages[0]
            .seq
            .get(),
        while_away
    );

    world.postgres().start().await;
    stored(&client, "general").await;
    assert_eq!(
        ask(&client, "general", json!({"limit": 1})).await.texts(),
        ["while away"]
    );
    assert!(worker.terminate().await.success());
    function.stop().await.unwrap();
}

#[tokio::test]
async fn an_empty_room_is_an_empty_page() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    for room in ["nobody-was-here", protocol::name::Room::ADMIN] {
        let got = ask(&client, room, json!({})).await;
        assert!(
            got.messages.is_empty() && !got.more && got.through == 0 && got.source == "index",
            "{got:?}"
        );
    }
    publish_body(&client, "admin.alerts", r#"{"user":"root","text":"disk"}"#).await;
    assert_eq!(
        ask(&client, protocol::name::Room::ADMIN, json!({}))
            .await
            .texts(),
        ["disk"]
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_bad_request_names_what_is_wrong() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("operator").await;
    for (body, hint) in [
        (r#"{"limit":0}"#, "limit"),
        (r#"{"limit":-1}"#, "limit"),
        (r#"{"limit":1000000000}"#, "limit"),
        (r#"{"limit":"x"}"#, "limit"),
        (r#"{"before":1,"after":2}"#, "at most one"),
        (r#"{"before":9223372036854775808}"#, "before"),
        ("no json", "JSON"),
    ] {
        let (code, reason) = ask_raw(&client, HISTORY.subject(&["general"]), body)
            .await
            .unwrap_err();
        assert!(
            code == 400 && reason.contains(hint),
            "{body}: {code} {reason}"
        );
    }
    // The client library refuses these before the server sees them.
    let mut raw = RawClient::connect(world.nats(), "operator").await;
    let long = "r".repeat(65);
    for room in ["*", ">", "a.b", long.as_str()] {
        let reply = raw
            .request(&HISTORY.subject(&[room]), None, b"")
            .await
            .unwrap();
        let body: Value = serde_json::from_slice(&reply.payload).unwrap();
        assert_eq!(body["error"]["code"], 400, "{room}: {body}");
        assert!(
            body["error"]["reason"]
                .as_str()
                .unwrap()
                .contains("a room is"),
            "{body}"
        );
    }
    function.stop().await.unwrap();
}

#[tokio::test]
async fn an_acknowledged_message_is_on_the_page() {
    let world = World::start().await;
    let function = history(&world).await;
    let (_one, _two) = tokio::join!(
        world.spawn("persist-message"),
        world.spawn("persist-message")
    );
    let writers = (0..8).map(|writer| {
        let world = &world;
        async move {
            let client = world.client("publisher").await;
            for number in 0..60 {
                let seq = publish(&client, "race", &format!("{writer}/{number}")).await;
                let got = ask(&client, "race", json!({"limit": 500})).await;
                assert!(
                    got.messages.iter().any(|message| message.seq.get() == seq),
                    "seq {seq} is missing: {got:?}"
                );
                assert!(got.messages.is_sorted_by(|one, next| one.seq < next.seq));
                assert!(got.through >= seq);
                // No hole between the first and the last message.
                let after = ask(&client, "race", json!({"after": seq - 1, "limit": 1})).await;
                assert_eq!(after.messages[0].seq.get(), seq);
            }
        }
    });
    futures::future::join_all(writers).await;
    let client = world.client("publisher").await;
    assert_eq!(
        ask(&client, "race", json!({"limit": 500}))
            .await
            .messages
            .len(),
        480
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_page_ends_before_max_payload() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    let worker = world.spawn("persist-message").await;
    let text = "\u{1}".repeat(8) + &"y".repeat(64 * 1024 - 8);
    let body = json!({"user": "ann", "text": text}).to_string();
    for _ in 0..500 {
        publish_body(&client, "chat.large", &body).await;
    }
    let max_payload = client.server_info().max_payload;
    let mut before = json!({"limit": 500});
    let mut found = 0;
    let mut pages = 0;
    loop {
        let got = ask(&client, "large", before).await;
        assert!(got.bytes <= max_payload && !got.messages.is_empty());
        found += got.messages.len();
        pages += 1;
        if !got.more {
            break;
        }
        before = json!({"limit": 500, "before": got.messages[0].seq});
    }
    assert_eq!(found, 500);
    assert!(pages >= 500 * 64 * 1024 / max_payload, "{pages} pages");
    let mut after = 0;
    let mut found = 0;
    loop {
        let got = ask(&client, "large", json!({"limit": 500, "after": after})).await;
        found += got.messages.len();
        after = got.through;
        if !got.more {
            break;
        }
        assert_eq!(after, got.messages.last().unwrap().seq.get());
    }
    assert_eq!(found, 500);
    assert!(worker.terminate().await.success());
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_long_tail_is_not_read_from_its_beginning() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    for number in 0..3_000 {
        client
            .publish(
                "chat.long",
                json!({"user": "ann", "text": number.to_string()})
                    .to_string()
                    .into(),
            )
            .await
            .unwrap();
        client
            .publish("chat.other", r#"{"user":"ann","text":"x"}"#.into())
            .await
            .unwrap();
    }
    let last = publish(&client, "long", "3000").await;
    let got = ask(&client, "long", json!({"limit": 2})).await;
    assert_eq!(
        (got.texts(), got.more, got.through),
        (vec!["2999", "3000"], true, last)
    );
    let got = ask(&client, "long", json!({"limit": 2, "before": 2_001})).await;
    assert_eq!((got.texts(), got.more), (vec!["998", "999"], true));
    let got = ask(&client, "long", json!({"limit": 500, "around": 3_001})).await;
    assert_eq!(
        (got.messages.len(), got.texts()[0], got.texts()[499]),
        (500, "1250", "1749")
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn the_tail_is_parsed_as_the_worker_parses_it() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    let with_id = |user: &str, text: &str, id: &str| {
        json!({"user": user, "text": text, "id": id}).to_string()
    };
    publish_body(&client, "chat.general", &with_id("ann", "stored", "a")).await;
    let worker = world.spawn("persist-message").await;
    stored(&client, "general").await;
    assert!(worker.terminate().await.success());
    for body in [
        with_id("ann", "stored already", "a"),
        with_id("bob", "another sender", "a"),
        with_id("bob", "said already", "a"),
        "not json".to_owned(),
        with_id("ann", "new", "b"),
    ] {
        publish_body(&client, "chat.general", &body).await;
    }
    let before = ask(&client, "general", json!({})).await;
    assert_eq!(
        (before.texts(), before.source.as_str()),
        (vec!["stored", "another sender", "new"], "both")
    );
    let worker = world.spawn("persist-message").await;
    stored(&client, "general").await;
    assert_eq!(
        ask(&client, "general", json!({})).await.messages,
        before.messages
    );
    assert!(worker.terminate().await.success());
    function.stop().await.unwrap();
}

#[tokio::test]
async fn the_earlier_of_two_messages_with_one_id_is_shown_before_it_is_stored() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    let seq = publish_body(
        &client,
        "chat.general",
        r#"{"user":"ann","text":"first","id":"a"}"#,
    )
    .await;
    // A faster replica has stored the later message; the earlier one takes its place as soon as it
    // is stored.
    publish_body(
        &client,
        "chat.general",
        r#"{"user":"ann","text":"second","id":"a"}"#,
    )
    .await;
    sqlx::query("insert into rooms (name) values ('general')")
        .execute(&database)
        .await
        .unwrap();
    sqlx::query(
        "insert into messages select $1, id, 'ann', null, 'a', false, 'second', now(), now()
        from rooms",
    )
    .bind(seq as i64 + 1)
    .execute(&database)
    .await
    .unwrap();
    for body in [json!({}), json!({"after": 0}), json!({"around": seq})] {
        assert_eq!(ask(&client, "general", body).await.texts(), ["first"]);
    }
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_tail_with_malformed_headers_is_read() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    let mut raw = RawClient::connect(world.nats(), "publisher").await;
    publish(&client, "general", "before").await;
    for header in [
        &b"NATS/1.0\r\nA: b\rc\r\n\r\n"[..],
        b"NATS/1.0\r\nno colon\r\n\r\n",
    ] {
        raw.publish_raw(
            "chat.general",
            None,
            Some(header),
            br#"{"user":"ann","text":"poison"}"#,
        )
        .await;
        raw.flush().await.unwrap();
        publish(&client, "general", "after").await;
    }
    let got = ask(&client, "general", json!({})).await;
    assert_eq!(got.texts(), ["before", "after", "after"]);
    let other = ask(&client, "other", json!({})).await;
    assert!(other.messages.is_empty());
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_missing_table_is_named_in_the_log() {
    let world = World::bare().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    let (code, _) = ask_raw(&client, HISTORY.subject(&["general"]), "")
        .await
        .unwrap_err();
    assert_eq!(code, 503);
    function.stop().await.unwrap();
}
