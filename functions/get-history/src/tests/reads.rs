//! Changes between the reads of a page, made by hand or by writing all the time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sqlx::PgPool;

use super::*;

/// Stores rows of room `general`, as a worker would.
async fn store(database: &PgPool, seqs: std::ops::RangeInclusive<u64>) {
    sqlx::query("insert into rooms (name) values ('general') on conflict do nothing")
        .execute(database)
        .await
        .unwrap();
    sqlx::query(
        "insert into messages (seq, room_id, sender, recipient, id, derived, text, sent_at,
         received_at)
         select seq, id, 'ann', null, 'seq:' || seq, true, 'stored ' || seq, now(), now()
           from rooms, generate_series($1, $2) as seq where name = 'general'",
    )
    .bind(*seqs.start() as i64)
    .bind(*seqs.end() as i64)
    .execute(database)
    .await
    .unwrap();
}

/// Removes a message from the stream: trimmed, or erased.
async fn remove(world: &World, seq: u64) {
    let client = world.client("persist-message").await;
    let reply = client
        .request(
            protocol::js_api::MESSAGE_DELETE,
            json!({ "seq": seq }).to_string().into(),
        )
        .await
        .unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&reply.payload).unwrap()["success"],
        true
    );
}

fn seqs(got: &Got) -> Vec<u64> {
    got.messages
        .iter()
        .map(|message| message.seq.get())
        .collect()
}

#[tokio::test]
async fn messages_stored_beyond_the_end_take_no_place_on_the_page() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    publish(&client, "general", "1").await;
    publish(&client, "general", "2").await;
    // These were appended and stored after the page asked for the stream's last sequence.
    store(&database, 101..=160).await;
    let got = ask(&client, "general", json!({})).await;
    assert_eq!(
        (got.texts(), got.more, got.through),
        (vec!["1", "2"], false, 2)
    );
    let got = ask(&client, "general", json!({"after": 0, "limit": 1})).await;
    assert_eq!((got.texts(), got.more), (vec!["1"], true));
    function.stop().await.unwrap();
}

#[tokio::test]
async fn messages_stored_and_trimmed_above_an_old_ack_floor_are_on_the_page() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    for number in 1..=3 {
        publish(&client, "general", &number.to_string()).await;
    }
    store(&database, 1..=3).await;
    // The consumer has acknowledged nothing, as if our value of the ack floor were old.
    for seq in 1..=3 {
        remove(&world, seq).await;
    }
    for body in [
        json!({}),
        json!({"after": 0}),
        json!({"before": 4}),
        json!({"around": 2}),
    ] {
        let got = ask(&client, "general", body.clone()).await;
        assert_eq!(
            (seqs(&got), got.more, got.through),
            (vec![1, 2, 3], false, 3),
            "{body}"
        );
    }
    publish(&client, "general", "4").await;
    assert_eq!(
        seqs(&ask(&client, "general", json!({})).await),
        [1, 2, 3, 4]
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn an_unstored_duplicate_is_on_one_page_only() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    let say = async |text: &str, id: &str| {
        publish_body(
            &client,
            "chat.general",
            &json!({"user": "ann", "text": text, "id": id}).to_string(),
        )
        .await
    };
    let first = say("first", "a").await;
    let second = say("second", "b").await;
    let again = say("first", "a").await;
    for (body, texts, more) in [
        (json!({"limit": 1}), vec!["second"], true),
        (json!({"limit": 1, "before": second}), vec!["first"], false),
        (json!({"after": first}), vec!["second"], false),
        (json!({"after": second}), vec![], false),
        (json!({"around": again}), vec!["first", "second"], false),
        (
            json!({"around": second, "limit": 2}),
            vec!["first", "second"],
            false,
        ),
    ] {
        let got = ask(&client, "general", body.clone()).await;
        assert_eq!((got.texts(), got.more), (texts, more), "{body}");
    }
    function.stop().await.unwrap();
}

#[tokio::test]
async fn pages_below_a_cursor_miss_nothing_while_the_stream_grows() {
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    for number in 1..=1_500 {
        client
            .publish(
                "chat.general",
                json!({"user": "ann", "text": number.to_string()})
                    .to_string()
                    .into(),
            )
            .await
            .unwrap();
    }
    publish(&client, "general", "1501").await;
    let stop = AtomicBool::new(false);
    let grow = async {
        let client = world.client("publisher").await;
        while !stop.load(Ordering::Relaxed) {
            for _ in 0..20 {
                client
                    .publish("chat.general", r#"{"user":"ann","text":"more"}"#.into())
                    .await
                    .unwrap();
            }
            publish(&client, "general", "more").await;
        }
    };
    let page_back = async {
        for number in 0..40 {
            let before = 1_501 - number * 3;
            let got = ask(&client, "general", json!({"limit": 10, "before": before})).await;
            assert_eq!(
                seqs(&got),
                (before - 10..before).collect::<Vec<u64>>(),
                "before {before}"
            );
            assert!(got.more && got.through == before - 1, "{got:?}");
        }
        stop.store(true, Ordering::Relaxed);
    };
    tokio::join!(grow, page_back);
    function.stop().await.unwrap();
}

#[tokio::test]
async fn while_it_is_hard_deleted_a_message_is_there_or_its_tombstone_is() {
    const ROUNDS: u64 = 60;
    let world = World::start().await;
    let function = history(&world).await;
    let client = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let eraser = world.client("persist-message").await;
    // Reading these takes a while, and the deleted message is read after them.
    for _ in 0..300 {
        publish(&client, "general", "before").await;
    }
    let target = AtomicU64::new(0);
    let delete = async {
        for _ in 0..ROUNDS {
            let seq = publish(&client, "general", "secret").await;
            target.store(seq, Ordering::SeqCst);
            let deletion = json!({
                "type": "delete", "target": seq, "id": format!("seq:{seq}"), "user": "ann",
                "derived": true, "mode": "hard", "timestamp": 0, "received": 4_000_000_000_000_i64,
                "by": "ann",
            });
            publish_body(&bootstrap, "change.chat.general", &deletion.to_string()).await;
            eraser
                .request(
                    protocol::js_api::MESSAGE_DELETE,
                    json!({ "seq": seq }).to_string().into(),
                )
                .await
                .unwrap();
        }
        target.store(u64::MAX, Ordering::SeqCst);
    };
    let look = async |limit: u32| {
        let reader = world.client("publisher").await;
        loop {
            let seq = target.load(Ordering::SeqCst);
            if seq == u64::MAX {
                return;
            }
            // The message was acknowledged before the request, so the page has it or its tombstone.
            let got = ask(&reader, "general", json!({"limit": limit, "around": seq})).await;
            assert!(
                seq == 0 || seqs(&got).contains(&seq),
                "{seq} is neither there nor deleted: {:?}",
                seqs(&got)
            );
        }
    };
    // Many at once, and no two alike, so that each waits between its reads.
    tokio::join!(delete, futures::future::join_all((450..454).map(look)));
    function.stop().await.unwrap();
}
