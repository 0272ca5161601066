//! `audit` as an operator runs it: the binary, with the operator's rights, on real servers.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::process::Output;

use async_nats::Client;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::process::Command;

use testing::{SOON, World, eventually};

fn audit(world: &World, user: &str, arguments: &[&str], extra: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_audit"));
    command
        .args(arguments)
        .env_clear()
        .envs(world.vars(user))
        .env_remove("DATABASE_URL")
        .envs(extra.iter().copied())
        .kill_on_drop(true);
    command
}

/// Exit code, and what was printed and complained.
async fn run(mut command: Command) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().await.unwrap();
    (
        status.code().unwrap(),
        String::from_utf8(stdout).unwrap(),
        String::from_utf8(stderr).unwrap(),
    )
}

/// Messages 1 to `count`, the last one a dead letter.
async fn say(publisher: &Client, count: u64) {
    for number in 1..=count {
        let body = if number == count {
            "no json".to_owned()
        } else {
            json!({"user": "ann", "text": number.to_string()}).to_string()
        };
        publisher
            .request("chat.general", body.into())
            .await
            .unwrap();
    }
}

async fn stored(database: &PgPool, count: i64) {
    eventually("all is stored", SOON, async || {
        let rows: i64 = sqlx::query_scalar(
            "select (select count(*) from messages) + (select count(*) from dead_letters)",
        )
        .fetch_one(database)
        .await
        .unwrap();
        (rows == count).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_lost_projection_is_missed_and_stored_again() {
    let world = World::builder().administrator().start().await;
    let (_bootstrap, _worker) = tokio::join!(
        world.spawn("stream-bootstrap"),
        world.spawn("persist-message")
    );
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    say(&publisher, 30).await;
    stored(&database, 30).await;
    let (code, shown, complaint) = run(audit(&world, "operator", &[], &[])).await;
    assert_eq!(code, 0, "{shown}{complaint}");
    for line in [
        "30 messages in the stream, sequences 1 to 30:",
        "  29  stored\n",
        "   1  dead letters: not_json\n",
        "   0  MISSING\n",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }

    sqlx::raw_sql("drop schema public cascade; create schema public")
        .execute(&database)
        .await
        .unwrap();
    let (code, shown, complaint) = run(audit(&world, "operator", &["--replay", "0"], &[])).await;
    assert_eq!(code, 0, "{shown}{complaint}");
    assert!(
        shown.starts_with(
            "delivering 1 to 30 again; PostgreSQL held sequences up to 0\nstored again in "
        ),
        "{shown}"
    );
    assert!(
        shown.contains("  29  stored\n")
            && shown.contains("   0  MISSING\n")
            && !shown.contains("WARNING"),
        "{shown}"
    );

    // Damaged after the worker was through, no replay, and one is gone from both.
    sqlx::raw_sql("delete from messages")
        .execute(&database)
        .await
        .unwrap();
    let (code, shown, _) = run(audit(&world, "operator", &[], &[])).await;
    assert_eq!(code, 1);
    assert!(shown.contains("  29  MISSING\n"), "{shown}");
    let named = shown.lines().filter(|line| {
        line.ends_with(", chat.general: acknowledged, and neither stored nor a dead letter")
    });
    assert_eq!(named.count(), 20, "{shown}");
    sqlx::raw_sql("delete from dead_letters")
        .execute(&database)
        .await
        .unwrap();
    let purged = world
        .client("administrator")
        .await
        .request("$JS.API.STREAM.PURGE.CHAT_MESSAGES", r#"{"seq":11}"#.into())
        .await;
    assert_eq!(
        serde_json::from_slice::<Value>(&purged.unwrap().payload).unwrap()["purged"],
        10
    );
    let (code, shown, complaint) = run(audit(&world, "operator", &["--replay", "1"], &[])).await;
    assert_eq!(code, 0, "{shown}{complaint}");
    assert!(
        shown.contains("delivering 11 to 30 again")
            && shown.contains("WARNING: 1 to 10 is in neither PostgreSQL nor the stream"),
        "{shown}"
    );
    assert!(shown.contains("  19  stored\n"), "{shown}");
}

#[tokio::test]
async fn a_row_that_is_another_messages_is_no_success() {
    let world = World::start().await;
    let (_bootstrap, _worker) = tokio::join!(
        world.spawn("stream-bootstrap"),
        world.spawn("persist-message")
    );
    let publisher = world.client("publisher").await;
    let database = world.database().await;
    let twice = json!({"user": "ann", "text": "said twice", "id": "a-1"}).to_string();
    for _ in 0..2 {
        publisher
            .request("chat.general", twice.clone().into())
            .await
            .unwrap();
    }
    say(&publisher, 1).await;
    stored(&database, 2).await;
    // The second one is stored, under the first one's sequence; what stands in its place is wrong
    // all the same.
    sqlx::raw_sql(
        "insert into messages (seq, room_id, sender, id, derived, text, sent_at, received_at)
         select 2, room_id, 'zoe', id, derived, text, sent_at, received_at from messages",
    )
    .execute(&database)
    .await
    .unwrap();
    let (code, shown, _) = run(audit(&world, "operator", &[], &[])).await;
    assert_eq!(code, 1);
    assert!(shown.contains("   0  MISSING\n"), "{shown}");
    assert!(
        shown.ends_with("sequence 2, chat.general: another message is stored here\n"),
        "{shown}"
    );
}

#[tokio::test]
async fn what_is_in_the_way_is_named() {
    let world = World::start().await;
    let (code, _, complaint) = run(audit(&world, "operator", &[], &[])).await;
    assert_eq!(
        (code, complaint.as_str()),
        (
            1,
            "audit: nobody answers bootstrap.audit: is stream-bootstrap running?\n"
        )
    );
    let _bootstrap = world.spawn("stream-bootstrap").await;
    let (code, _, complaint) = run(audit(&world, "publisher", &[], &[])).await;
    assert_eq!(code, 1);
    assert!(
        complaint.contains("ask as the operator of nats/accounts.conf"),
        "{complaint}"
    );
    say(&world.client("publisher").await, 2).await;
    let (code, _, complaint) = run(audit(&world, "operator", &["--replay", "99"], &[])).await;
    assert_eq!(code, 1);
    assert!(
        complaint.contains("from 99 is beyond the stream's last sequence, 2"),
        "{complaint}"
    );
    let (code, _, complaint) = run(audit(
        &world,
        "operator",
        &["--replay", "0"],
        &[("REPLAY_STUCK_AFTER_MS", "300")],
    ))
    .await;
    assert_eq!(code, 1);
    assert!(
        complaint.contains("at sequence 0 of 2: are persist-message and PostgreSQL running?"),
        "{complaint}"
    );
    // Not stored yet is not missing.
    let (code, shown, _) = run(audit(&world, "operator", &[], &[])).await;
    assert!(
        code == 0 && shown.contains("   2  waiting to be stored\n"),
        "{shown}"
    );
    for arguments in [
        &["--replay"][..],
        &["--replay", "all"],
        &["--replay", "-1"],
        &["--apply"],
        &["1"],
    ] {
        let (code, _, complaint) = run(audit(&world, "operator", arguments, &[])).await;
        assert_eq!(code, 2, "{arguments:?}: {complaint}");
        assert!(complaint.contains("--help"), "{arguments:?}: {complaint}");
    }
}
