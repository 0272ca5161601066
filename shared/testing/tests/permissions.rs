//! Each function's user can do its work and nothing else. All other tests show that it can do its
//! work; these show the rest.
//!
//! `SCROLLBACK_WRITE=1 cargo test -p testing --test permissions` writes into `nats/accounts.conf`
//! what follows from the table of endpoints: the functions' subscriptions, the user of a new
//! function, and the requests that callers may publish.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

#[path = "permissions/accounts.rs"]
mod accounts;
mod table;

use std::collections::BTreeSet;

use protocol::endpoints::{ENDPOINTS, Role};
use testing::{RawClient, World};

use accounts::Accounts;
use table::{callable_by, example, functions};

/// Subjects that are no requests: those of the stream, of events, of discovery, of the servers.
const OTHER_SUBJECTS: &[&str] = &[
    "chat.general",
    "admin.alerts",
    "dm.alice.bob",
    "change.chat.general",
    "live.chat.general",
    "events.v1.chat.general",
    "scrollback.outbox",
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

/// Which of [`OTHER_SUBJECTS`] a user may publish to.
fn permitted(user: &str) -> &'static [&'static str] {
    match user {
        "stream-bootstrap" => &[
            "chat.general",
            "admin.alerts",
            "dm.alice.bob",
            "change.chat.general",
            "$JS.API.STREAM.PURGE.CHAT_MESSAGES",
            "$JS.API.STREAM.CREATE.CHAT_MESSAGES",
            "$JS.API.STREAM.MSG.GET.CHAT_EVENTS",
            // It removes messages that are no events.
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
        // It recovers messages that no client can parse, and erases deleted texts.
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
        "publisher" => &["chat.general", "admin.alerts", "dm.alice.bob"],
        "operator" => &[
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
    let requests: Vec<String> = ENDPOINTS.iter().map(example).collect();
    for user in world.nats().users() {
        let mut allowed: BTreeSet<String> = callable_by(user).map(example).collect();
        allowed.extend(permitted(user).iter().map(|&subject| subject.to_owned()));
        let others = OTHER_SUBJECTS.iter().copied();
        for subject in requests.iter().map(String::as_str).chain(others) {
            let mut client = RawClient::connect(world.nats(), user).await;
            client.publish_raw(subject, None, None, b"").await;
            let refused = client.flush().await.is_err();
            assert_eq!(
                refused,
                !allowed.contains(subject),
                "{user} publishing to {subject}"
            );
        }
    }
}

/// Patterns that nobody may subscribe to, not even a function to its own requests: it hears those
/// only as one of its queue group.
fn forbidden_subscriptions() -> BTreeSet<String> {
    let fixed = [
        ">",
        "_INBOX.>",
        "chat.*",
        "dm.*.*",
        "$JS.>",
        "$SRV.>",
        "scrollback.>",
    ];
    let mut found: BTreeSet<String> = fixed.map(str::to_owned).into();
    for row in ENDPOINTS {
        found.extend([
            row.permission(),
            row.template.subscription(),
            row.template.wildcard(),
        ]);
    }
    found
}

#[tokio::test]
async fn nobody_hears_what_is_not_theirs() {
    let world = World::bare().await;
    let users = world.nats().users();
    for user in users {
        let mut subjects = forbidden_subscriptions();
        let others = users.iter().filter(|other| *other != user);
        subjects.extend(others.map(|other| format!("_INBOX.{other}.>")));
        let reads_live = [Role::User, Role::Operator].map(Role::nats_user);
        if !reads_live.contains(&user.as_str()) {
            subjects.extend(["live.>", "events.v1.>"].map(str::to_owned));
        }
        for subject in subjects {
            let mut client = RawClient::connect(world.nats(), user).await;
            client.subscribe(&subject).await;
            assert!(
                client.flush().await.is_err(),
                "{user} subscribing to {subject}"
            );
        }
        let mut client = RawClient::connect(world.nats(), user).await;
        client.subscribe(&format!("_INBOX.{user}.>")).await;
        client.flush().await.unwrap();
    }
}

#[test]
fn accounts_grant_what_the_table_says() {
    let mut accounts = Accounts::read();
    let users = functions();
    let roles = [Role::User, Role::Operator].map(Role::nats_user);
    if std::env::var_os("SCROLLBACK_WRITE").is_some() {
        for function in &users {
            accounts.renew_function(function);
        }
        for user in roles {
            accounts.renew_caller(user);
        }
        accounts.write();
    }
    let mut differences = Vec::new();
    for function in &users {
        differences.extend(accounts.differences_of_function(function));
    }
    for user in roles {
        differences.extend(accounts.differences_of_caller(user));
    }
    assert!(
        differences.is_empty(),
        "nats/accounts.conf differs from the table of endpoints:\n{}\n\
         SCROLLBACK_WRITE=1 cargo test -p testing --test permissions adds what is missing",
        differences.join("\n")
    );
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
