//! Cursors move forward only, not beyond the stream, and only for the user who asks.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::{SOON, ask, deliver, history, inbox, read_direct, read_room, say, start, stored};
use protocol::endpoints::{DELIVERED, DM_HISTORY, DM_INBOX, DM_READ, READ, UNREAD};
use testing::{World, eventually};

async fn receipt_history(database: &PgPool) -> Vec<(String, Option<String>, String, i64)> {
    sqlx::query_as("select reader, room, kind, through from receipt_moves order by at")
        .fetch_all(database)
        .await
        .unwrap()
}

/// The receipts in the outbox.
async fn outbox(database: &PgPool) -> Vec<(i64, Value)> {
    let rows: Vec<(i64, String)> = sqlx::query_as(
        "select first_seq, receipts::text from outbox where receipts is not null order by id",
    )
    .fetch_all(database)
    .await
    .unwrap();
    rows.into_iter()
        .map(|(seq, receipts)| (seq, serde_json::from_str(&receipts).unwrap()))
        .collect()
}

#[tokio::test]
async fn a_cursor_moves_forward_and_not_beyond_the_stream() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    for number in 1..=4 {
        say(&client, "dm.ann.bob", "ann", &number.to_string()).await;
    }
    say(&client, "chat.general", "ann", "5").await;
    for (through, marked) in [
        (0, (0, false)),
        (2, (2, true)),
        (2, (2, false)),
        (1, (2, false)),
        (i64::MAX as u64, (5, true)),
        (9, (5, false)),
    ] {
        assert_eq!(
            deliver(&client, "bob", through).await,
            marked,
            "through {through}"
        );
    }
    assert_eq!(read_direct(&client, "bob", "ann", 3).await, (3, true));
    assert_eq!(read_direct(&client, "bob", "ann", 2).await, (3, false));
    assert_eq!(read_direct(&client, "bob", "ann", 1_000).await, (5, true));
    assert_eq!(read_room(&client, "bob", "general", 1_000).await, (5, true));
    assert_eq!(read_room(&client, "bob", "general", 4).await, (5, false));
    // Ann's cursors are her own.
    assert_eq!(read_direct(&client, "ann", "bob", 1).await, (1, true));
    let moved = |room: Option<&str>, kind: &str, through| {
        (
            "bob".to_owned(),
            room.map(str::to_owned),
            kind.to_owned(),
            through,
        )
    };
    let dm = Some("dm.ann.bob");
    assert_eq!(
        receipt_history(&database).await[..5],
        [
            moved(None, "delivered", 2),
            moved(None, "delivered", 5),
            moved(dm, "read", 3),
            moved(dm, "read", 5),
            moved(Some("general"), "read", 5)
        ]
    );
    let receipt = |kind: &str, room: &str, through: i64| {
        (
            through,
            json!([{"kind": kind, "user": "bob", "room": room, "through": through}]),
        )
    };
    assert_eq!(
        outbox(&database).await[..3],
        [
            receipt("delivered", "dm.ann.bob", 2),
            receipt("delivered", "dm.ann.bob", 5),
            receipt("read", "dm.ann.bob", 3)
        ]
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn every_sender_gets_a_receipt_for_messages_stored_or_not() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    let worker = world.spawn("persist-message").await;
    let first = say(&client, "dm.ann.bob", "ann", "before").await;
    assert_eq!(deliver(&client, "bob", first).await, (first, true));
    say(&client, "dm.carol.bob", "carol", "stored").await;
    say(&client, "dm.bob.dave", "bob", "not to bob").await;
    stored(&world, first + 2).await;
    assert!(worker.terminate().await.success());
    say(&client, "dm.dave.bob", "dave", "in the stream").await;
    let last = say(&client, "dm.erin.bob", "erin", "beyond the cursor").await;
    assert_eq!(deliver(&client, "bob", last - 1).await, (last - 1, true));
    let (_, receipts) = outbox(&database).await.pop().unwrap();
    let mut rooms: Vec<&str> = receipts
        .as_array()
        .unwrap()
        .iter()
        .map(|receipt| receipt["room"].as_str().unwrap())
        .collect();
    rooms.sort_unstable();
    assert_eq!(rooms, ["dm.bob.carol", "dm.bob.dave"]);
    // There is no message of his in between: the cursor moves, and nobody gets a receipt.
    let other = say(&client, "chat.general", "ann", "to all").await;
    deliver(&client, "bob", last).await;
    let before = outbox(&database).await.len();
    assert_eq!(deliver(&client, "bob", other).await, (other, true));
    assert_eq!(outbox(&database).await.len(), before);
    function.stop().await.unwrap();
}

#[tokio::test]
async fn cursors_moved_at_once_end_at_the_highest() {
    let world = World::start().await;
    let (one, other) = tokio::join!(start(&world), start(&world));
    let client = world.client("publisher").await;
    let database = world.database().await;
    for number in 1..=40 {
        say(&client, "dm.ann.bob", "ann", &number.to_string()).await;
    }
    let asked = (1..=40).rev().chain(1..=40).map(async |through| {
        let ((delivered, _), (read, _)) = tokio::join!(
            deliver(&client, "bob", through),
            read_direct(&client, "bob", "ann", through)
        );
        assert!(delivered >= through && read >= through);
    });
    futures::future::join_all(asked).await;
    assert_eq!(
        (
            deliver(&client, "bob", 40).await,
            read_direct(&client, "bob", "ann", 40).await
        ),
        ((40, false), (40, false))
    );
    for kind in ["delivered", "read"] {
        let through: Vec<i64> = receipt_history(&database)
            .await
            .into_iter()
            .filter(|row| row.2 == kind)
            .map(|row| row.3)
            .collect();
        assert!(
            through.is_sorted_by(|before, after| before < after),
            "{kind} {through:?}"
        );
    }
    for function in [one, other] {
        function.stop().await.unwrap();
    }
}

#[tokio::test]
async fn a_room_without_messages_cannot_be_read() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    say(&client, "chat.other", "ann", "elsewhere").await;
    for subject in [
        READ.subject(&["bob", "general"]),
        DM_READ.subject(&["bob", "ann"]),
    ] {
        let (code, reason) = ask(&client, subject, r#"{"through":1}"#).await.unwrap_err();
        assert_eq!(
            (code, reason.as_str()),
            (404, "nobody has written anything here yet")
        );
    }
    let cursors: i64 = sqlx::query_scalar("select count(*) from receipts")
        .fetch_one(&database)
        .await
        .unwrap();
    assert_eq!(cursors, 0);
    // A message that is not stored yet can be read.
    say(&client, "dm.bob.ann", "bob", "hello").await;
    assert_eq!(read_direct(&client, "ann", "bob", 2).await, (2, true));
    assert_eq!(read_room(&client, "ann", "other", 1).await, (1, true));
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_bad_request_names_what_is_wrong() {
    let world = World::start().await;
    let function = start(&world).await;
    let sync = world.spawn("sync-messages").await;
    let client = world.client("publisher").await;
    let subjects = [
        DELIVERED.subject(&["bob"]),
        READ.subject(&["bob", "general"]),
        DM_READ.subject(&["bob", "ann"]),
    ];
    for subject in &subjects {
        for (body, hint) in [
            ("", "through is missing"),
            (r#"{"through":-1}"#, "through must be"),
            (r#"{"through":"1"}"#, "through must be"),
            (r#"{"through":9223372036854775808}"#, "through must be"),
            ("[1]", "a JSON object"),
        ] {
            let (code, reason) = ask(&client, subject.clone(), body).await.unwrap_err();
            assert!(
                code == 400 && reason.contains(hint),
                "{subject} {body}: {code} {reason}"
            );
        }
    }
    for (subject, body, hint) in [
        (
            DM_INBOX.subject(&["bob"]),
            r#"{"limit":0}"#,
            "limit must be",
        ),
        (
            DM_INBOX.subject(&["bob"]),
            r#"{"limit":501}"#,
            "limit must be",
        ),
        (DM_INBOX.subject(&["b%b"]), "", "a user is"),
        (UNREAD.subject(&["b%b"]), "", "a user is"),
        (UNREAD.subject(&["bob"]), "[]", "a JSON object"),
        (DELIVERED.subject(&["b%b"]), r#"{"through":1}"#, "a user is"),
        (
            READ.subject(&["bob"]),
            r#"{"through":1}"#,
            "the subject must be",
        ),
        (
            READ.subject(&["bob", "dm.ann.carol"]),
            r#"{"through":1}"#,
            "the subject must be",
        ),
        (
            READ.subject(&["bob", "a%b"]),
            r#"{"through":1}"#,
            "a room is",
        ),
        (
            DM_READ.subject(&["bob", "a", "b"]),
            r#"{"through":1}"#,
            "the subject must be",
        ),
        (
            DM_READ.subject(&["bob", "a%b"]),
            r#"{"through":1}"#,
            "a user is",
        ),
    ] {
        let (code, reason) = ask(&client, subject.clone(), body).await.unwrap_err();
        assert!(
            code == 400 && reason.contains(hint),
            "{subject} {body}: {code} {reason}"
        );
    }
    drop(sync);
    function.stop().await.unwrap();
}

#[tokio::test]
async fn an_operator_sees_what_was_delivered_and_what_waits() {
    let world = World::start().await;
    let function = start(&world).await;
    let _worker = world.spawn("persist-message").await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    for number in 1..=3 {
        say(&client, "dm.ann.bob", "ann", &number.to_string()).await;
    }
    say(&client, "dm.bob.carol", "bob", "4").await;
    say(&client, "chat.general", "bob", "5").await;
    stored(&world, 5).await;
    deliver(&client, "bob", 2).await;
    read_direct(&client, "bob", "ann", 1).await;
    let status: Vec<String> = sqlx::query_scalar("select status from direct_messages order by seq")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(status, ["read", "delivered", "sent", "sent"]);
    let waits: Vec<(String, i64)> =
        sqlx::query_as("select recipient, messages from undelivered order by recipient")
            .fetch_all(&database)
            .await
            .unwrap();
    assert_eq!(waits, [("bob".to_owned(), 1), ("carol".to_owned(), 1)]);
    // Five messages and two receipts wait, because relay-outbox does not run here.
    let lag = async || -> Vec<(String, i64, bool)> {
        let lag = sqlx::query_as(
            "select stage, waiting, behind < interval '1 minute' from lag where waiting > 0
             order by stage",
        );
        lag.fetch_all(&database).await.unwrap()
    };
    assert_eq!(
        lag().await,
        [
            ("delivery".to_owned(), 2, true),
            ("events".to_owned(), 7, true)
        ]
    );
    // Expired messages do not count as waiting, whether they are deleted already or not.
    sqlx::raw_sql(
        "insert into retention (room, days) values ('dm.bob.carol', 1);
         update messages set received_at = now() - interval '2 days'",
    )
    .execute(&database)
    .await
    .unwrap();
    assert_eq!(
        lag().await,
        [
            ("delivery".to_owned(), 1, false),
            ("events".to_owned(), 7, true)
        ]
    );
    let users: Vec<String> = sqlx::query_scalar("select name from users order by name")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(users, ["ann", "bob", "carol"]);
    function.stop().await.unwrap();
}

/// Permissions pin the caller's token. What a third user asks in their own name shows nothing and
/// moves nothing.
#[tokio::test]
async fn a_third_user_sees_and_moves_nothing() {
    let world = World::start().await;
    let function = start(&world).await;
    let _beside = tokio::join!(world.spawn("sync-messages"), world.spawn("get-history"));
    let client = world.client("publisher").await;
    say(&client, "dm.ann.bob", "ann", "psst").await;
    assert_eq!(inbox(&client, "eve").await, []);
    assert_eq!(deliver(&client, "eve", 1).await, (1, true));
    for peer in ["ann", "bob"] {
        assert_eq!(
            ask(&client, DM_READ.subject(&["eve", peer]), r#"{"through":1}"#)
                .await
                .unwrap_err()
                .0,
            404
        );
        assert_eq!(history(&client, "eve", peer).await, []);
    }
    assert_eq!(super::unread(&client, "eve").await, (vec![], 0));
    // The sender's own cursors say nothing about what the recipient has.
    deliver(&client, "ann", 1).await;
    read_direct(&client, "ann", "bob", 1).await;
    assert_eq!(
        history(&client, "ann", "bob").await,
        [(1, "psst".to_owned(), "sent".to_owned())]
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn while_postgresql_is_away_no_cursor_moves_and_history_says_sent() {
    let world = World::with_own_postgres().await;
    let function = start(&world).await;
    let _beside = tokio::join!(world.spawn("sync-messages"), world.spawn("get-history"));
    let client = world.client("publisher").await;
    say(&client, "dm.ann.bob", "ann", "hello").await;
    assert_eq!(deliver(&client, "bob", 1).await, (1, true));
    assert_eq!(history(&client, "ann", "bob").await[0].2, "delivered");
    world.postgres().stop().await;
    let through = r#"{"through":1}"#;
    for (subject, body) in [
        (DELIVERED.subject(&["bob"]), through),
        (DM_READ.subject(&["bob", "ann"]), through),
        (READ.subject(&["bob", "general"]), through),
        (UNREAD.subject(&["bob"]), ""),
        (DM_INBOX.subject(&["bob"]), ""),
    ] {
        let (code, reason) = ask(&client, subject.clone(), body).await.unwrap_err();
        assert!(
            code == 503 && reason.starts_with("the database is away"),
            "{subject}: {code} {reason}"
        );
    }
    let page = ask(
        &client,
        DM_HISTORY.subject(&["ann", "bob"]),
        r#"{"receipts":true}"#,
    )
    .await
    .unwrap();
    assert_eq!(
        (&page[0]["status"], &page[0]["deliveredAt"]),
        (&json!("sent"), &Value::Null)
    );
    world.postgres().start().await;
    eventually("it is there again", SOON, async || {
        ask(&client, DM_READ.subject(&["bob", "ann"]), through)
            .await
            .is_ok_and(|marked| marked["through"] == 1)
            .then_some(())
    })
    .await;
    eventually("history knows it again", SOON, async || {
        (history(&client, "ann", "bob").await[0].2 == "read").then_some(())
    })
    .await;
    function.stop().await.unwrap();
}
