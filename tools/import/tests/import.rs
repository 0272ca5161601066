//! `import` as its user meets it: the binary, with a trusted publisher's rights, on a real server.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail like tests"
)]

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::stream::Stream;
use futures::{StreamExt, TryStreamExt};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use testing::{SOON, World, eventually};

const STREAM: &str = include_str!("../../../nats/streams/CHAT_MESSAGES.json");

/// A world with the stream as configured, and no function that works on it.
async fn world() -> World {
    let world = World::builder().bare().administrator().start().await;
    configure(&world, "CREATE", |_| {}).await;
    world
}

async fn configure(world: &World, verb: &str, change: impl FnOnce(&mut Value)) {
    let mut config: Value = serde_json::from_str(STREAM).unwrap();
    change(&mut config);
    let subject = format!("$JS.API.STREAM.{verb}.CHAT_MESSAGES");
    let answer = world
        .client("administrator")
        .await
        .request(subject, config.to_string().into())
        .await
        .unwrap();
    assert!(
        !String::from_utf8_lossy(&answer.payload).contains("\"error\""),
        "{answer:?}"
    );
}

/// A file of this test, gone with it.
struct File(PathBuf);

impl File {
    fn new(name: &str, content: impl AsRef<[u8]>) -> File {
        let path =
            std::env::temp_dir().join(format!("scrollback-import-{}-{name}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        File(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        _ = std::fs::remove_file(&self.0);
    }
}

fn start(world: &World, files: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_import"))
        .args(files)
        .env_clear()
        .envs(world.vars("publisher"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

struct Imported {
    code: i32,
    stderr: String,
}

async fn ended(child: Child) -> Imported {
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output().await.unwrap();
    assert!(stdout.is_empty(), "{stdout:?}");
    Imported {
        code: status.code().unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

async fn import(world: &World, files: &[&str]) -> Imported {
    ended(start(world, files)).await
}

async fn log(world: &World) -> Stream {
    jetstream::new(world.client("administrator").await)
        .get_stream("CHAT_MESSAGES")
        .await
        .unwrap()
}

/// Subject and body of every message, in the stream's order.
async fn messages(log: &Stream) -> Vec<(String, Value)> {
    let last = log.get_info().await.unwrap().state.last_sequence;
    let read = async |seq| {
        let message = log.get_raw_message(seq).await?;
        Ok::<_, jetstream::stream::RawMessageError>((
            message.subject.to_string(),
            serde_json::from_slice(&message.payload).unwrap(),
        ))
    };
    futures::stream::iter((1..=last).map(read))
        .buffered(64)
        .try_collect()
        .await
        .unwrap()
}

/// Lines as they occur: three rooms, some lines twice, some with ids, times that run
/// backwards.
fn chat(lines: usize) -> String {
    let mut file = String::new();
    for n in 0..lines {
        let room = ["general", "chat.random", "__admin__"][n % 3];
        let mut line = json!({
            "user": format!("u{}", n % 7), "text": format!("line {}", n - n % 5),
            "timestamp": 1_700_000_000_000 - n / 50, "room": room,
        });
        if n % 11 == 0 {
            line["id"] = json!(format!("mine-{n}"));
        }
        writeln!(file, "{line}").unwrap();
    }
    file
}

/// What the stream has to contain after `chat` was imported.
fn expected(chat: &str) -> Vec<(String, String)> {
    let subject = |room: &str| match room {
        "__admin__" => "admin.import".to_owned(),
        room => format!("chat.{}", room.trim_start_matches("chat.")),
    };
    chat.lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|line| {
            (
                subject(line["room"].as_str().unwrap()),
                line["text"].as_str().unwrap().to_owned(),
            )
        })
        .collect()
}

fn subjects_and_texts(messages: &[(String, Value)]) -> Vec<(String, String)> {
    messages
        .iter()
        .map(|(subject, body)| (subject.clone(), body["text"].as_str().unwrap().to_owned()))
        .collect()
}

#[tokio::test]
async fn a_file_arrives_in_order_and_once() {
    let world = world().await;
    let chat = chat(1_300);
    let file = File::new("in-order.jsonl", &chat);
    let first = import(&world, &[file.path()]).await;
    assert_eq!(first.code, 0, "{}", first.stderr);
    assert!(
        first
            .stderr
            .starts_with("1300 read, 1300 published, 0 already there, 0 refused; "),
        "{}",
        first.stderr
    );
    let log = log(&world).await;
    let held = messages(&log).await;
    assert_eq!(subjects_and_texts(&held), expected(&chat));
    let ids: std::collections::HashSet<&str> = held
        .iter()
        .map(|(_, body)| body["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids.len(), 1_300);
    assert!(ids.contains("mine-11"));

    let second = import(&world, &[file.path()]).await;
    assert_eq!(second.code, 0, "{}", second.stderr);
    assert!(
        second
            .stderr
            .starts_with("1300 read, 0 published, 1300 already there, 0 refused; "),
        "{}",
        second.stderr
    );
    assert_eq!(log.get_info().await.unwrap().state.last_sequence, 1_300);
}

#[tokio::test]
async fn gzip_and_standard_input_are_the_same_lines() {
    let world = world().await;
    let chat = chat(30);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(chat.as_bytes()).unwrap();
    // The name says nothing.
    let file = File::new("zipped.jsonl", gzip.finish().unwrap());
    let first = import(&world, &[file.path()]).await;
    assert!(
        first.stderr.starts_with("30 read, 30 published"),
        "{}",
        first.stderr
    );

    let mut child = start(&world, &["-"]);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(chat.as_bytes()).await.unwrap();
    stdin
        .write_all(br#"{"user":"a","text":"one more, without a line end","room":"general"}"#)
        .await
        .unwrap();
    drop(stdin);
    let second = ended(child).await;
    assert_eq!(second.code, 0);
    assert!(
        second
            .stderr
            .starts_with("31 read, 1 published, 30 already there"),
        "{}",
        second.stderr
    );
}

#[tokio::test]
async fn only_what_is_new_of_a_file_that_grew() {
    let world = world().await;
    let chat = chat(700);
    let lines: Vec<&str> = chat.lines().collect();
    let some = File::new(
        "some.jsonl",
        lines
            .iter()
            .step_by(3)
            .map(|line| format!("{line}\n"))
            .collect::<String>(),
    );
    let all = File::new(
        "all.jsonl",
        lines
            .iter()
            .rev()
            .map(|line| format!("{line}\n"))
            .collect::<String>(),
    );
    let first = import(&world, &[some.path()]).await;
    assert!(
        first.stderr.starts_with("234 read, 234 published"),
        "{}",
        first.stderr
    );
    // Twice the same file in one go as well.
    let second = import(&world, &[all.path(), all.path()]).await;
    assert!(
        second
            .stderr
            .starts_with("1400 read, 466 published, 934 already there"),
        "{}",
        second.stderr
    );
    let new: Vec<String> = expected(&chat)
        .iter()
        .rev()
        .map(|(subject, text)| format!("{subject} {text}"))
        .collect();
    let log = log(&world).await;
    let held = messages(&log).await;
    let mut new = new.iter();
    for (subject, text) in subjects_and_texts(&held[234..]) {
        assert!(
            new.any(|line| *line == format!("{subject} {text}")),
            "{subject} {text} is out of order"
        );
    }
}

#[tokio::test]
async fn bad_lines_are_named_and_the_others_imported() {
    let world = world().await;
    let file = File::new(
        "bad.jsonl",
        [
            &br#"{"user":"a","text":"good","room":"general"}"#[..],
            b"not json",
            b"",
            br#"{"user":"a","text":"nowhere"}"#,
            br#"{"user":"a","text":"there","room":"no such room"}"#,
            b"{\"user\":\"a\",\"text\":\"\xff\",\"room\":\"general\"}",
            br#"{"user":"a","text":"good too","room":"general"}"#,
        ]
        .join(&b'\n'),
    );
    let imported = import(&world, &[file.path()]).await;
    assert_eq!(imported.code, 1);
    let lines: Vec<&str> = imported.stderr.lines().collect();
    let [json, nowhere, room, utf8, summary] = lines[..] else {
        panic!("{lines:#?}")
    };
    assert!(json.ends_with("bad.jsonl, line 2: not_json"), "{json}");
    assert!(nowhere.contains("line 4: no \"room\""), "{nowhere}");
    assert!(room.contains("line 5: room: a room is 1 to 64"), "{room}");
    assert!(utf8.ends_with("line 6: invalid_utf8"), "{utf8}");
    assert!(
        summary.starts_with("6 read, 2 published, 0 already there, 4 refused; "),
        "{summary}"
    );
    assert_eq!(messages(&log(&world).await).await.len(), 2);
}

#[tokio::test]
async fn what_cannot_be_read_is_named_before_anything_is_published() {
    let world = world().await;
    let file = File::new("good.jsonl", chat(3));
    let imported = import(&world, &[file.path(), "no/such/file"]).await;
    assert_eq!(
        (imported.code, imported.stderr.lines().count()),
        (1, 1),
        "{}",
        imported.stderr
    );
    assert!(
        imported
            .stderr
            .starts_with("import: no/such/file cannot be read: "),
        "{}",
        imported.stderr
    );
    assert_eq!(messages(&log(&world).await).await.len(), 0);

    let broken = File::new("broken.gz", [0x1f, 0x8b, 8, 0, 1, 2, 3]);
    let imported = import(&world, &[file.path(), broken.path()]).await;
    assert_eq!(imported.code, 1);
    assert!(
        imported
            .stderr
            .contains("broken.gz cannot be read after line 0"),
        "{}",
        imported.stderr
    );
    assert!(
        imported.stderr.contains("3 read, 3 published"),
        "{}",
        imported.stderr
    );
}

#[tokio::test]
async fn arguments_are_explained() {
    let run = async |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_import"))
            .args(arguments)
            .output()
            .await
            .unwrap()
    };
    let help = run(&["--help"]).await;
    assert!(
        help.status.success()
            && String::from_utf8_lossy(&help.stdout).contains("Usage: import <FILE>...")
    );
    for wrong in [&[][..], &["--fast", "file"]] {
        let output = run(wrong).await;
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("Usage: import <FILE>..."));
    }
}

#[tokio::test]
async fn a_missing_stream_is_reported() {
    let world = World::bare().await;
    let file = File::new("no-stream.jsonl", chat(3));
    let imported = import(&world, &[file.path()]).await;
    assert_eq!(imported.code, 1);
    assert!(
        imported
            .stderr
            .ends_with("import: no stream accepts these messages: is stream-bootstrap running?\n"),
        "{}",
        imported.stderr
    );
}

#[tokio::test]
async fn a_missing_permission_is_reported() {
    let world = world().await;
    let file = File::new("no-right.jsonl", chat(3));
    let mut vars = world.vars("get-history");
    vars.remove("DATABASE_URL");
    let output = Command::new(env!("CARGO_BIN_EXE_import"))
        .arg(file.path())
        .env_clear()
        .envs(vars)
        .output()
        .await
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr.contains("NATS refuses this user") && stderr.contains("trusted publisher"),
        "{stderr}"
    );
}

#[tokio::test]
async fn a_full_stream_is_reported_and_accepts_no_half_batch() {
    let world = world().await;
    configure(&world, "UPDATE", |config| {
        config["max_bytes"] = json!(150_000)
    })
    .await;
    let chat = chat(2_000);
    let file = File::new("full.jsonl", &chat);
    let imported = import(&world, &[file.path()]).await;
    assert_eq!(imported.code, 1);
    assert!(
        imported.stderr.contains("import: the stream is full ("),
        "{}",
        imported.stderr
    );
    let log = log(&world).await;
    let held = messages(&log).await.len();
    assert_eq!(held, 500, "{}", imported.stderr);
    // With room, the same import goes on where it was.
    configure(&world, "UPDATE", |_| {}).await;
    let imported = import(&world, &[file.path()]).await;
    assert!(
        imported
            .stderr
            .starts_with("2000 read, 1500 published, 500 already there"),
        "{}",
        imported.stderr
    );
    assert_eq!(subjects_and_texts(&messages(&log).await), expected(&chat));
}

#[tokio::test]
async fn a_server_that_goes_away_costs_nothing() {
    let world = world().await;
    let chat = chat(20_000);
    let mut importing = start(&world, &["-"]);
    let mut stdin = importing.stdin.take().unwrap();
    let stderr = importing.stderr.take().unwrap();
    let mut lines = tokio::io::BufReader::new(stderr).lines();
    let log = log(&world).await;
    for (part, goal) in [
        (&chat[..chat.len() / 2], 2_000),
        (&chat[chat.len() / 2..], 10_500),
    ] {
        // The last of it comes when the server is gone, so that import has something to send,
        // whatever it had under way.
        let (before, after) = part.split_at(part.len() * 3 / 4);
        let (killed, gone) = tokio::sync::oneshot::channel();
        let feed = async {
            stdin.write_all(before.as_bytes()).await.unwrap();
            gone.await.unwrap();
            stdin.write_all(after.as_bytes()).await.unwrap();
        };
        let outage = async {
            eventually("the import is under way", SOON, async || {
                let info = tokio::time::timeout(Duration::from_millis(200), log.get_info()).await;
                (info.ok()?.ok()?.state.last_sequence >= goal).then_some(())
            })
            .await;
            world.nats().kill().await;
            killed.send(()).unwrap();
            let line = lines.next_line().await.unwrap().unwrap();
            assert!(
                line.ends_with("waiting, and trying the same messages again"),
                "{line}"
            );
            world.nats().start().await;
        };
        tokio::join!(feed, outage);
    }
    drop(stdin);
    let summary = lines.next_line().await.unwrap().unwrap();
    assert!(
        summary.starts_with("20000 read, ") && summary.contains(" 0 refused"),
        "{summary}"
    );
    assert!(importing.wait().await.unwrap().success());
    assert_eq!(subjects_and_texts(&messages(&log).await), expected(&chat));
}

/// What Slack and others give is unique in its channel only.
const CHANNELS: [&str; 2] = [
    r#"{"room":"alpha","user":"U8","text":"first","timestamp":1516454537000,"id":"1516454537.93"}"#,
    r#"{"room":"beta","user":"U8","text":"third","timestamp":1516454537000,"id":"1516454537.93"}"#,
];

#[tokio::test]
async fn an_id_used_twice_in_a_file_is_refused_by_its_line() {
    let world = world().await;
    let file = File::new("channels", CHANNELS.join("\n"));
    let imported = self::import(&world, &[file.path()]).await;
    assert_eq!(imported.code, 1, "{}", imported.stderr);
    assert!(
        imported.stderr.contains("line 2: its user has this id in")
            && imported.stderr.contains("line 1"),
        "{}",
        imported.stderr
    );
    assert!(
        imported
            .stderr
            .contains("2 read, 1 published, 0 already there, 1 refused"),
        "{}",
        imported.stderr
    );
    // The same line again is the same message.
    let file = File::new("resent", [CHANNELS[0], CHANNELS[0]].join("\n"));
    let imported = self::import(&world, &[file.path()]).await;
    assert!(
        imported.code == 0 && imported.stderr.contains("0 refused"),
        "{}",
        imported.stderr
    );
}

#[tokio::test]
async fn an_id_used_before_this_run_is_refused_by_its_line() {
    let world = World::builder().administrator().start().await;
    let (_worker, _history) =
        tokio::join!(world.spawn("persist-message"), world.spawn("get-history"));
    let files = CHANNELS.map(|line| File::new(&format!("channel-{}", line.len()), line));
    assert_eq!(self::import(&world, &[files[0].path()]).await.code, 0);
    // At once, while JetStream still remembers ids, and when it has forgotten them, and when it
    // knows the refused message.
    for forgotten in [false, true, false] {
        if forgotten {
            configure(&world, "UPDATE", |config| {
                config["duplicate_window"] = json!(100_000_000)
            })
            .await;
            let again = eventually("JetStream has forgotten the first line", SOON, async || {
                let again = self::import(&world, &[files[0].path()]).await;
                assert_eq!(again.code, 0, "a resend is no conflict: {}", again.stderr);
                again.stderr.contains("1 published").then_some(again)
            });
            again.await;
        }
        let imported = self::import(&world, &[files[1].path()]).await;
        assert_eq!(imported.code, 1, "{}", imported.stderr);
        let named = imported
            .stderr
            .contains("line 1: its user has used this id before");
        assert!(
            named
                && imported
                    .stderr
                    .contains("0 published, 0 already there, 1 refused"),
            "{}",
            imported.stderr
        );
    }
    let database = world.database().await;
    let texts: Vec<String> = sqlx::query_scalar("select text from messages")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(texts, ["first"]);
    let reasons: Vec<String> = sqlx::query_scalar("select distinct reason from dead_letters")
        .fetch_all(&database)
        .await
        .unwrap();
    assert_eq!(reasons, ["id_conflict"]);
}
