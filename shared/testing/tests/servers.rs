//! What other tests rely on: the servers run with the configuration in `nats/`, stop and start as
//! asked, and leave nothing behind.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use testing::{OtlpReceiver, RawClient, SOON, World, eventually};

#[tokio::test]
async fn the_configured_users_connect_and_may_do_only_their_own() {
    let world = World::bare().await;
    for user in world.nats().users() {
        let client = world.client(user).await;
        client.flush().await.unwrap();
    }
    let mut reader = RawClient::connect(world.nats(), "get-history").await;
    reader.publish_raw("chat.general", None, None, b"{}").await;
    let refused = reader.flush().await.unwrap_err();
    assert!(
        refused.contains("Permissions Violation for Publish to \"chat.general\""),
        "{refused}"
    );
    assert_eq!(reader.flush().await, Ok(()));
}

#[tokio::test]
async fn worlds_share_a_cluster_and_no_database() {
    let (one, other) = tokio::join!(World::bare(), World::bare());
    assert_eq!(one.postgres().port(), other.postgres().port());
    assert_ne!(one.nats().port(), other.nats().port());
    let (one, other) = tokio::join!(one.database(), other.database());
    sqlx::raw_sql("create table only_here (id int)")
        .execute(&one)
        .await
        .unwrap();
    let seen: bool = sqlx::query_scalar("select to_regclass('only_here') is not null")
        .fetch_one(&other)
        .await
        .unwrap();
    assert!(!seen);
}

#[tokio::test]
async fn a_database_sorts_as_a_dictionary_does_not_by_bytes() {
    let world = World::bare().await;
    let sorted: Vec<String> = sqlx::query_scalar(
        "select name from unnest(array['Bob', 'alice', '_c']) name order by name",
    )
    .fetch_all(&world.database().await)
    .await
    .unwrap();
    assert_eq!(sorted, ["_c", "alice", "Bob"]);
}

#[tokio::test]
async fn nats_server_comes_back_with_its_store() {
    let world = World::builder()
        .bare()
        .administrator()
        .nats_setting("max_payload", "2MB")
        .start()
        .await;
    let administrator = world.client("administrator").await;
    assert_eq!(administrator.server_info().max_payload, 2 * 1024 * 1024);
    let create = json!({ "name": "KEPT", "subjects": ["kept"], "storage": "file" }).to_string();
    let created = administrator
        .request("$JS.API.STREAM.CREATE.KEPT", create.into())
        .await
        .unwrap();
    assert!(
        !String::from_utf8_lossy(&created.payload).contains("error"),
        "{created:?}"
    );
    administrator.request("kept", "one".into()).await.unwrap();
    world.nats().kill().await;
    world.nats().start().await;
    world.nats().stop().await;
    world.nats().start().await;
    let kept = eventually("the client is connected again", SOON, async || {
        let info = tokio::time::timeout(
            Duration::from_millis(200),
            administrator.request("$JS.API.STREAM.INFO.KEPT", "".into()),
        )
        .await;
        Some(info.ok()?.ok()?.payload)
    });
    let kept: Value = serde_json::from_slice(&kept.await).unwrap();
    assert_eq!(kept["state"]["messages"], 1);
}

#[tokio::test]
async fn headers_no_client_would_send_reach_the_store() {
    let world = World::builder().bare().administrator().start().await;
    let mut raw = RawClient::connect(world.nats(), "administrator").await;
    let create = json!({ "name": "ODD", "subjects": ["odd"] }).to_string();
    raw.request("$JS.API.STREAM.CREATE.ODD", None, create.as_bytes())
        .await
        .unwrap();
    let odd = b"NATS/1.0\r\nA B: lone\rreturn\r\nno colon\r\n\r\n";
    raw.publish_raw("odd", None, Some(odd), b"text").await;
    raw.flush().await.unwrap();
    raw.subscribe("seen").await;
    raw.publish_raw("seen", Some("somewhere"), Some(odd), b"text")
        .await;
    let seen = raw.next(SOON).await.unwrap();
    assert_eq!(
        (seen.reply.as_deref(), &seen.headers[..], &seen.payload[..]),
        (Some("somewhere"), &odd[..], &b"text"[..])
    );
    let stored = raw
        .request("$JS.API.STREAM.MSG.GET.ODD", None, br#"{"seq":1}"#)
        .await
        .unwrap();
    let stored: Value = serde_json::from_slice(&stored.payload).unwrap();
    assert_eq!(stored["message"]["data"], "dGV4dA==");
    raw.send(b"NONSENSE\r\n").await;
    let error = raw.flush().await.unwrap_err();
    assert!(
        error.contains("Unknown Protocol Operation") && error.contains("connection closed"),
        "{error}"
    );
}

#[tokio::test]
async fn postgres_of_its_own_stops_crashes_stands_still_and_comes_back() {
    let world = World::builder().bare().own_postgres().start().await;
    let count = async || {
        let mut connection = PgConnection::connect(&world.database_url()).await?;
        sqlx::query_scalar::<_, i64>("select count(*) from kept")
            .fetch_one(&mut connection)
            .await
    };
    let mut session = PgConnection::connect(&world.database_url()).await.unwrap();
    sqlx::raw_sql("create table kept (id int); insert into kept values (1)")
        .execute(&mut session)
        .await
        .unwrap();

    world.postgres().pause().await;
    tokio::time::timeout(Duration::from_millis(100), count())
        .await
        .expect_err("nobody answers while paused");
    tokio::time::timeout(Duration::from_millis(100), session.ping())
        .await
        .expect_err("an open session neither");
    world.postgres().resume();
    assert_eq!(count().await.unwrap(), 1);

    world.postgres().stop().await;
    count().await.unwrap_err();
    world.postgres().start().await;
    assert_eq!(count().await.unwrap(), 1);

    world.postgres().kill().await;
    count().await.unwrap_err();
    world.postgres().start().await;
    assert_eq!(count().await.unwrap(), 1);
    world.postgres().pause().await;
    world.postgres().kill().await;
}

#[tokio::test]
#[should_panic(expected = "serves all tests of the process")]
async fn nobody_stops_the_cluster_of_all() {
    World::bare().await.postgres().stop().await;
}

#[tokio::test]
async fn the_receiver_reads_spans() {
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span, span::Link};
    use prost::Message;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let receiver = OtlpReceiver::start().await;
    let span = Span {
        trace_id: vec![1; 16],
        span_id: vec![2; 8],
        name: "send chat.general".into(),
        kind: 4,
        links: vec![Link {
            trace_id: vec![3; 16],
            span_id: vec![4; 8],
            ..Link::default()
        }],
        ..Span::default()
    };
    let scope = ScopeSpans {
        spans: vec![span],
        ..ScopeSpans::default()
    };
    let request = ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            scope_spans: vec![scope],
            ..ResourceSpans::default()
        }],
    };
    let body = request.encode_to_vec();
    let mut connection =
        tokio::net::TcpStream::connect(receiver.endpoint().trim_start_matches("http://"))
            .await
            .unwrap();
    // Two requests over one connection, as exporters send them.
    for _ in 0..2 {
        let head = format!(
            "POST /v1/traces HTTP/1.1\r\nHost: test\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        connection
            .write_all(&[head.as_bytes(), &body].concat())
            .await
            .unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(connection.read_u8().await.unwrap());
        }
        assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"));
    }
    let spans = receiver
        .wait_for("two spans", SOON, |spans| spans.len() == 2)
        .await;
    assert_eq!(
        (
            spans[0].trace_id.as_str(),
            spans[0].kind,
            &spans[0].parent_span_id
        ),
        ("01".repeat(16).as_str(), "producer", &None)
    );
    assert_eq!(spans[0].links, [("03".repeat(16), "04".repeat(8))]);
    assert!(receiver.contains("chat.general") && !receiver.contains("a secret"));
}

/// Starts everything, prints what, and waits to be killed. The test below runs it in a process of
/// its own.
#[tokio::test]
#[ignore = "part of nothing_outlives_a_killed_test"]
async fn a_test_that_hangs() {
    let world = World::builder().bare().own_postgres().start().await;
    let other = World::bare().await;
    let database = world.database().await;
    sqlx::query("select 1").execute(&database).await.unwrap();
    // Suspended backends cannot notice that their postmaster has gone.
    world.postgres().pause().await;
    let pids = [
        world.nats().id(),
        world.postgres().id(),
        other.nats().id(),
        other.postgres().id(),
    ];
    let folder = world
        .nats()
        .store_dir()
        .ancestors()
        .nth(2)
        .unwrap()
        .to_path_buf();
    std::fs::write(
        std::env::var_os("REPORT").unwrap(),
        json!({ "pids": pids, "folder": folder }).to_string(),
    )
    .unwrap();
    std::future::pending().await
}

#[tokio::test]
async fn nothing_outlives_a_killed_test() {
    let report = std::env::temp_dir().join(format!("scrollback-report-{}", std::process::id()));
    let mut hanging = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_test_that_hangs", "--ignored"])
        .env("REPORT", &report)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started: Value = eventually(
        "the other test has started everything",
        3 * SOON,
        async || {
            assert_eq!(hanging.try_wait().unwrap(), None, "the other test ended");
            serde_json::from_slice(&std::fs::read(&report).ok()?).ok()
        },
    )
    .await;
    std::fs::remove_file(&report).unwrap();
    let folder = started["folder"].as_str().unwrap();
    // The folder is in the arguments or is the working directory of postmasters, nats-servers and
    // backends.
    assert!(
        processes_of(folder) > 8,
        "{} processes",
        processes_of(folder)
    );
    hanging.kill().unwrap();
    hanging.wait().unwrap();
    eventually(
        "all processes and the folder are gone",
        3 * SOON,
        async || {
            (processes_of(folder) == 0 && !std::path::Path::new(folder).exists()).then_some(())
        },
    )
    .await;
}

/// The number of processes that have the folder in their arguments or as their working directory.
fn processes_of(folder: &str) -> usize {
    let concerned = |process: std::path::PathBuf| {
        let arguments = std::fs::read(process.join("cmdline")).unwrap_or_default();
        let directory = std::fs::read_link(process.join("cwd")).unwrap_or_default();
        String::from_utf8_lossy(&arguments).contains(folder) || directory.starts_with(folder)
    };
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|entry| concerned(entry.path()))
        .count()
}
