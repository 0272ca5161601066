//! `./dev`, run in a folder of its own. The programs it starts there (docker, the nats CLI) only
//! print their arguments.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

struct Checkout(PathBuf);

impl Checkout {
    /// A copy of `./dev`, and programs with the given bodies.
    fn new(name: &str, programs: &[(&str, &str)]) -> Checkout {
        let folder =
            std::env::temp_dir().join(format!("scrollback-verbs-{name}-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("bin")).unwrap();
        std::fs::copy(
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dev"),
            folder.join("dev"),
        )
        .unwrap();
        for (program, body) in programs {
            script(&folder.join("bin").join(program), body);
        }
        Checkout(folder)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let path = format!(
            "{}:{}",
            self.0.join("bin").display(),
            std::env::var("PATH").unwrap()
        );
        let mut command = Command::new(self.0.join("dev"));
        command
            .args(arguments)
            .env("PATH", path)
            .env("NATS_URL", "nats://elsewhere:1")
            .env("CARGO_TARGET_DIR", self.0.join("target"));
        command
    }

    fn dev(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// A folder `functions/NAME` and a binary for each; the binary is the shell script given.
    fn functions(&self, names: &[&str], body: &str) {
        for name in names {
            std::fs::create_dir_all(self.0.join("functions").join(name)).unwrap();
            self.binary(name, body);
        }
    }

    fn binary(&self, name: &str, body: &str) {
        let folder = self.0.join("target/up");
        std::fs::create_dir_all(&folder).unwrap();
        script(&folder.join(name), body);
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        // Where a test failed while something ran.
        if self.0.join(".scrollback").exists() {
            self.dev(&["down"]);
        }
        _ = std::fs::remove_dir_all(&self.0);
    }
}

fn script(path: &Path, body: &str) {
    std::fs::write(path, format!("#!/bin/bash\n{body}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

const NATS: &str = r#"echo "$NATS_URL $NATS_USER $NATS_PASSWORD" "$@""#;

#[test]
fn the_nats_cli_connects_to_docker_when_that_is_up() {
    let docker = r#"case "$*" in
        *" ps "*) echo 0123abcd ;;
        *" port nats 4222") echo 127.0.0.1:14222 ;;
        *) exit 1 ;;
    esac"#;
    let checkout = Checkout::new("docker", &[("docker", docker), ("nats", NATS)]);
    std::fs::write(
        checkout.0.join(".env"),
        "OPERATOR_PASSWORD=pw_secret\nPUBLISHER_PASSWORD=pw_other\n",
    )
    .unwrap();
    let output = checkout.dev(&["nats", "micro", "ls"]);
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        printed,
        "nats://127.0.0.1:14222 operator pw_secret --inbox-prefix _INBOX.operator micro ls\n"
    );
}

#[test]
fn without_a_stack_it_names_both_ways_to_start_one() {
    let checkout = Checkout::new("nothing", &[("docker", "exit 1"), ("nats", NATS)]);
    let output = checkout.dev(&["nats", "micro", "ls"]);
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && printed.contains("./dev up") && printed.contains("just up"),
        "{printed}"
    );
}

#[test]
fn a_refused_password_is_explained_without_being_shown() {
    let docker = r#"case "$*" in
        *" logs "*) echo "SQLSTATE 28P01" ;;
        *" ps "*) echo "  stream-bootstrap: Restarting" ;;
    esac"#;
    let checkout = Checkout::new("password", &[("docker", docker)]);
    std::fs::write(checkout.0.join(".env"), "POSTGRES_PASSWORD=pw_secret\n").unwrap();
    let output = checkout.dev(&["explain-docker"]);
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "just up has failed");
    for wanted in [
        "28P01",
        ".env",
        "scrollback_postgres",
        "alter role scrollback",
    ] {
        assert!(printed.contains(wanted), "{wanted}: {printed}");
    }
    assert!(!printed.contains("pw_secret"), "{printed}");
}

/// Docker that is up; it prints the arguments of any other command.
const DOCKER: &str = r#"case "$*" in
  *" ps "*) echo 0123abcd ;;
  *" port nats 4222") echo 127.0.0.1:14222 ;;
  *) echo "docker $*" ;;
esac"#;

#[test]
fn the_nats_cli_may_be_any_user_of_the_configuration() {
    let checkout = Checkout::new("as", &[("docker", DOCKER), ("nats", NATS)]);
    std::fs::write(
        checkout.0.join(".env"),
        "OPERATOR_PASSWORD=pw_secret\nSEND_MESSAGE_PASSWORD=pw_other\n",
    )
    .unwrap();
    let output = checkout.dev(&["nats", "--as", "send-message", "req", "chat.x", "{}"]);
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "nats://127.0.0.1:14222 send-message pw_other --inbox-prefix _INBOX.send-message req \
         chat.x {}\n"
    );
    for nobody in [&["nats", "--as", "nobody", "sub"][..], &["nats", "--as"]] {
        let output = checkout.dev(nobody);
        let printed = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && printed.contains("no user"),
            "{printed}"
        );
    }
}

#[test]
fn scaling_in_docker_is_compose() {
    let checkout = Checkout::new("scale", &[("docker", DOCKER)]);
    std::fs::write(checkout.0.join(".env"), "").unwrap();
    checkout.functions(&["stream-bootstrap", "get-history"], "exit 1");
    let output = checkout.dev(&["scale", "get-history", "3"]);
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(
        printed.ends_with("up --detach --no-recreate --scale get-history=3 get-history\n"),
        "{printed}"
    );
    for wrong in [
        &["scale"][..],
        &["scale", "get-history"],
        &["scale", "get-history", "many"],
        &["scale", "get-history", "100"],
        &["scale", "get-histories", "2"],
    ] {
        let output = checkout.dev(wrong);
        let printed = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && printed.contains("usage: ./dev scale NAME N"),
            "{wrong:?}: {printed}"
        );
    }
}

/// The names of the second column of `./dev status`, where the first starts with `name`.
fn replicas(checkout: &Checkout, name: &str) -> Vec<String> {
    let status = checkout.dev(&["status"]);
    String::from_utf8(status.stdout)
        .unwrap()
        .lines()
        .filter(|line| line.trim_start().starts_with(name) && line.contains("pid "))
        .map(|line| line.trim().to_owned())
        .collect()
}

/// Real servers; functions that only wait.
#[test]
fn up_runs_as_many_replicas_as_asked_for() {
    let checkout = Checkout::new("up", &[("cargo", "exit 0"), ("just", "exit 0")]);
    checkout.functions(&["stream-bootstrap", "get-history"], "exec sleep 600");
    checkout.binary("demo", "echo the demonstration");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../nats");
    std::fs::create_dir(checkout.0.join("nats")).unwrap();
    for file in ["nats-server.conf", "accounts.conf"] {
        std::fs::copy(source.join(file), checkout.0.join("nats").join(file)).unwrap();
    }
    let mut up = checkout.command(&["up"]);
    let taken: Vec<TcpListener> = (0..4)
        .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    let names = ["NATS", "WEBSOCKET", "MONITOR", "POSTGRES"];
    for (name, listener) in names.iter().zip(&taken) {
        let port = listener.local_addr().unwrap().port();
        up.env(format!("SCROLLBACK_{name}_PORT"), port.to_string());
    }
    drop(taken);
    let output = checkout.0.join("output");
    let file = std::fs::File::create(&output).unwrap();
    let mut up = up
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .unwrap();
    let deadline = Instant::now() + testing::SOON;
    loop {
        let printed = std::fs::read_to_string(&output).unwrap();
        if printed.contains("up until Ctrl-C") {
            break;
        }
        let ended = up.try_wait().unwrap();
        assert!(ended.is_none() && Instant::now() < deadline, "{printed}");
        std::thread::sleep(Duration::from_millis(20));
    }

    let alone = replicas(&checkout, "get-history");
    assert_eq!(alone.len(), 1);
    let scaled = checkout.dev(&["scale", "get-history", "3"]);
    assert!(scaled.status.success(), "{scaled:?}");
    let three = replicas(&checkout, "get-history");
    assert_eq!(three.len(), 3, "{three:?}");
    assert!(three.contains(&alone[0]), "the first goes on: {three:?}");
    assert!(
        checkout
            .dev(&["scale", "get-history", "1"])
            .status
            .success()
    );
    assert_eq!(replicas(&checkout, "get-history"), alone);
    assert!(
        checkout
            .dev(&["scale", "get-history", "0"])
            .status
            .success()
    );
    assert_eq!(replicas(&checkout, "get-history").len(), 0);
    assert!(
        checkout
            .dev(&["scale", "get-history", "2"])
            .status
            .success()
    );
    assert_eq!(replicas(&checkout, "get-history").len(), 2);

    assert!(checkout.dev(&["down"]).status.success());
    assert!(up.wait().unwrap().success());
    assert!(!checkout.dev(&["status"]).status.success());
}
