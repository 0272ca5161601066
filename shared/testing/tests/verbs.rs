//! `./dev`, run in a folder of its own. What it starts there (docker, the nats CLI) only writes down what it was asked.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

struct Checkout(PathBuf);

impl Checkout {
    /// `./dev` alone, beside programs that answer as given.
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
            let path = folder.join("bin").join(program);
            std::fs::write(&path, format!("#!/bin/bash\n{body}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Checkout(folder)
    }

    fn dev(&self, arguments: &[&str]) -> Output {
        let path = format!(
            "{}:{}",
            self.0.join("bin").display(),
            std::env::var("PATH").unwrap()
        );
        Command::new(self.0.join("dev"))
            .args(arguments)
            .env("PATH", path)
            .env("NATS_URL", "nats://elsewhere:1")
            .output()
            .unwrap()
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        _ = std::fs::remove_dir_all(&self.0);
    }
}

const NATS: &str = r#"echo "$NATS_URL $NATS_USER $NATS_PASSWORD" "$@""#;

#[test]
fn the_nats_cli_speaks_to_docker_when_that_is_up() {
    let docker = r#"case "$*" in *" ps "*) echo 0123abcd ;; *" port nats 4222") echo 127.0.0.1:14222 ;; *) exit 1 ;; esac"#;
    let checkout = Checkout::new("docker", &[("docker", docker), ("nats", NATS)]);
    std::fs::write(
        checkout.0.join(".env"),
        "OPERATOR_PASSWORD=pw_secret\nPUBLISHER_PASSWORD=pw_other\n",
    )
    .unwrap();
    let output = checkout.dev(&["nats", "micro", "ls"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        said,
        "nats://127.0.0.1:14222 operator pw_secret --inbox-prefix _INBOX.operator micro ls\n"
    );
}

#[test]
fn without_a_stack_it_names_both_ways_to_start_one() {
    let checkout = Checkout::new("nothing", &[("docker", "exit 1"), ("nats", NATS)]);
    let output = checkout.dev(&["nats", "micro", "ls"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && said.contains("./dev up") && said.contains("just up"),
        "{said}"
    );
}

#[test]
fn a_refused_password_is_explained_without_being_shown() {
    let docker = r#"case "$*" in *" logs "*) echo "SQLSTATE 28P01" ;; *" ps "*) echo "  stream-bootstrap: Restarting" ;; esac"#;
    let checkout = Checkout::new("password", &[("docker", docker)]);
    std::fs::write(checkout.0.join(".env"), "POSTGRES_PASSWORD=pw_secret\n").unwrap();
    let output = checkout.dev(&["explain-docker"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "just up has failed");
    for wanted in [
        "28P01",
        ".env",
        "scrollback_postgres",
        "alter role scrollback",
    ] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    assert!(!said.contains("pw_secret"), "{said}");
}
