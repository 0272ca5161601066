//! Each function's user can do its work and nothing else. That it can do its work, every other test shows.

use testing::{RawClient, World};

/// What nobody but its owner may publish to.
const FOREIGN: &[&str] = &[
    "chat.general",
    "admin.alerts",
    "dm.alice.bob",
    "change.chat.general",
    "live.chat.general",
    "events.v1.chat.general",
    "scrollback.outbox",
    "chat.send.alice.general",
    "dm.send.alice.bob",
    "chat.history.general",
    "dm.history.alice.bob",
    "chat.sync.general",
    "dm.sync.alice.bob",
    "chat.delete.alice.general",
    "dm.delete.alice.bob",
    "chat.inbox.alice",
    "chat.delivered.alice",
    "chat.read.alice.general",
    "dm.read.alice.bob",
    "chat.unread.alice",
    "bootstrap.apply",
    "deadletters.retry",
    "retention.erase",
    "$SRV.PING",
    "$SRV.PING.get-history.abc",
    "$SRV.PING.send-message.abc",
    "$SRV.INFO.get-history.abc",
    "$SRV.STATS.get-history.abc",
    "$JS.API.STREAM.DELETE.CHAT_MESSAGES",
    "$JS.API.STREAM.PURGE.CHAT_MESSAGES",
    "$JS.API.STREAM.CREATE.CHAT_MESSAGES",
    "$JS.API.STREAM.MSG.DELETE.CHAT_MESSAGES",
    "$JS.API.STREAM.SNAPSHOT.CHAT_MESSAGES",
    "$JS.API.STREAM.MSG.GET.CHAT_EVENTS",
    "$JS.API.STREAM.MSG.DELETE.CHAT_EVENTS",
    "$JS.API.STREAM.PURGE.CHAT_EVENTS",
    "$JS.API.CONSUMER.DELETE.CHAT_MESSAGES.persist-message",
    "$JS.API.CONSUMER.CREATE.CHAT_MESSAGES",
    "$JS.API.CONSUMER.RESET.CHAT_MESSAGES.persist-message",
    "$SYS.REQ.SERVER.PING",
];

/// What a user may publish to of the above.
fn own(user: &str) -> &'static [&'static str] {
    match user {
        "stream-bootstrap" => &[
            "chat.general",
            "admin.alerts",
            "dm.alice.bob",
            "change.chat.general",
            "$JS.API.STREAM.PURGE.CHAT_MESSAGES",
            "$JS.API.STREAM.CREATE.CHAT_MESSAGES",
            "$JS.API.STREAM.MSG.GET.CHAT_EVENTS",
            // What is no event is removed.
            "$JS.API.STREAM.MSG.DELETE.CHAT_EVENTS",
            "$JS.API.CONSUMER.RESET.CHAT_MESSAGES.persist-message",
        ],
        "manage-dead-letters" => &[
            "chat.general",
            "admin.alerts",
            "dm.alice.bob",
            "change.chat.general",
        ],
        "send-message" => &["chat.general", "dm.alice.bob", "$SRV.PING.send-message.abc"],
        "get-history" => &["$SRV.PING.get-history.abc"],
        // The rescue of messages no client can read, and the erasing of deleted texts.
        "persist-message" => &[
            "$JS.API.STREAM.MSG.DELETE.CHAT_MESSAGES",
            "scrollback.outbox",
        ],
        "track-receipts" => &["scrollback.outbox"],
        "relay-outbox" => &[
            "events.v1.chat.general",
            "$JS.API.STREAM.MSG.GET.CHAT_EVENTS",
        ],
        "delete-message" => &[
            "change.chat.general",
            "$JS.API.STREAM.MSG.DELETE.CHAT_MESSAGES",
        ],
        "enforce-retention" => &[
            "change.chat.general",
            "$JS.API.STREAM.PURGE.CHAT_MESSAGES",
            "$JS.API.STREAM.MSG.DELETE.CHAT_MESSAGES",
        ],
        "publisher" => &[
            "chat.general",
            "admin.alerts",
            "dm.alice.bob",
            "chat.send.alice.general",
            "dm.send.alice.bob",
            "chat.history.general",
            "dm.history.alice.bob",
            "chat.sync.general",
            "dm.sync.alice.bob",
            "chat.delete.alice.general",
            "dm.delete.alice.bob",
            "chat.inbox.alice",
            "chat.delivered.alice",
            "chat.read.alice.general",
            "dm.read.alice.bob",
            "chat.unread.alice",
        ],
        "operator" => &[
            "chat.history.general",
            "bootstrap.apply",
            "deadletters.retry",
            "retention.erase",
            "$SRV.PING",
            "$SRV.PING.get-history.abc",
            "$SRV.PING.send-message.abc",
            "$SRV.INFO.get-history.abc",
            "$SRV.STATS.get-history.abc",
        ],
        _ => &[],
    }
}

#[tokio::test]
async fn nobody_publishes_what_is_not_theirs() {
    let world = World::bare().await;
    for user in world.nats().users() {
        for &subject in FOREIGN {
            let mut client = RawClient::connect(world.nats(), user).await;
            client.publish_raw(subject, None, None, b"").await;
            let refused = client.flush().await.is_err();
            assert_eq!(
                refused,
                !own(user).contains(&subject),
                "{user} publishing to {subject}"
            );
        }
    }
}

#[tokio::test]
async fn nobody_hears_what_is_not_theirs() {
    let world = World::bare().await;
    let users: Vec<&String> = world.nats().users().iter().collect();
    for user in &users {
        let mut subjects: Vec<String> = [
            ">",
            "_INBOX.>",
            "chat.*",
            "dm.*.*",
            "$JS.>",
            "$SRV.>",
            "chat.history.*",
            "chat.send.>",
            "chat.sync.>",
            "chat.delete.>",
            "chat.inbox.>",
            "chat.delivered.>",
            "chat.read.>",
            "chat.unread.>",
            "bootstrap.*",
            "deadletters.>",
            "retention.*",
            "scrollback.>",
        ]
        .map(str::to_owned)
        .to_vec();
        subjects.extend(
            users
                .iter()
                .filter(|other| other != &user)
                .map(|other| format!("_INBOX.{other}.>")),
        );
        if !matches!(user.as_str(), "publisher" | "operator") {
            subjects.extend(["live.>", "events.v1.>"].map(str::to_owned));
        }
        for subject in subjects {
            let mut client = RawClient::connect(world.nats(), user).await;
            client.subscribe(&subject).await;
            assert!(
                client.flush().await.is_err(),
                "{user} listening to {subject}"
            );
        }
        let mut client = RawClient::connect(world.nats(), user).await;
        client.subscribe(&format!("_INBOX.{user}.>")).await;
        client.flush().await.unwrap();
    }
}

#[tokio::test]
async fn nobody_comes_in_without_a_password() {
    let world = World::bare().await;
    let anonymous = async_nats::ConnectOptions::new()
        .connect(world.nats().url())
        .await;
    assert!(anonymous.is_err());
    let guessed =
        async_nats::ConnectOptions::with_user_and_password("publisher".into(), "guess".into())
            .connect(world.nats().url())
            .await;
    assert!(guessed.is_err());
}
