//! Messages that cannot be stored, among messages that can.

use std::collections::BTreeMap;

use super::*;

/// Subject, header block, payload, and the reason in its dead letter.
pub(super) type Bad = (String, Option<Vec<u8>>, Vec<u8>, &'static str);

/// Every bad message of the list.
pub(super) fn bad_messages() -> Vec<Bad> {
    let general = || "chat.general".to_owned();
    let body = |body: &str| body.as_bytes().to_vec();
    let long = |key: &str, bytes: usize| {
        let mut message = json!({"user": "ann", "text": "x", "id": "i"});
        message[key] = json!("y".repeat(bytes));
        message.to_string().into_bytes()
    };
    let deep = format!(
        r#"{{"user":"ann","text":"x","deep":{}{}}}"#,
        "[".repeat(200),
        "]".repeat(200)
    );
    let good = body(r#"{"user":"ann","text":"behind a bad header"}"#);
    let mut bad = vec![
        (general(), None, body("not json"), "not_json"),
        (general(), None, vec![], "empty_payload"),
        (general(), None, body(r#"["ann","x"]"#), "not_an_object"),
        (
            general(),
            None,
            b"{\"user\":\"ann\",\"text\":\"\xff\"}".to_vec(),
            "invalid_utf8",
        ),
        (
            general(),
            None,
            body(r#"{"user":"ann","text":"\ud800"}"#),
            "lone_surrogate",
        ),
        (
            general(),
            None,
            body(r#"{"user":"ann","text":"a\u0000b"}"#),
            "nul_in_text",
        ),
        (
            general(),
            None,
            body(r#"{"user":"a\u0000b","text":"x"}"#),
            "nul_in_user",
        ),
        (
            general(),
            None,
            body(r#"{"user":"ann","text":"x","id":"a\u0000b"}"#),
            "nul_in_id",
        ),
        (general(), None, body(r#"{"user":"ann"}"#), "missing_text"),
        (general(), None, body(r#"{"text":"x"}"#), "missing_user"),
        (
            general(),
            None,
            body(r#"{"user":7,"text":"x"}"#),
            "wrong_type",
        ),
        (
            general(),
            None,
            body(r#"{"user":"ann","text":"x","timestamp":99999999999999999999999}"#),
            "number_out_of_range",
        ),
        (general(), None, deep.into_bytes(), "too_deep"),
        (
            general(),
            None,
            body(r#"{"user":"ann","text":"x","text":"y"}"#),
            "duplicate_key",
        ),
        (
            general(),
            None,
            long("text", 64 * 1024 + 1),
            "text_too_long",
        ),
        (general(), None, long("user", 256), "user_too_long"),
        (general(), None, long("id", 129), "id_too_long"),
        (
            format!("chat.{}", "r".repeat(300)),
            None,
            body(r#"{"user":"ann","text":"x"}"#),
            "name_too_long",
        ),
        (
            general(),
            None,
            body(r#"{"stream":"CHAT_MESSAGES","seq":7}"#),
            "publish_ack",
        ),
        (general(), None, vec![b'x'; 1 << 20], "payload_too_large"),
        (
            "chat.\u{fffd}".to_owned(),
            None,
            good.clone(),
            "malformed_subject",
        ),
    ];
    for header in [
        &b"NATS/1.0\r\nA: b\rc\r\n\r\n"[..],
        b"NATS/1.0\r\nA: \xff\r\n\r\n",
        b"NATS/1.0\r\nno colon\r\n\r\n",
        b"NATS/1.0\r\nA b: c\r\n\r\n",
    ] {
        bad.push((
            general(),
            Some(header.to_vec()),
            good.clone(),
            "malformed_headers",
        ));
    }
    bad
}

/// What is in the dead letters: how often each reason.
async fn reasons(database: &PgPool) -> BTreeMap<String, i64> {
    let found: Vec<(String, i64)> =
        sqlx::query_as("select reason, count(*) from dead_letters group by 1")
            .fetch_all(database)
            .await
            .unwrap();
    found.into_iter().collect()
}

pub(super) async fn send_bad(client: &mut RawClient, (subject, header, payload, _): &Bad) {
    // U+FFFD stands for a byte that is not UTF-8; only a raw client can send that.
    let mut line = Vec::new();
    let subject: Vec<u8> = subject
        .replace('\u{fffd}', "\u{1}")
        .bytes()
        .map(|byte| if byte == 1 { 0xff } else { byte })
        .collect();
    match header {
        Some(header) => {
            line.extend_from_slice(b"HPUB ");
            line.extend_from_slice(&subject);
            line.extend_from_slice(
                format!(" {} {}\r\n", header.len(), header.len() + payload.len()).as_bytes(),
            );
            line.extend_from_slice(header);
        }
        None => {
            line.extend_from_slice(b"PUB ");
            line.extend_from_slice(&subject);
            line.extend_from_slice(format!(" {}\r\n", payload.len()).as_bytes());
        }
    }
    line.extend_from_slice(payload);
    line.extend_from_slice(b"\r\n");
    client.send(&line).await;
}

#[tokio::test]
async fn bad_messages_among_good_ones_cost_nobody_else() {
    let world = World::start().await;
    let worker = worker(&world).await;
    let database = world.database().await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    let mut wanted = BTreeMap::<String, i64>::new();
    let mut good = 0;
    for message in &bad_messages() {
        for number in 0..100 {
            if number == 50 {
                send_bad(&mut client, message).await;
            }
            good += 1;
            let body = json!({"user": "ann", "text": number.to_string()}).to_string();
            client
                .publish_raw("chat.general", None, None, body.as_bytes())
                .await;
        }
        *wanted.entry(message.3.to_owned()).or_default() += 1;
        client.flush().await.unwrap();
        // What is lost with a broken connection comes again after ack_wait (30 s) at the latest.
        stored(&database, good, SOON).await;
        eventually(message.3, SOON, async || {
            (reasons(&database).await == wanted).then_some(())
        })
        .await;
    }
    assert_eq!(
        dead_letter_payload(&database, "publish_ack").await,
        br#"{"stream":"CHAT_MESSAGES","seq":7}"#
    );
    worker.stop().await.unwrap();
}

async fn dead_letter_payload(database: &PgPool, reason: &str) -> Vec<u8> {
    sqlx::query_scalar("select payload from dead_letters where reason = $1")
        .bind(reason)
        .fetch_one(database)
        .await
        .unwrap()
}

#[tokio::test]
async fn each_bad_message_alone_is_dead_lettered_without_a_storm() {
    let world = World::start().await;
    let worker = world.spawn("persist-message").await;
    let database = world.database().await;
    let mut client = RawClient::connect(world.nats(), "publisher").await;
    let bad = bad_messages();
    for (number, message) in bad.iter().enumerate() {
        send_bad(&mut client, message).await;
        client.flush().await.unwrap();
        let wanted = number as i64 + 1;
        eventually(message.3, WITHIN, async || {
            let letters = count(&database, "select count(*) from dead_letters").await;
            (letters == wanted).then_some(())
        })
        .await;
        let last: String =
            sqlx::query_scalar("select reason from dead_letters order by id desc limit 1")
                .fetch_one(&database)
                .await
                .unwrap();
        assert_eq!(last, message.3);
    }
    // The same process all along, and nothing comes again and again.
    assert!(worker.is_running());
    let delivered = settled(&world).await["delivered"]["consumer_seq"]
        .as_u64()
        .unwrap();
    assert!(
        delivered <= 2 * bad.len() as u64,
        "{delivered} deliveries of {} messages",
        bad.len()
    );
    assert!(worker.terminate().await.success());
}
