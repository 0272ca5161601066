//! PostgreSQL, or a proxy before it, ends idle sessions; a database is read-only for a moment. No
//! request fails because of it afterwards, and nothing is left behind.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use async_nats::{Client, Subscriber};
use futures::StreamExt;
use futures::future::join_all;
use serde_json::{Value, json};
use sqlx::PgPool;

use protocol::endpoints::{DEADLETTERS_LIST, DELETE, DM_INBOX, HISTORY, READ, SEND, SYNC, UNREAD};
use protocol::header;
use testing::{Process, SOON, World, eventually};

/// The functions that have sessions.
const FUNCTIONS: [&str; 8] = [
    "persist-message",
    "get-history",
    "sync-messages",
    "send-message",
    "track-receipts",
    "delete-message",
    "manage-dead-letters",
    "relay-outbox",
];

const OURS: &str = "application_name in ('persist-message', 'get-history', 'sync-messages',
    'send-message', 'track-receipts', 'delete-message', 'manage-dead-letters', 'relay-outbox')";

struct Chat {
    world: World,
    client: Client,
    operator: Client,
    database: PgPool,
    _functions: Vec<Process>,
}

impl Chat {
    async fn start() -> Chat {
        let world = World::with_own_postgres().await;
        let functions = join_all(FUNCTIONS.map(|name| world.spawn(name))).await;
        let (client, operator) = tokio::join!(world.client("publisher"), world.client("operator"));
        let database = world.database().await;
        Chat {
            world,
            client,
            operator,
            database,
            _functions: functions,
        }
    }

    async fn ask(&self, client: &Client, subject: String, body: Value) -> Value {
        let reply = client
            .request(subject.clone(), body.to_string().into())
            .await
            .unwrap();
        let code = reply
            .headers
            .as_ref()
            .and_then(|headers| headers.get(header::SERVICE_ERROR_CODE));
        assert!(
            code.is_none(),
            "{subject}: {}",
            String::from_utf8_lossy(&reply.payload)
        );
        serde_json::from_slice(&reply.payload).unwrap()
    }

    /// Sends one request of each kind. Each has to be answered at the first attempt. Returns the
    /// position of the message sent.
    async fn one_of_each(&self, id: &str) -> u64 {
        let sent = self
            .ask(
                &self.client,
                SEND.subject(&["ann", "room"]),
                json!({"text": "x", "id": id}),
            )
            .await;
        let seq = sent["seq"].as_u64().unwrap();
        let body = |body| body;
        let requests = [
            (
                READ.subject(&["bob", "room"]),
                body(json!({ "through": seq })),
            ),
            (UNREAD.subject(&["bob"]), json!({})),
            (DM_INBOX.subject(&["bob"]), json!({})),
            (HISTORY.subject(&["room"]), json!({"limit": 10})),
            (SYNC.subject(&["room"]), json!({"after": 0})),
        ];
        for (subject, body) in requests {
            self.ask(&self.client, subject, body).await;
        }
        self.ask(
            &self.client,
            DELETE.subject(&["ann", "room"]),
            json!({ "seq": seq }),
        )
        .await;
        self.ask(&self.operator, DEADLETTERS_LIST.subject(&[]), json!({}))
            .await;
        seq
    }

    /// Eight of each at once, so that every function opens all the sessions it may have.
    async fn warm(&self) {
        join_all(
            (0..8).map(|number| async move { self.one_of_each(&format!("warm-{number}")).await }),
        )
        .await;
    }

    async fn sessions(&self) -> i64 {
        let sql = format!("select count(*) from pg_stat_activity where {OURS}");
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
            .fetch_one(&self.database)
            .await
            .unwrap()
    }

    async fn end_sessions(&self) {
        self.execute(&format!(
            "select pg_terminate_backend(pid) from pg_stat_activity where {OURS}"
        ))
        .await;
    }

    async fn execute(&self, sql: &str) {
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
            .execute(&self.database)
            .await
            .unwrap();
    }

    async fn stored(&self, seq: u64) {
        eventually("it is stored", SOON, async || {
            let stored =
                sqlx::query_scalar::<_, i64>("select count(*) from messages where seq = $1")
                    .bind(i64::try_from(seq).unwrap());
            (stored.fetch_one(&self.database).await.unwrap() == 1).then_some(())
        })
        .await;
    }
}

/// Waits for the event of the message at `seq`.
async fn published(events: &mut Subscriber, seq: u64) {
    let heard = async {
        loop {
            let event: Value =
                serde_json::from_slice(&events.next().await.unwrap().payload).unwrap();
            if event["seq"] == seq {
                return;
            }
        }
    };
    tokio::time::timeout(SOON, heard)
        .await
        .unwrap_or_else(|_| panic!("message {seq} has no event"));
}

#[tokio::test]
async fn sessions_that_end_while_idle_cost_nobody_an_answer() {
    let chat = Chat::start().await;
    let mut events = chat
        .world
        .client("operator")
        .await
        .subscribe("events.v1.chat.room")
        .await
        .unwrap();
    for round in 0..2 {
        chat.warm().await;
        chat.end_sessions().await;
        let seq = chat.one_of_each(&format!("ended-{round}")).await;
        chat.stored(seq).await;
        published(&mut events, seq).await;
    }
    chat.execute("alter role scrollback set idle_session_timeout = '100ms'")
        .await;
    chat.end_sessions().await;
    for round in 0..3 {
        let seq = chat.one_of_each(&format!("idle-{round}")).await;
        chat.stored(seq).await;
        published(&mut events, seq).await;
        eventually("hardly any session is left", SOON, async || {
            (chat.sessions().await <= 2).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_database_that_was_read_only_for_a_moment_is_used_again_at_once() {
    let chat = Chat::start().await;
    let mut events = chat
        .world
        .client("operator")
        .await
        .subscribe("events.v1.chat.room")
        .await
        .unwrap();
    chat.warm().await;
    chat.execute("alter role scrollback set default_transaction_read_only = on")
        .await;
    chat.end_sessions().await;
    // Messages are sent but not stored, cursors are refused, and readers are served.
    let sent = chat
        .ask(
            &chat.client,
            SEND.subject(&["ann", "room"]),
            json!({"text": "x"}),
        )
        .await;
    let seq = sent["seq"].as_u64().unwrap();
    eventually("somebody noticed", SOON, async || {
        let reply = chat
            .client
            .request(
                READ.subject(&["bob", "room"]),
                json!({ "through": seq }).to_string().into(),
            )
            .await
            .unwrap();
        reply
            .headers
            .is_some_and(|headers| headers.get(header::SERVICE_ERROR_CODE).is_some())
            .then_some(())
    })
    .await;
    for _ in 0..4 {
        chat.ask(
            &chat.client,
            HISTORY.subject(&["room"]),
            json!({"limit": 10}),
        )
        .await;
        chat.ask(&chat.client, UNREAD.subject(&["bob"]), json!({}))
            .await;
    }
    chat.execute(
        "set default_transaction_read_only = off; \
         alter role scrollback reset default_transaction_read_only",
    )
    .await;
    let marked = chat
        .ask(
            &chat.client,
            READ.subject(&["bob", "room"]),
            json!({ "through": seq }),
        )
        .await;
    assert_eq!(marked["moved"], true, "{marked}");
    let begun = std::time::Instant::now();
    chat.stored(seq).await;
    published(&mut events, seq).await;
    assert!(begun.elapsed() < SOON / 2, "{:?}", begun.elapsed());
}
