//! Dead letters as an operator meets them, on real servers.

mod failures;
mod list;
mod retry;

use async_nats::Client;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::function;
use protocol::endpoints::{
    DEADLETTERS_DROP, DEADLETTERS_LIST, DEADLETTERS_RETRY, DEADLETTERS_SHOW,
};
use service::config::Vars;
use service::function::Running;
use testing::{RawClient, SOON, World, eventually};

async fn start(world: &World) -> Running {
    start_with(world, &[]).await
}

async fn start_with(world: &World, extra: &[(&str, &str)]) -> Running {
    let mut vars = world.vars("manage-dead-letters");
    vars.extend(
        extra
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
    );
    function().start(Vars::from_pairs(vars)).await.unwrap()
}

/// The reply, or code and reason of an error.
async fn ask(operator: &Client, subject: String, body: &str) -> Result<Value, (u64, String)> {
    let reply = operator
        .request(subject, body.to_owned().into())
        .await
        .unwrap();
    let value: Value = serde_json::from_slice(&reply.payload).unwrap();
    match value["error"]["code"].as_u64() {
        Some(code) => Err((code, value["error"]["reason"].as_str().unwrap().to_owned())),
        None => Ok(value),
    }
}

async fn list(operator: &Client, body: Value) -> Value {
    ask(operator, DEADLETTERS_LIST.subject(&[]), &body.to_string())
        .await
        .unwrap()
}

/// The ids of one page.
async fn ids(operator: &Client, body: Value) -> Vec<i64> {
    list(operator, body).await["letters"]
        .as_array()
        .unwrap()
        .iter()
        .map(|dead_letter| dead_letter["id"].as_i64().unwrap())
        .collect()
}

async fn show(operator: &Client, id: i64) -> Result<Value, (u64, String)> {
    ask(
        operator,
        DEADLETTERS_SHOW.subject(&[]),
        &json!({ "id": id }).to_string(),
    )
    .await
}

async fn retry(operator: &Client, id: i64) -> Result<Value, (u64, String)> {
    ask(
        operator,
        DEADLETTERS_RETRY.subject(&[]),
        &json!({ "id": id }).to_string(),
    )
    .await
}

async fn discard(operator: &Client, id: i64) -> Result<Value, (u64, String)> {
    ask(
        operator,
        DEADLETTERS_DROP.subject(&[]),
        &json!({ "id": id }).to_string(),
    )
    .await
}

/// Publishes with JetStream's acknowledgement; the sequence.
async fn publish(client: &Client, subject: &str, headers: &[(&str, &str)], body: &str) -> i64 {
    let mut map = async_nats::HeaderMap::new();
    headers
        .iter()
        .for_each(|(name, value)| map.insert(*name, *value));
    let reply = client
        .request_with_headers(subject.to_owned(), map, body.to_owned().into())
        .await
        .unwrap();
    let ack: Value = serde_json::from_slice(&reply.payload).unwrap();
    ack["seq"].as_i64().unwrap_or_else(|| panic!("{ack}"))
}

fn body(user: &str, text: &str) -> String {
    json!({"user": user, "text": text}).to_string()
}

/// A dead letter as a worker would store it.
async fn put(
    database: &PgPool,
    seq: i64,
    subject: &str,
    headers: &str,
    payload: &[u8],
    reason: &str,
) -> i64 {
    let dead_letter = "
        insert into dead_letters (seq, subject, headers, payload, reason, received_at)
        values ($1, $2, $3, $4, $5, 'epoch'::timestamptz + interval '1600000000123 ms') returning
          id";
    let dead_letter = sqlx::query_scalar(dead_letter)
        .bind(seq)
        .bind(subject)
        .bind(headers.as_bytes())
        .bind(payload)
        .bind(reason);
    dead_letter.fetch_one(database).await.unwrap()
}

/// As if the retry had died before the dead letter was marked.
async fn unmark(database: &PgPool, id: i64) {
    let unmark = "update dead_letters set outcome = null, outcome_at = null,
      outcome_seq = null where id = $1";
    sqlx::query(unmark)
        .bind(id)
        .execute(database)
        .await
        .unwrap();
}

async fn outcome(database: &PgPool, id: i64) -> (Option<String>, Option<i64>) {
    sqlx::query_as("select outcome, outcome_seq from dead_letters where id = $1")
        .bind(id)
        .fetch_one(database)
        .await
        .unwrap()
}

/// The number of the dead letter at a position, once it is there.
async fn dead_letter_at(database: &PgPool, seq: i64) -> i64 {
    eventually("the message is a dead letter", SOON, async || {
        sqlx::query_scalar("select id from dead_letters where seq = $1")
            .bind(seq)
            .fetch_optional(database)
            .await
            .unwrap()
    })
    .await
}

/// Everything acknowledged. Who kills a worker before that waits until its messages are delivered
/// again.
async fn settled(operator: &Client) {
    eventually("everything is acknowledged", SOON, async || {
        let info = operator
            .request(protocol::js_api::CONSUMER_INFO, "".into())
            .await
            .unwrap();
        let info: Value = serde_json::from_slice(&info.payload).unwrap();
        (info["num_pending"] == 0 && info["num_ack_pending"] == 0).then_some(())
    })
    .await;
}

async fn text_at(database: &PgPool, seq: i64) -> Option<String> {
    sqlx::query_scalar("select text from messages where seq = $1")
        .bind(seq)
        .fetch_optional(database)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_dead_letter_is_shown_whole() {
    let world = World::start().await;
    let function = start(&world).await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let block = "NATS/1.0\r\nX: y\r\n\r\n";
    let id = put(
        &database,
        7,
        "chat.general",
        block,
        "grüß".as_bytes(),
        "not_json",
    )
    .await;
    let shown = show(&operator, id).await.unwrap();
    let stored_at = shown["storedAt"].as_i64().unwrap();
    assert!(stored_at > 1_700_000_000_000, "{shown}");
    let plain = json!({
        "id": id, "seq": 7, "subject": "chat.general",
        "reason": "not_json", "detail": "", "bytes": 6,
        "receivedAt": 1_600_000_000_123_i64, "storedAt": stored_at,
    });
    let mut whole = plain.clone();
    let bytes =
        json!({"headers": "TkFUUy8xLjANClg6IHkNCg0K", "payload": "Z3LDvMOf", "text": "grüß"});
    whole
        .as_object_mut()
        .unwrap()
        .extend(bytes.as_object().unwrap().clone());
    assert_eq!(shown, whole);
    assert_eq!(
        list(&operator, json!({})).await,
        json!({"letters": [plain], "more": false})
    );

    let id = put(&database, 8, "chat.general", "", b"\xff\0", "invalid_utf8").await;
    let shown = show(&operator, id).await.unwrap();
    assert_eq!(
        (&shown["headers"], &shown["payload"], shown.get("text")),
        (&json!(""), &json!("/wA="), None)
    );
    assert_eq!(
        show(&operator, 99).await.unwrap_err(),
        (404, "there is no dead letter 99".to_owned())
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_dead_letter_larger_than_a_reply_is_left_to_psql() {
    let world = World::builder()
        .nats_setting("max_payload", "64KB")
        .start()
        .await;
    let function = start(&world).await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    // Base64 takes a third more; together with the text this would not fit.
    let id = put(
        &database,
        1,
        "chat.general",
        "",
        &b"t".repeat(40_000),
        "not_json",
    )
    .await;
    let shown = show(&operator, id).await.unwrap();
    assert_eq!(
        (shown["payload"].as_str().unwrap().len(), shown.get("text")),
        (53_336, None)
    );
    let id = put(
        &database,
        2,
        "chat.general",
        "",
        &b"t".repeat(60_000),
        "not_json",
    )
    .await;
    let (code, reason) = show(&operator, id).await.unwrap_err();
    assert!(
        code == 413 && reason.contains("read it with psql"),
        "{code} {reason}"
    );
    // With its new headers the server would not take it either.
    let id = put(
        &database,
        3,
        "chat.general",
        "",
        &b"t".repeat(65_400),
        "not_json",
    )
    .await;
    let (code, reason) = retry(&operator, id).await.unwrap_err();
    assert!(
        code == 413 && reason.contains("max_payload"),
        "{code} {reason}"
    );
    assert_eq!(outcome(&database, id).await, (None, None));
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_dropped_dead_letter_stays_and_is_off_the_list() {
    let world = World::start().await;
    let function = start(&world).await;
    let operator = world.client("operator").await;
    let database = world.database().await;
    let id = put(&database, 7, "chat.general", "", b"bad", "not_json").await;
    for _ in 0..2 {
        assert_eq!(
            discard(&operator, id).await.unwrap(),
            json!({"id": id, "outcome": "dropped"})
        );
    }
    assert!(ids(&operator, json!({})).await.is_empty());
    let page = list(&operator, json!({"outcome": "dropped"})).await;
    assert_eq!(
        (&page["letters"][0]["id"], &page["letters"][0]["outcome"]),
        (&json!(id), &json!("dropped"))
    );
    assert!(
        page["letters"][0]["outcomeAt"].as_i64().unwrap() > 1_700_000_000_000,
        "{page}"
    );
    assert_eq!(show(&operator, id).await.unwrap()["text"], "bad");
    assert_eq!(
        retry(&operator, id).await.unwrap_err(),
        (409, format!("dead letter {id} was dropped already"))
    );

    for (outcome, seq, said) in [
        (
            "retried",
            Some(44),
            "was retried already: the stream has it as 44",
        ),
        ("erased", None, "is erased"),
    ] {
        let id = put(
            &database,
            8,
            "chat.general",
            "",
            outcome.as_bytes(),
            "not_json",
        )
        .await;
        let settle = "update dead_letters set outcome = $2, outcome_at = now(),
          outcome_seq = $3 where id = $1";
        sqlx::query(settle)
            .bind(id)
            .bind(outcome)
            .bind(seq)
            .execute(&database)
            .await
            .unwrap();
        for (code, reason) in [
            discard(&operator, id).await.unwrap_err(),
            retry(&operator, id).await.unwrap_err(),
        ] {
            assert!(code == 409 && reason.contains(said), "{code} {reason}");
        }
    }
    assert_eq!(
        discard(&operator, 99).await.unwrap_err(),
        (404, "there is no dead letter 99".to_owned())
    );
    assert_eq!(
        retry(&operator, 99).await.unwrap_err(),
        (404, "there is no dead letter 99".to_owned())
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_bad_request_is_refused_with_a_hint() {
    let world = World::start().await;
    let function = start(&world).await;
    let operator = world.client("operator").await;
    for subject in [
        DEADLETTERS_SHOW.subject(&[]),
        DEADLETTERS_RETRY.subject(&[]),
        DEADLETTERS_DROP.subject(&[]),
    ] {
        for (body, hint) in [
            ("", "id of the dead letter is missing"),
            ("{}", "id of the dead letter is missing"),
            (r#"{"id":0}"#, "id must be"),
            (r#"{"id":-1}"#, "id must be"),
            (r#"{"id":"1"}"#, "id must be"),
            (r#"{"id":1e3}"#, "id must be"),
            (r#"{"id":9223372036854775808}"#, "id must be"),
            ("[1]", "a JSON object"),
            ("\u{0}", "a JSON object"),
        ] {
            let (code, reason) = ask(&operator, subject.clone(), body).await.unwrap_err();
            assert!(
                code == 400 && reason.contains(hint),
                "{subject} {body}: {code} {reason}"
            );
        }
        let (code, reason) = ask(
            &operator,
            subject,
            r#"{"id":9223372036854775807,"unknown":[1]}"#,
        )
        .await
        .unwrap_err();
        assert!(
            code == 404 && reason == "there is no dead letter 9223372036854775807",
            "{code} {reason}"
        );
    }
    for (body, hint) in [
        (json!({"limit": 0}), "limit must be"),
        (json!({"limit": 501}), "limit must be"),
        (json!({"after": -1}), "after must be"),
        (
            json!({"reason": "no_json"}),
            "reason must be one of malformed_headers",
        ),
        (json!({"outcome": "gone"}), "outcome must be"),
        (json!({"subject": "chat..a"}), "subject must be"),
        (json!([]), "a JSON object"),
    ] {
        let (code, reason) = ask(&operator, DEADLETTERS_LIST.subject(&[]), &body.to_string())
            .await
            .unwrap_err();
        assert!(
            code == 400 && reason.contains(hint),
            "{body}: {code} {reason}"
        );
    }
    assert_eq!(
        list(&operator, json!({"unknown": {}})).await,
        json!({"letters": [], "more": false})
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn only_operators_may_ask() {
    let world = World::start().await;
    let function = start(&world).await;
    for user in ["publisher", "get-history"] {
        let mut client = RawClient::connect(world.nats(), user).await;
        client
            .publish_raw(&DEADLETTERS_LIST.subject(&[]), None, None, b"")
            .await;
        assert!(client.flush().await.is_err(), "{user}");
    }
    function.stop().await.unwrap();
}
