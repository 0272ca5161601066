//! Clients that were away, on real servers; the worker is the real binary.

mod expiry;
mod inbox;
mod reads;

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::Client;
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;

use crate::function;
use base::seq::Seq;
use protocol::change::{ChangeType, Mode};
use protocol::endpoints::{DM_SYNC, SYNC};
use protocol::sync::SyncPage;
use protocol::{header, js_api};
use service::config::Vars;
use service::function::Running;
use testing::{SOON, World, eventually};
use timeline::chat::open_database;

async fn start(world: &World) -> Running {
    function()
        .start(Vars::from_pairs(world.vars("sync-messages")))
        .await
        .unwrap()
}

async fn ask_raw(
    client: &Client,
    subject: String,
    body: &str,
) -> Result<(SyncPage, String), (u64, String)> {
    let reply = client
        .request(subject, body.to_owned().into())
        .await
        .unwrap();
    let header = |name: &str| {
        reply
            .headers
            .as_ref()
            .and_then(|headers| headers.get(name))
            .map(|value| value.as_str().to_owned())
    };
    if let Some(reason) = header(header::SERVICE_ERROR) {
        return Err((
            header(header::SERVICE_ERROR_CODE).unwrap().parse().unwrap(),
            reason,
        ));
    }
    Ok((
        serde_json::from_slice(&reply.payload).unwrap(),
        header(header::SOURCE).unwrap(),
    ))
}

async fn ask(client: &Client, after: u64, limit: u32) -> (SyncPage, String) {
    ask_raw(
        client,
        SYNC.subject(&["general"]),
        &json!({"after": after, "limit": limit}).to_string(),
    )
    .await
    .unwrap()
}

/// A client: the messages that it holds, and its cursor.
#[derive(Debug, Default, Clone, PartialEq)]
struct Holds {
    messages: BTreeMap<u64, (String, bool)>,
    through: u64,
}

impl Holds {
    /// Applies pages until there are no more.
    async fn sync(&mut self, client: &Client, limit: u32) {
        loop {
            let (page, _) = ask(client, self.through, limit).await;
            assert!(
                page.messages.len() + page.changes.len() <= limit as usize,
                "{page:?}"
            );
            assert!(
                page.messages.is_sorted_by(|one, next| one.seq < next.seq),
                "{page:?}"
            );
            assert!(
                page.changes.is_sorted_by(|one, next| one.seq < next.seq),
                "{page:?}"
            );
            let within = |seq: Seq| (self.through + 1..=page.through.get()).contains(&seq.get());
            assert!(
                page.messages.iter().all(|message| within(message.seq)),
                "{page:?}"
            );
            assert!(
                page.changes.iter().all(|change| within(change.seq)),
                "{page:?}"
            );
            for message in page.messages {
                self.messages
                    .insert(message.seq.get(), (message.text, message.deleted));
            }
            for change in page.changes {
                self.delete(change.target.get());
            }
            assert!(
                !page.more || page.through.get() > self.through,
                "a page that brings nothing"
            );
            self.through = page.through.get();
            if !page.more {
                return;
            }
        }
    }

    fn delete(&mut self, target: u64) {
        // Messages before the client's first cursor do not concern it.
        if let Some(held) = self.messages.get_mut(&target) {
            *held = (String::new(), true);
        }
    }
}

/// Publishes and deletes, and holds what a client that was connected all the time holds.
struct Live<'a> {
    publisher: &'a Client,
    bootstrap: &'a Client,
    ids: BTreeMap<u64, String>,
    holds: Holds,
}

impl Live<'_> {
    async fn say(&mut self, text: &str) -> u64 {
        // Every third message has no id of its own.
        let id =
            (!self.holds.through.is_multiple_of(3)).then(|| format!("id-{}", self.holds.through));
        let body = json!({"user": "ann", "text": text, "id": id}).to_string();
        let seq = append(self.publisher, "chat.general", &body).await;
        self.ids
            .insert(seq, id.unwrap_or_else(|| format!("seq:{seq}")));
        self.holds.messages.insert(seq, (text.to_owned(), false));
        self.holds.through = seq;
        seq
    }

    async fn delete(&mut self, target: u64) -> u64 {
        let id = &self.ids[&target];
        let seq = append(
            self.bootstrap,
            "change.chat.general",
            &deletion(target, id, "soft").to_string(),
        )
        .await;
        self.holds.delete(target);
        self.holds.through = seq;
        seq
    }
}

fn deletion(target: u64, id: &str, mode: &str) -> Value {
    json!({
        "type": "delete", "target": target, "id": id, "user": "ann",
        "derived": id.starts_with("seq:"), "timestamp": 1_700_000_000_000_i64,
        "received": 4_000_000_000_000_i64, "mode": mode, "by": "ann",
    })
}

async fn append(client: &Client, subject: &str, body: &str) -> u64 {
    let ack = client
        .request(subject.to_owned(), body.to_owned().into())
        .await
        .unwrap();
    serde_json::from_slice::<Value>(&ack.payload).unwrap()["seq"]
        .as_u64()
        .expect("an acknowledgement")
}

async fn source(client: &Client, wanted: &str) {
    eventually(&format!("an answer from {wanted}"), SOON, async || {
        (ask(client, 0, 500).await.1 == wanted).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_client_that_was_away_holds_what_a_client_that_was_there_holds() {
    let world = World::with_own_postgres().await;
    let function = start(&world).await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let mut live = Live {
        publisher: &publisher,
        bootstrap: &bootstrap,
        ids: BTreeMap::new(),
        holds: Holds::default(),
    };
    // Three clients: one syncs all the time in small pages, one now and then, one only at the end
    // of each round.
    let mut often = Holds::default();
    let mut seldom = Holds::default();
    let mut worker = None;
    for round in 0..4_u64 {
        let mut said = Vec::new();
        for number in 0..40_u64 {
            said.push(live.say(&format!("{round}/{number}")).await);
            append(
                &publisher,
                "chat.other",
                r#"{"user":"bob","text":"elsewhere"}"#,
            )
            .await;
            if number % 4 == 3 {
                live.delete(said[(number / 2) as usize]).await;
            }
            if number % 16 == 15 {
                let first = *live.holds.messages.keys().next().unwrap();
                live.delete(first + round * 2).await;
            }
            if number % 5 == 0 {
                often.sync(&publisher, 3).await;
                assert_eq!(often.messages, live.holds.messages);
            }
        }
        seldom.sync(&publisher, 7).await;
        assert_eq!(seldom.messages, live.holds.messages);
        for limit in [1, 50, 500] {
            let mut anew = Holds::default();
            anew.sync(&publisher, limit).await;
            assert_eq!(
                anew.messages, live.holds.messages,
                "round {round}, limit {limit}"
            );
        }
        // First nothing is stored, then the worker runs, then PostgreSQL is away, then it is back.
        match round {
            0 => worker = Some(world.spawn("persist-message").await),
            1 => {
                source(&publisher, "index").await;
                world.postgres().stop().await;
                source(&publisher, "log").await;
            }
            2 => world.postgres().start().await,
            _ => source(&publisher, "index").await,
        }
    }
    let mut anew = Holds::default();
    anew.sync(&publisher, 9).await;
    assert_eq!(
        anew.messages, live.holds.messages,
        "all of it from PostgreSQL"
    );
    drop(worker);
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_page_has_what_happened_after_the_cursor_and_nothing_else() {
    let world = World::start().await;
    let function = start(&world).await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let mut live = Live {
        publisher: &publisher,
        bootstrap: &bootstrap,
        ids: BTreeMap::new(),
        holds: Holds::default(),
    };
    let one = live.say("one").await;
    let two = live.say("two").await;
    let change = live.delete(one).await;
    let check = async |from: &str| {
        let (page, source) = ask(&publisher, one, 50).await;
        assert_eq!(source, from);
        assert_eq!(
            page.messages
                .iter()
                .map(|message| message.seq.get())
                .collect::<Vec<u64>>(),
            [two]
        );
        let entry = &page.changes[0];
        assert_eq!(
            (page.changes.len(), entry.seq.get(), entry.target.get()),
            (1, change, one)
        );
        assert_eq!(
            (
                entry.kind,
                entry.mode,
                entry.user.as_str(),
                entry.by.as_str()
            ),
            (ChangeType::Delete, Mode::Soft, "ann", "ann")
        );
        assert_eq!((page.through.get(), page.more), (change, false));
        // At the end of the stream, and beyond it.
        for after in [change, change + 1_000, i64::MAX as u64] {
            let (page, _) = ask(&publisher, after, 50).await;
            assert_eq!(
                (
                    page.messages.len(),
                    page.changes.len(),
                    page.through.get(),
                    page.more
                ),
                (0, 0, change, false),
                "after {after}"
            );
        }
    };
    check("both").await;
    let _worker = world.spawn("persist-message").await;
    source(&publisher, "index").await;
    check("index").await;
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_message_erased_before_it_was_stored_keeps_its_place() {
    let world = World::start().await;
    let function = start(&world).await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let mut live = Live {
        publisher: &publisher,
        bootstrap: &bootstrap,
        ids: BTreeMap::new(),
        holds: Holds::default(),
    };
    let one = live.say("one").await;
    let two = live.say("two").await;
    live.delete(two).await;
    let erased = world
        .client("persist-message")
        .await
        .request(
            js_api::MESSAGE_DELETE,
            json!({ "seq": two }).to_string().into(),
        )
        .await;
    assert_eq!(
        serde_json::from_slice::<Value>(&erased.unwrap().payload).unwrap()["success"],
        true
    );
    for _ in 0..2 {
        let mut anew = Holds::default();
        anew.sync(&publisher, 1).await;
        assert_eq!(anew.messages, live.holds.messages);
        assert_eq!(anew.messages[&one].0, "one");
        let _worker = world.spawn("persist-message").await;
        source(&publisher, "index").await;
    }
    function.stop().await.unwrap();
}

#[tokio::test]
async fn pages_end_before_max_payload() {
    let world = World::start().await;
    let function = start(&world).await;
    let publisher = world.client("publisher").await;
    let mut said = Holds::default();
    for number in 0..60 {
        let text = format!("{number}{}", "\u{1}".repeat(10_000));
        let seq = append(
            &publisher,
            "chat.general",
            &json!({"user": "ann", "text": text}).to_string(),
        )
        .await;
        said.through = seq;
        said.messages.insert(seq, (text, false));
    }
    let (page, _) = ask(&publisher, 0, 500).await;
    assert!(
        page.more && (2..60).contains(&page.messages.len()),
        "{} messages",
        page.messages.len()
    );
    let mut anew = Holds::default();
    anew.sync(&publisher, 500).await;
    assert_eq!(anew.messages, said.messages);
    let _worker = world.spawn("persist-message").await;
    source(&publisher, "index").await;
    let mut anew = Holds::default();
    anew.sync(&publisher, 500).await;
    assert_eq!(anew.messages, said.messages);
    function.stop().await.unwrap();
}

#[tokio::test]
async fn duplicates_of_stored_messages_end_no_page() {
    let world = World::start().await;
    let function = start(&world).await;
    let publisher = world.client("publisher").await;
    let first = append(
        &publisher,
        "chat.general",
        r#"{"user":"ann","text":"one","id":"a"}"#,
    )
    .await;
    let worker = world.spawn("persist-message").await;
    source(&publisher, "index").await;
    assert!(worker.terminate().await.success());
    for _ in 0..5 {
        append(
            &publisher,
            "chat.general",
            r#"{"user":"ann","text":"one","id":"a"}"#,
        )
        .await;
    }
    let last = append(
        &publisher,
        "chat.general",
        r#"{"user":"ann","text":"two","id":"b"}"#,
    )
    .await;
    let mut anew = Holds::default();
    anew.sync(&publisher, 1).await;
    assert_eq!(
        anew.messages.keys().copied().collect::<Vec<u64>>(),
        [first, last]
    );
    function.stop().await.unwrap();
}

#[tokio::test]
async fn two_users_sync_one_conversation() {
    let world = World::start().await;
    let function = start(&world).await;
    let publisher = world.client("publisher").await;
    let bootstrap = world.client("stream-bootstrap").await;
    let one = append(&publisher, "dm.ann.bob", r#"{"user":"ann","text":"psst"}"#).await;
    let two = append(&publisher, "dm.bob.ann", r#"{"user":"bob","text":"what?"}"#).await;
    append(
        &publisher,
        "dm.ann.carol",
        r#"{"user":"ann","text":"not for bob"}"#,
    )
    .await;
    let mut body = deletion(one, &format!("seq:{one}"), "soft");
    body["to"] = "bob".into();
    append(&bootstrap, "change.dm.ann.bob", &body.to_string()).await;
    let pages = async |who: &str, peer: &str| {
        let (page, _) = ask_raw(&publisher, DM_SYNC.subject(&[who, peer]), r#"{"after":0}"#)
            .await
            .unwrap();
        let messages: Vec<(u64, String, bool)> = page
            .messages
            .into_iter()
            .map(|message| (message.seq.get(), message.text, message.deleted))
            .collect();
        (messages, page.changes.len())
    };
    let wanted = (
        vec![(one, String::new(), true), (two, "what?".to_owned(), false)],
        1,
    );
    assert_eq!(pages("ann", "bob").await, wanted);
    assert_eq!(pages("bob", "ann").await, wanted);
    let _worker = world.spawn("persist-message").await;
    eventually("it is stored", SOON, async || {
        let (_, source) = ask_raw(
            &publisher,
            DM_SYNC.subject(&["bob", "ann"]),
            r#"{"after":0}"#,
        )
        .await
        .unwrap();
        (source == "index").then_some(())
    })
    .await;
    assert_eq!(pages("bob", "ann").await, wanted);
    function.stop().await.unwrap();
}

#[tokio::test]
async fn a_bad_request_names_what_is_wrong() {
    let world = World::start().await;
    let function = start(&world).await;
    let publisher = world.client("publisher").await;
    let too_long = "r".repeat(65);
    for (names, body, hint) in [
        ("general", "", "after is missing"),
        ("general", r#"{"after":"1"}"#, "after must be"),
        ("general", r#"{"after":1,"limit":1000}"#, "limit must be"),
        ("general", "[1]", "a JSON object"),
        ("general", "\u{0}", "a JSON object"),
        ("a.b", r#"{"after":0}"#, "a room is"),
        (too_long.as_str(), r#"{"after":0}"#, "a room is"),
    ] {
        let (code, reason) = ask_raw(&publisher, format!("chat.sync.{names}"), body)
            .await
            .unwrap_err();
        assert_eq!(code, 400, "{names} {body}");
        assert!(reason.contains(hint), "{names} {body}: {reason}");
    }
    let (page, _) = ask_raw(&publisher, SYNC.subject(&["nowhere"]), r#"{"after":0}"#)
        .await
        .unwrap();
    assert_eq!(
        (page.messages.len(), page.more),
        (0, false),
        "nothing there is no error"
    );
    function.stop().await.unwrap();
}

/// An inbox costs as much as it shows: no plan, for any limit, may read the rooms of other users.
#[tokio::test]
async fn an_inbox_reads_no_room_but_its_own() {
    let world = World::start().await;
    world.store_conversations().await;
    // In a session like the function's: one plan serves every limit.
    let vars = Vars::from_pairs(world.vars("sync-messages"));
    let connected = open_database(&vars, "test").unwrap();
    let plan = connected.run(SOON, async |connection| {
        let prepare = format!(
            "prepare page (text, bigint, bigint, bigint, bigint) as {}",
            crate::query::INBOX
        );
        sqlx::raw_sql(AssertSqlSafe(prepare))
            .execute(&mut *connection)
            .await?;
        sqlx::query_scalar::<_, String>("explain execute page ('b-7', 0, 101, 1000000, 100000)")
            .fetch_all(connection)
            .await
    });
    let plan = plan.await.unwrap().join("\n");
    // The table `retention` is read once, for conversations that have a row of their own.
    let scans = plan.matches("Seq Scan").count() - plan.matches("Seq Scan on retention").count();
    assert!(
        plan.contains("messages_recipient_seq_idx") && scans == 0,
        "{plan}"
    );
}

/// A generic plan expects far more rows than there are, and compiling it takes longer than running
/// it.
#[tokio::test]
async fn no_statement_is_compiled() {
    let world = World::start().await;
    let vars = Vars::from_pairs(world.vars("sync-messages"));
    let connected = open_database(&vars, "test").unwrap();
    let plan = connected.run(SOON, async |connection| {
        // Expensive enough that PostgreSQL would compile it.
        let expensive = "explain select count(*) from generate_series(1, 100000000) as a,
            generate_series(1, 100000000) as b";
        sqlx::query_scalar::<_, String>(expensive)
            .fetch_all(connection)
            .await
    });
    let plan = plan.await.unwrap().join("\n");
    assert!(!plan.contains("JIT"), "{plan}");
}
