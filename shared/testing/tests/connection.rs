//! The connection for requests ends, hangs and comes back, and the health file reflects it.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use testing::{Process, SOON, World, eventually};

/// What the proxy does to connections for requests. All other connections pass.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Pass,
    /// Present connections hang: they stay open, but no bytes pass. New ones work.
    Hang,
    /// Present connections are closed.
    End,
    /// All connections hang, new ones too.
    Block,
}

/// Stands between a function and the server. It recognizes the connection for requests by its name
/// in CONNECT.
struct Proxy {
    url: String,
    mode: watch::Sender<Mode>,
}

impl Proxy {
    async fn start(port: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("nats://{}", listener.local_addr().unwrap());
        let (mode, modes) = watch::channel(Mode::Pass);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                tokio::spawn(pass(client, server, modes.clone()));
            }
        });
        Proxy { url, mode }
    }
}

async fn pass(
    mut client: TcpStream,
    mut server: TcpStream,
    mut modes: watch::Receiver<Mode>,
) -> Option<()> {
    let mut up = [0; 4096];
    let mut down = [0; 4096];
    let mut is_for_requests = false;
    let mut hangs = false;
    modes.mark_unchanged();
    loop {
        tokio::select! {
            read = client.read(&mut up), if !hangs => {
                let bytes = &up[..read.ok().filter(|read| *read > 0)?];
                is_for_requests |= bytes.windows(10).any(|part| part == b"(requests)");
                hangs = is_for_requests && *modes.borrow() == Mode::Block;
                server.write_all(bytes).await.ok()?;
            }
            read = server.read(&mut down), if !hangs => {
                let bytes = &down[..read.ok().filter(|read| *read > 0)?];
                client.write_all(bytes).await.ok()?;
            }
            changed = modes.changed() => {
                changed.ok()?;
                match *modes.borrow_and_update() {
                    Mode::End if is_for_requests => return None,
                    Mode::Hang | Mode::Block => hangs |= is_for_requests,
                    _ => {}
                }
            }
        }
    }
}

async fn answers_again(world: &World, what: &str) {
    let client = world.client("publisher").await;
    eventually(what, SOON, async || {
        let asked = tokio::time::timeout(
            Duration::from_millis(200),
            client.request("chat.history.general", "".into()),
        )
        .await;
        matches!(asked, Ok(Ok(_))).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_connection_that_ends_or_hangs_is_replaced() {
    let world = World::start().await;
    let proxy = Proxy::start(world.nats().port()).await;
    let history = world
        .spawn_with("get-history", &[("NATS_URL", &proxy.url)])
        .await;
    for (mode, what) in [
        (Mode::End, "after its end"),
        (Mode::Hang, "although it hangs"),
        (Mode::End, "after another end"),
    ] {
        answers_again(&world, "requests are answered").await;
        let lines = history
            .stderr()
            .matches("requests are received again")
            .count();
        let begun = Instant::now();
        proxy.mode.send(mode).unwrap();
        eventually(what, SOON, async || {
            (history
                .stderr()
                .matches("requests are received again")
                .count()
                > lines)
                .then_some(())
        })
        .await;
        println!("connected again {what} after {:?}", begun.elapsed());
        answers_again(&world, what).await;
    }
    assert!(history.is_running());
}

/// A file for `HEALTH_FILE`, in a folder that is removed when the value is dropped.
struct HealthFile(PathBuf);

impl HealthFile {
    fn new(test: &str) -> HealthFile {
        let folder = std::env::temp_dir().join(format!("scrollback-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        HealthFile(folder.join("health"))
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for HealthFile {
    fn drop(&mut self) {
        _ = std::fs::remove_dir_all(self.0.parent().unwrap());
    }
}

async fn is_touched(path: &Path) {
    eventually("the health file is touched", SOON, async || {
        path.exists().then_some(())
    })
    .await;
}

/// Waits until the function is unhealthy, and removes the file it touched while it was healthy.
async fn becomes_unhealthy(function: &Process, file: &HealthFile, why: &str) {
    let said = || {
        function
            .stderr()
            .lines()
            .any(|line| line.contains("not healthy") && line.contains(why))
    };
    eventually(why, SOON, async || said().then_some(())).await;
    std::fs::remove_file(&file.0).unwrap();
}

async fn exit_code(world: &World, file: &HealthFile) -> Option<i32> {
    let mut command = world.command("get-history");
    command
        .arg("--health")
        .env("HEALTH_FILE", file.path())
        .output()
        .await
        .unwrap()
        .status
        .code()
}

#[tokio::test]
async fn health_is_red_while_requests_do_not_come_in() {
    let world = World::start().await;
    let proxy = Proxy::start(world.nats().port()).await;
    let file = HealthFile::new("requests");
    let history = world
        .spawn_with(
            "get-history",
            &[("NATS_URL", &proxy.url), ("HEALTH_FILE", file.path())],
        )
        .await;
    is_touched(&file.0).await;
    assert_eq!(exit_code(&world, &file).await, Some(0));
    // The other connection stays up, and so does the process.
    proxy.mode.send(Mode::Block).unwrap();
    becomes_unhealthy(&history, &file, "$SRV.PING is not answered").await;
    assert_eq!(exit_code(&world, &file).await, Some(1));
    assert!(!file.0.exists(), "touched although nothing is answered");
    proxy.mode.send(Mode::Pass).unwrap();
    is_touched(&file.0).await;
    assert_eq!(exit_code(&world, &file).await, Some(0));
}

#[tokio::test]
async fn health_is_red_while_postgres_is_away() {
    let world = World::with_own_postgres().await;
    let file = HealthFile::new("postgres");
    let history = world
        .spawn_with("get-history", &[("HEALTH_FILE", file.path())])
        .await;
    is_touched(&file.0).await;
    world.postgres().kill().await;
    becomes_unhealthy(&history, &file, "PostgreSQL does not answer").await;
    world.postgres().start().await;
    is_touched(&file.0).await;
}

#[tokio::test]
async fn requests_come_in_over_tls() {
    // Made for this test: a self-signed certificate for localhost.
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tls");
    let cert = format!("{folder}/cert.pem");
    let key = format!("{folder}/key.pem");
    let tls = format!("16KB\ntls {{ cert_file: {cert:?}, key_file: {key:?} }}");
    let world = World::builder()
        .bare()
        .nats_setting("max_control_line", &tls)
        .start()
        .await;
    for scheme in ["tls", "nats"] {
        let url = format!("{scheme}://localhost:{}", world.nats().port());
        // It is ready as soon as it has answered its own ping.
        let function = world.launch(
            "get-history",
            &[("NATS_URL", &url), ("SSL_CERT_FILE", &cert)],
        );
        eventually("the function is ready", SOON, async || {
            function.stderr().contains("ready").then_some(())
        })
        .await;
    }
    let url = format!("tls://localhost:{}", world.nats().port());
    let function = world.launch("get-history", &[("NATS_URL", &url)]);
    eventually("an unknown certificate is refused", SOON, async || {
        function.stderr().contains("waiting for NATS").then_some(())
    })
    .await;
}
