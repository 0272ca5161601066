//! Unread messages, counted in the stream, in PostgreSQL, and in both.

use serde_json::json;
use sqlx::PgPool;

use super::{append, of, read_direct, read_room, say, start, stored, unread, whole_unread};
use testing::World;

/// Stores `count` messages from `from` on, by hand.
async fn store(
    database: &PgPool,
    from: i64,
    count: i64,
    room: &str,
    sender: &str,
    to: Option<&str>,
) {
    sqlx::query("insert into rooms (name) values ($1) on conflict do nothing")
        .bind(room)
        .execute(database)
        .await
        .unwrap();
    sqlx::query(
        "insert into messages (seq, room_id, sender, recipient, id, derived, text, sent_at,
         received_at)
         select seq, (select id from rooms where name = $3), $4, $5, 'id-' || seq, false, 'hello',
             now(), now()
           from generate_series($1::bigint, $1 + $2 - 1) as seq",
    )
    .bind(from)
    .bind(count)
    .bind(room)
    .bind(sender)
    .bind(to)
    .execute(database)
    .await
    .unwrap();
}

/// The stream counts as stored up to there.
async fn set_ack_floor(world: &World, seq: u64) {
    let admin = world.client("administrator").await;
    admin
        .request(
            "$JS.API.STREAM.PURGE.CHAT_MESSAGES",
            json!({"seq": seq + 1}).to_string().into(),
        )
        .await
        .unwrap();
    stored(world, seq).await;
}

fn more(room: &str, count: u64) -> (String, u64, bool) {
    (room.to_owned(), count, true)
}

fn deletion(room: &str, target: u64, to: Option<&str>) -> serde_json::Value {
    let mut body = json!({
        "type": "delete", "target": target, "id": format!("seq:{target}"), "derived": true,
        "user": "ann", "timestamp": 1_700_000_000_000_i64, "received": 1, "mode": "soft",
        "by": "ann",
    });
    if let Some(to) = to {
        body["to"] = json!(to);
    }
    assert_eq!(room.starts_with("dm."), to.is_some());
    body
}

#[tokio::test]
async fn messages_of_others_above_the_cursor_are_unread() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    assert_eq!(unread(&client, "bob").await, (vec![], 0));
    // First everything is in the stream only; then everything above what is stored.
    for round in 0..2_u64 {
        let above = round * 13;
        let said = async |subject: &str, user: &str| say(&client, subject, user, "hello").await;
        let first = said("dm.ann.bob", "ann").await;
        assert_eq!(first, above + 1);
        let second = said("dm.ann.bob", "ann").await;
        said("dm.bob.ann", "bob").await;
        said("dm.carol.bob", "carol").await;
        said("dm.ann.carol", "ann").await;
        said("dm.bob.bob", "bob").await;
        let room = said("chat.general", "ann").await;
        said("chat.general", "bob").await;
        let deleted = said("chat.general", "ann").await;
        let newest = said("chat.general", "carol").await;
        said("chat.unread", "ann").await;
        // A room counts once the user has read in it.
        let of_dms = vec![of("dm.bob.carol", 1 + round), of("dm.ann.bob", 2)];
        match round {
            0 => assert_eq!(unread(&client, "bob").await, (of_dms, 3)),
            _ => assert_eq!(
                unread(&client, "bob").await,
                ([vec![of("general", 4)], of_dms].concat(), 8)
            ),
        }
        read_room(&client, "bob", "general", room).await;
        assert_eq!(unread(&client, "bob").await.0[0], of("general", 2));
        append(
            &bootstrap,
            "change.chat.general",
            deletion("general", deleted, None),
        )
        .await;
        assert_eq!(unread(&client, "bob").await.0[0], of("general", 1));
        append(
            &bootstrap,
            "change.dm.ann.bob",
            deletion("dm.ann.bob", second, Some("bob")),
        )
        .await;
        let left = vec![
            of("general", 1),
            of("dm.bob.carol", 1 + round),
            of("dm.ann.bob", 1),
        ];
        assert_eq!(unread(&client, "bob").await, (left.clone(), 3 + round));
        assert_eq!(newest, above + 10);
        let worker = world.spawn("persist-message").await;
        stored(&world, above + 13).await;
        assert_eq!(
            unread(&client, "bob").await,
            (left, 3 + round),
            "the same from PostgreSQL"
        );
        read_direct(&client, "bob", "ann", first).await;
        assert_eq!(
            unread(&client, "bob").await,
            (
                vec![of("general", 1), of("dm.bob.carol", 1 + round)],
                2 + round
            )
        );
        // The next messages stay in the stream only for a while.
        assert!(worker.terminate().await.success());
    }
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_count_is_exact_to_999_and_a_reply_lists_the_newest_500() {
    let world = World::builder().administrator().start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let database = world.database().await;
    set_ack_floor(&world, 99_999).await;
    store(&database, 1, 999, "dm.ann.bob", "ann", Some("bob")).await;
    store(
        &database,
        2_000,
        1_001,
        "dm.bob.carol",
        "carol",
        Some("bob"),
    )
    .await;
    store(&database, 4_000, 1_500, "general", "ann", None).await;
    store(&database, 6_000, 10, "mine", "bob", None).await;
    sqlx::query("insert into receipts values ('bob', 'general', 4499), ('bob', 'mine', 5999)")
        .execute(&database)
        .await
        .unwrap();
    let counts = vec![
        more("general", 999),
        more("dm.bob.carol", 999),
        of("dm.ann.bob", 999),
    ];
    assert_eq!(
        unread(&client, "bob").await,
        (counts, 2_997),
        "nothing is unread among one's own"
    );
    sqlx::query("update receipts set read = read + 1")
        .execute(&database)
        .await
        .unwrap();
    assert_eq!(unread(&client, "bob").await.0[0], of("general", 999));
    // Deleted a moment ago, and the deletion is not stored yet.
    for (target, left) in [
        (2_500, more("dm.bob.carol", 999)),
        (2_600, of("dm.bob.carol", 999)),
    ] {
        append(
            &bootstrap,
            "change.dm.bob.carol",
            deletion("dm.bob.carol", target, Some("bob")),
        )
        .await;
        assert_eq!(unread(&client, "bob").await.0[1], left);
    }

    for peer in 0..510 {
        store(
            &database,
            20_000 + peer,
            1,
            &format!("dm.bob.peer-{peer:03}"),
            &format!("peer-{peer:03}"),
            Some("bob"),
        )
        .await;
    }
    let all = whole_unread(&client, "bob").await;
    assert_eq!((all.unread.len(), all.total, all.more), (500, 500, true));
    assert_eq!(
        (all.unread[0].room.as_str(), all.unread[499].room.as_str()),
        ("dm.bob.peer-509", "dm.bob.peer-010")
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn own_messages_tombstones_and_expired_ones_hide_nothing() {
    let world = World::builder().administrator().start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    set_ack_floor(&world, 999_999).await;
    store(&database, 1, 999, "general", "ann", None).await;
    store(&database, 1_000, 1_500, "general", "bob", None).await;
    store(&database, 3_000, 1_500, "general", "ann", None).await;
    sqlx::query("update messages set deleted = true, text = '' where seq >= 3000")
        .execute(&database)
        .await
        .unwrap();
    store(&database, 5_000, 1_500, "old", "ann", None).await;
    store(&database, 6_500, 3, "old", "ann", None).await;
    store(&database, 7_000, 1_500, "dm.ann.bob", "ann", Some("bob")).await;
    store(&database, 8_500, 2, "dm.ann.bob", "ann", Some("bob")).await;
    sqlx::query(
        "update messages set received_at = now() - interval '31 days' where seq between 5000
         and 6499 or seq between 7000 and 8499",
    )
    .execute(&database)
    .await
    .unwrap();
    sqlx::query("insert into receipts values ('bob', 'general', 0), ('bob', 'old', 0)")
        .execute(&database)
        .await
        .unwrap();
    let counts = vec![of("dm.ann.bob", 2), of("old", 3), of("general", 999)];
    assert_eq!(unread(&client, "bob").await, (counts, 1_004));
    store(&database, 9_000, 1, "general", "ann", None).await;
    assert_eq!(unread(&client, "bob").await.0[0], more("general", 999));

    // However many messages of the user's own there are, a fixed number is considered, shared by
    // all rooms that need it.
    store(&database, 10_000, 5, "deep", "ann", None).await;
    store(&database, 20_000, 120_000, "deep", "bob", None).await;
    sqlx::query("insert into receipts values ('bob', 'deep', 0)")
        .execute(&database)
        .await
        .unwrap();
    sqlx::query("delete from receipts where room <> 'deep'")
        .execute(&database)
        .await
        .unwrap();
    assert_eq!(unread(&client, "bob").await.0[0], of("deep", 5));
    store(&database, 200_000, 7, "deeper", "ann", None).await;
    store(&database, 210_000, 120_000, "deeper", "bob", None).await;
    store(&database, 400_000, 2, "deeper", "ann", None).await;
    sqlx::query("insert into receipts values ('bob', 'deeper', 0)")
        .execute(&database)
        .await
        .unwrap();
    assert_eq!(
        unread(&client, "bob").await.0[..2],
        [more("deeper", 2), more("deep", 0)],
        "at least so many"
    );
    function.stop().await.unwrap();
}

/// Workers commit before they acknowledge, and in any order: a message of the stream above the ack
/// floor may be stored already, or a duplicate of it may be.
#[tokio::test]
async fn a_message_in_stream_and_projection_counts_once() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    for number in 1..=4 {
        append(
            &client,
            "dm.ann.bob",
            json!({"user": "ann", "text": "hello", "id": format!("id-{number}")}),
        )
        .await;
        append(
            &client,
            "chat.general",
            json!({"user": "ann", "text": "hello", "id": format!("general-{number}")}),
        )
        .await;
    }
    // A duplicate of the third message, later in the stream.
    append(
        &client,
        "dm.ann.bob",
        json!({"user": "ann", "text": "hello", "id": "id-3"}),
    )
    .await;
    say(&client, "chat.general", "ann", "the newest").await;
    read_room(&client, "bob", "general", 2).await;
    assert_eq!(
        unread(&client, "bob").await,
        (vec![of("general", 4), of("dm.ann.bob", 4)], 8)
    );
    store(&database, 1, 1, "dm.ann.bob", "ann", Some("bob")).await;
    store(&database, 9, 1, "dm.ann.bob", "ann", Some("bob")).await;
    store(&database, 4, 1, "general", "ann", None).await;
    sqlx::query(
        "update messages set id = case seq when 9 then 'id-3' when 4 then 'general-2' else id end",
    )
    .execute(&database)
    .await
    .unwrap();
    assert_eq!(
        unread(&client, "bob").await,
        (vec![of("general", 4), of("dm.ann.bob", 4)], 8)
    );
    function.stop().await.unwrap();
}

/// Messages that were stored long ago and deleted a moment ago: the deletion, by a client-supplied
/// or a derived id, is not stored yet.
#[tokio::test]
async fn a_message_deleted_a_moment_ago_is_not_unread() {
    let world = World::start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    for subject in ["dm.ann.bob", "chat.general"] {
        for id in ["first", "second"] {
            append(
                &client,
                subject,
                json!({"user": "ann", "text": "hello", "id": format!("{subject}-{id}")}),
            )
            .await;
        }
        say(&client, subject, "ann", "third").await;
    }
    let worker = world.spawn("persist-message").await;
    stored(&world, 6).await;
    assert!(worker.terminate().await.success());
    read_room(&client, "bob", "general", 0).await;
    read_room(&client, "bob", "general", 4).await;
    assert_eq!(
        unread(&client, "bob").await,
        (vec![of("general", 2), of("dm.ann.bob", 3)], 5)
    );
    append(
        &bootstrap,
        "change.dm.ann.bob",
        deletion("dm.ann.bob", 3, Some("bob")),
    )
    .await;
    append(
        &bootstrap,
        "change.chat.general",
        deletion("general", 6, None),
    )
    .await;
    assert_eq!(
        unread(&client, "bob").await,
        (vec![of("general", 1), of("dm.ann.bob", 2)], 3)
    );
    // The deletion names the place of a duplicate, which is not stored.
    let duplicate = append(
        &client,
        "dm.ann.bob",
        json!({"user": "ann", "text": "hello", "id": "dm.ann.bob-second"}),
    )
    .await;
    for (room, target, to) in [("dm.ann.bob", duplicate, Some("bob")), ("general", 5, None)] {
        let mut body = deletion(room, target, to);
        let subject = to.map_or("chat.general", |_| "dm.ann.bob");
        body["id"] = json!(format!("{subject}-second"));
        body["derived"] = json!(false);
        append(&bootstrap, &format!("change.{subject}"), body).await;
    }
    assert_eq!(unread(&client, "bob").await, (vec![of("dm.ann.bob", 1)], 1));
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_quiet_room_with_news_is_not_hidden_by_hundreds_of_busy_ones() {
    let world = World::builder().administrator().start().await;
    let function = start(&world).await;
    let client = world.client("publisher").await;
    let database = world.database().await;
    set_ack_floor(&world, 2_000).await;
    // Kim has read three rooms, then six hundred others; then somebody writes in the three.
    sqlx::raw_sql(
        "insert into rooms (name) select 'q' || n from generate_series(0, 2) n union all
         select 'busy-' || n from generate_series(1, 600) n;
         insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
         select row_number() over (order by id), id, 'eve', 'old-' || id, false, 'hello', now(),
             now() from rooms;
         insert into receipts select 'kim', rooms.name, seq from messages join rooms
             on rooms.id = room_id;
         insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
         select 1000 + id, id, 'eve', 'new-' || id, false, 'hello', now(), now() from rooms
             where name like 'q%'",
    )
    .execute(&database)
    .await
    .unwrap();
    let found = whole_unread(&client, "kim").await;
    let mut rooms: Vec<(&str, u64)> = found
        .unread
        .iter()
        .map(|one| (one.room.as_str(), one.count))
        .collect();
    rooms.sort_unstable();
    assert_eq!(rooms, [("q0", 1), ("q1", 1), ("q2", 1)]);
    assert_eq!(found.total, 3);
    function.stop().await.unwrap();
}
