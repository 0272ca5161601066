//! Deletions and the sequence guard: a deleted text stays deleted, whether PostgreSQL has stored
//! the message, its deletion, both or neither.

use async_nats::Client;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::sequence_guard::{
    Entry, advance, body, entries, publish, received_ms, store, texts, without_stream,
};
use super::{api, start, stream_with};
use base::seq::Seq;
use protocol::change::Change;
use protocol::subject::GUARD_SUBJECT;

/// What delete-message appends when `sender` deletes the message at `target`. Without `id`, the
/// message has no client-supplied one.
async fn deletion(admin: &Client, target: u64, sender: &str, id: Option<&str>) -> String {
    let mut deletion = json!({
        "type": "delete",
        "target": target,
        "id": id.map_or_else(|| format!("seq:{target}"), str::to_owned),
        "user": sender,
        "timestamp": 1,
        "received": received_ms(admin, target).await,
        "mode": "soft",
        "by": sender,
    });
    if id.is_none() {
        deletion["derived"] = json!(true);
    }
    deletion.to_string()
}

/// The deletions in the stream.
async fn changes(admin: &Client) -> Vec<Change> {
    let stream = async_nats::jetstream::new(admin.clone())
        .get_stream("CHAT_MESSAGES")
        .await
        .unwrap();
    let mut found = Vec::new();
    for Entry { seq, subject, .. } in entries(admin).await {
        if Change::is_change_subject(&subject) {
            let message = stream.get_raw_message(seq).await.unwrap();
            found.push(
                Change::parse(&subject, &message.payload, Seq::new(seq).unwrap(), 0).unwrap(),
            );
        }
    }
    found
}

async fn targets(admin: &Client) -> Vec<(u64, String, i64)> {
    let found = changes(admin)
        .await
        .into_iter()
        .map(|change| change.deletion);
    found
        .map(|deletion| (deletion.target.get(), deletion.id, deletion.received))
        .collect()
}

async fn with_stream() -> (testing::World, Client, PgPool) {
    let (world, admin, database) = without_stream().await;
    api(
        &admin,
        "STREAM.CREATE.CHAT_MESSAGES",
        stream_with(json!({})),
    )
    .await;
    (world, admin, database)
}

/// Both a deletion in the same chunk as its message, and one several chunks later.
#[tokio::test]
async fn a_deletion_follows_its_message() {
    let (world, admin, _) = with_stream().await;
    publish(&admin, "chat.general", &[], &body("ann", "deleted soon")).await;
    let of_first = deletion(&admin, 1, "ann", None).await;
    publish(&admin, "change.chat.general", &[], &of_first).await;
    publish(
        &admin,
        "chat.general",
        &[],
        &json!({"user": "ann", "text": "with an id", "id": "a-3"}).to_string(),
    )
    .await;
    publish(&admin, "chat.general", &[], &body("bob", "deleted late")).await;
    for number in 0..40 {
        publish(
            &admin,
            "chat.general",
            &[],
            &body("bob", &number.to_string()),
        )
        .await;
    }
    for (target, sender, id) in [(3, "ann", Some("a-3")), (4, "bob", None)] {
        let deletion = deletion(&admin, target, sender, id).await;
        publish(&admin, "change.chat.general", &[], &deletion).await;
    }
    start(&world).await.unwrap().stop().await.unwrap();
    let stream = entries(&admin).await;
    assert_eq!(
        texts(&stream)[2..4],
        [(503, "with an id"), (504, "deleted late")]
    );
    assert_eq!(stream.len(), 46);
    let mut followed = Vec::new();
    for (target, id) in [(501, "seq:501"), (503, "a-3"), (504, "seq:504")] {
        followed.push((target, id.to_owned(), received_ms(&admin, target).await));
    }
    assert_eq!(targets(&admin).await, followed);
    assert_eq!(
        changes(&admin)
            .await
            .iter()
            .map(|change| change.seq.get())
            .collect::<Vec<u64>>(),
        [502, 545, 546]
    );
}

/// The replica that died had appended the message, and had not removed its dead letter yet.
#[tokio::test]
async fn a_deletion_follows_a_message_that_went_ahead() {
    let (world, admin, database) = with_stream().await;
    publish(&admin, "chat.general", &[], &body("ann", "deleted")).await;
    let deletion = deletion(&admin, 1, "ann", None).await;
    let received = received_ms(&admin, 1).await;
    api(
        &admin,
        "STREAM.UPDATE.CHAT_MESSAGES",
        stream_with(json!({"subjects": [GUARD_SUBJECT]})),
    )
    .await;
    dead_letter(
        &database,
        1,
        "chat.general",
        &body("ann", "deleted"),
        received,
    )
    .await;
    dead_letter(&database, 2, "change.chat.general", &deletion, received).await;
    advance(&admin).await;
    let digest: String = sqlx::query_scalar(
        "select encode(sha256(sha256(headers) || sha256(payload)), 'hex')
               from dead_letters where seq = 1",
    )
    .fetch_one(&database)
    .await
    .unwrap();
    api(
        &admin,
        "STREAM.UPDATE.CHAT_MESSAGES",
        stream_with(json!({})),
    )
    .await;
    let headers = [
        ("Nats-Msg-Id", format!("fence:1:{digest}")),
        ("Scrollback-Original-Id", String::new()),
    ];
    let headers: Vec<(&str, &str)> = headers
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    assert_eq!(
        publish(&admin, "chat.general", &headers, &body("ann", "deleted")).await,
        501
    );
    start(&world).await.unwrap().stop().await.unwrap();
    assert_eq!(
        targets(&admin).await,
        [(501, "seq:501".to_owned(), received_ms(&admin, 501).await)]
    );
    assert_eq!(entries(&admin).await.len(), 2);
}

async fn dead_letter(database: &PgPool, seq: i64, subject: &str, payload: &str, received_ms: i64) {
    let dead_letter = "
        insert into dead_letters (seq, subject, headers, payload, reason, received_at)
        values ($1, $2, '', convert_to($3, 'utf8'), 'below_fence',
                'epoch'::timestamptz + $4 * interval '1 ms')";
    sqlx::query(dead_letter)
        .bind(seq)
        .bind(subject)
        .bind(payload)
        .bind(received_ms)
        .execute(database)
        .await
        .unwrap();
}

/// Two lost streams had a message of the same sender at the same sequence, and one of the two is
/// deleted.
#[tokio::test]
async fn a_deletion_follows_the_message_of_its_own_stream() {
    let (world, admin, database) = with_stream().await;
    publish(&admin, "chat.general", &[], &body("ann", "deleted")).await;
    let received = received_ms(&admin, 1).await;
    let deletion = deletion(&admin, 1, "ann", None).await;
    api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
    dead_letter(
        &database,
        1,
        "chat.general",
        &body("ann", "of an earlier stream"),
        received - 1,
    )
    .await;
    dead_letter(
        &database,
        1,
        "chat.general",
        &body("ann", "deleted"),
        received,
    )
    .await;
    dead_letter(&database, 2, "change.chat.general", &deletion, received).await;
    start(&world).await.unwrap().stop().await.unwrap();
    assert_eq!(
        texts(&entries(&admin).await)[..2],
        [(501, "of an earlier stream"), (502, "deleted")]
    );
    assert_eq!(
        targets(&admin).await,
        [(502, "seq:502".to_owned(), received_ms(&admin, 502).await)]
    );
}

async fn store_change(database: &PgPool, seq: i64, target: i64, id: &str, received_ms: i64) {
    let row = "
        insert into changes (seq, room_id, target, sender, id, mode, changed_by, received_at)
        select $1, id, $2, 'ann', $3, 'soft', 'ann', 'epoch'::timestamptz + $4 * interval '1 ms'
          from rooms where name = 'general'";
    sqlx::query(row)
        .bind(seq)
        .bind(target)
        .bind(id)
        .bind(received_ms)
        .execute(database)
        .await
        .unwrap();
}

#[tokio::test]
async fn what_is_known_to_be_deleted_is_not_appended_again() {
    let (world, admin, database) = with_stream().await;
    publish(
        &admin,
        "chat.general",
        &[],
        &body("ann", "deleted by a change"),
    )
    .await;
    publish(
        &admin,
        "chat.general",
        &[],
        &json!({"user": "ann", "text": "deleted by a tombstone", "id": "a-2"}).to_string(),
    )
    .await;
    publish(
        &admin,
        "chat.general",
        &[],
        &body("ann", "in the place of one that was deleted"),
    )
    .await;
    publish(&admin, "chat.other", &[], &body("ann", "in another room")).await;
    publish(
        &admin,
        "chat.general",
        &[],
        &body("bob", "by another sender"),
    )
    .await;
    let stored = deletion(&admin, 1, "ann", None).await;
    publish(&admin, "change.chat.general", &[], &stored).await;
    let reused = deletion(&admin, 2, "ann", Some("a-2")).await;
    publish(&admin, "change.chat.general", &[], &reused).await;

    store_change(&database, 6, 1, "seq:1", received_ms(&admin, 6).await).await;
    store(&database, 490, "ann", Some("a-2"), 0).await;
    store(&database, 3, "ann", None, received_ms(&admin, 3).await - 1).await;
    sqlx::raw_sql("update messages set deleted = true where seq in (490, 3)")
        .execute(&database)
        .await
        .unwrap();
    // Deletions of the lost stream, at sequences that this stream used again.
    store_change(&database, 7, 3, "seq:3", received_ms(&admin, 7).await - 1).await;
    for target in [4, 5] {
        store_change(&database, 490 + target, target, &format!("seq:{target}"), 0).await;
    }

    start(&world).await.unwrap().stop().await.unwrap();
    let stream = entries(&admin).await;
    let left = [
        (501, "in the place of one that was deleted"),
        (502, "in another room"),
        (503, "by another sender"),
    ];
    assert_eq!(texts(&stream)[..3], left);
    assert_eq!(
        (stream.len(), stream[3].subject.as_str()),
        (4, "change.chat.general")
    );
    assert_eq!(changes(&admin).await[0].deletion.id, "a-2");
}

#[tokio::test]
async fn changes_and_duplicates_are_stored_too() {
    let (world, admin, database) = without_stream().await;
    for (statement, next) in [
        (
            "insert into duplicates (seq, sender, id) values (600, 'ann', 'a-1')",
            601,
        ),
        (
            "insert into changes (seq, room_id, target, sender, id, mode, changed_by, received_at)
             values (700, 1, 5, 'ann', 'a-1', 'soft', 'ann', now())",
            701,
        ),
    ] {
        sqlx::raw_sql(statement).execute(&database).await.unwrap();
        start(&world).await.unwrap().stop().await.unwrap();
        assert_eq!(
            publish(&admin, "chat.general", &[], &body("ann", "next")).await,
            next
        );
        let found: Value = api(&admin, "STREAM.DELETE.CHAT_MESSAGES", json!({})).await;
        assert_eq!(found["success"], true);
    }
}
