//! Changes between the reads of a page, made by hand.

use sqlx::PgPool;

use super::*;
use protocol::endpoints::DM_INBOX;

async fn execute(database: &PgPool, sql: &'static str) {
    sqlx::raw_sql(sql).execute(database).await.unwrap();
}

async fn remove(world: &World, seq: u64) {
    let client = world.client("persist-message").await;
    let reply = client
        .request(
            js_api::MESSAGE_DELETE,
            json!({ "seq": seq }).to_string().into(),
        )
        .await
        .unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&reply.payload).unwrap()["success"],
        true
    );
}

#[tokio::test]
async fn a_deletion_stored_and_trimmed_above_an_old_ack_floor_is_on_the_page() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    let bootstrap = world.client("stream-bootstrap").await;
    let message = append(&client, "chat.general", r#"{"user":"ann","text":"said"}"#).await;
    let change = append(
        &bootstrap,
        "change.chat.general",
        &deletion(message, "seq:1", "soft").to_string(),
    )
    .await;
    execute(
        &database,
        "insert into rooms (name) values ('general');
         insert into messages (seq, room_id, sender, recipient, id, derived, text, sent_at,
             received_at, deleted)
         select 1, id, 'ann', null, 'seq:1', true, '', now(), now(), true from rooms;
         insert into changes (seq, room_id, target, sender, id, mode, changed_by, received_at)
         select 2, id, 1, 'ann', 'seq:1', 'soft', 'ann', now() from rooms",
    )
    .await;
    // The consumer has acknowledged nothing, as if our value of the ack floor were old.
    remove(&world, message).await;
    remove(&world, change).await;
    let (page, _) = ask(&client, 0, 50).await;
    assert_eq!(
        (
            page.messages.len(),
            page.changes.len(),
            page.through.get(),
            page.more
        ),
        (1, 1, change, false),
        "{page:?}"
    );
    // A client that has the message already receives the deletion, too.
    let (page, _) = ask(&client, message, 50).await;
    assert_eq!(
        (
            page.messages.len(),
            page.changes[0].target.get(),
            page.through.get()
        ),
        (0, message, change),
        "{page:?}"
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn an_unstored_duplicate_comes_once() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let body = r#"{"user":"ann","text":"once","id":"a"}"#;
    let first = append(&client, "chat.general", body).await;
    let again = append(&client, "chat.general", body).await;
    let (page, _) = ask(&client, first, 50).await;
    assert_eq!(
        (page.messages.len(), page.through.get()),
        (0, again),
        "{page:?}"
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn an_inbox_has_no_deletions_of_expired_messages() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    let bootstrap = world.client("stream-bootstrap").await;
    for _ in 0..4 {
        append(
            &client,
            "chat.other",
            r#"{"user":"ann","text":"takes a place"}"#,
        )
        .await;
    }
    // Two messages and their deletions, the third and fourth position, are stored; one message is
    // very old.
    execute(
        &database,
        "insert into rooms (name) values ('dm.ann.bob');
         insert into messages (seq, room_id, sender, recipient, id, derived, text, sent_at,
             received_at, deleted)
         select seq, id, 'ann', 'bob', 'seq:' || seq, true, '', now(),
             now() - interval '1 day' * (2 - seq) * 100, true
           from rooms, generate_series(1, 2) as seq;
         insert into changes (seq, room_id, target, sender, id, mode, changed_by, received_at,
             recipient)
         select seq + 2, id, seq, 'ann', 'seq:' || seq, 'soft', 'ann', now(), 'bob' from rooms,
             generate_series(1, 2) as seq",
    )
    .await;
    // Two deletions are in the stream only; one of their messages is very old.
    let direct = |received: i64, target: u64| {
        json!({
            "type": "delete", "target": target, "id": format!("seq:{target}"), "user": "ann",
            "to": "bob", "derived": true, "timestamp": 0, "received": received, "mode": "soft",
            "by": "ann",
        })
        .to_string()
    };
    append(&bootstrap, "change.dm.ann.bob", &direct(1, 3)).await;
    let deletion_seq = append(
        &bootstrap,
        "change.dm.ann.bob",
        &direct(4_000_000_000_000, 4),
    )
    .await;
    let (page, _) = ask_raw(&client, DM_INBOX.subject(&["bob"]), "")
        .await
        .unwrap();
    let targets: Vec<u64> = page
        .changes
        .iter()
        .map(|change| change.target.get())
        .collect();
    assert_eq!(targets, [2, 4], "{page:?}");
    assert_eq!(page.through.get(), deletion_seq);
    function.stop().await.unwrap();
}
