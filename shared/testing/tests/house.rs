//! Rules of this project, checked by a test instead of by reviewers' memory.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

#[expect(dead_code, reason = "the endpoints are for other tests")]
mod table;

use std::path::{Path, PathBuf};

use table::{functions, root};

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_function_is_in_readme_compose_and_permissions() {
    let readme = read("README.md");
    let compose = read("docker-compose.yml");
    let accounts = read("nats/accounts.conf");
    for function in functions() {
        assert!(
            readme.contains(&format!("(functions/{function})")),
            "{function} is not in README.md's table"
        );
        assert!(
            compose.contains(&format!("  {function}:\n")),
            "{function} is no service in docker-compose.yml"
        );
        assert!(
            compose.contains(&format!("[CMD, {function}, --health]")),
            "{function} has no health check in docker-compose.yml"
        );
        assert!(
            accounts.contains(&format!("user: \"{function}\"")),
            "{function} has no user in nats/accounts.conf"
        );
        for verb in ["PING", "INFO", "STATS"] {
            assert!(
                accounts.contains(&format!("\"$SRV.{verb}.{function}.*\"")),
                "{function} may not answer $SRV.{verb}"
            );
        }
    }
}

#[test]
fn compose_gives_nats_server_every_password() {
    let accounts = read("nats/accounts.conf");
    let compose = read("docker-compose.yml");
    let nats = block(&compose, "  nats:");
    let passwords = accounts.split("password: $").skip(1);
    let names = passwords.filter_map(|rest| rest.split_whitespace().next());
    let mut count = 0;
    for name in names {
        assert!(
            nats.contains(&format!("      {name}: ${{{name}:?")),
            "nats in docker-compose.yml does not know {name}"
        );
        count += 1;
    }
    assert!(count > functions().len(), "{count} passwords");
}

/// The lines of one service in docker-compose.yml, or of an anchor before the services.
fn block(compose: &str, head: &str) -> String {
    let mut lines = compose.lines().skip_while(|line| !line.starts_with(head));
    let first = lines
        .next()
        .unwrap_or_else(|| panic!("no {head} in docker-compose.yml"));
    let indent = |line: &str| line.len() - line.trim_start().len();
    lines
        .take_while(|line| line.is_empty() || indent(line) > indent(first))
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn compose_builds_one_image_once_and_asks_for_health_rarely() {
    let compose = read("docker-compose.yml");
    // If several services built the image, each would make its own, and the next `just up` would
    // recreate all of them.
    assert_eq!(
        compose.matches(" build:").count(),
        1,
        "one service builds the image, the others take it"
    );
    let function = block(&compose, "x-function:");
    assert!(
        function.contains("pull_policy: never"),
        "the image is built here: {function}"
    );
    let health = block(&compose, "x-healthcheck:");
    for wanted in ["interval: 30s", "start_interval: 2s"] {
        assert!(
            health.lines().any(|line| line.trim() == wanted),
            "{wanted}: {health}"
        );
    }
    for service in functions()
        .iter()
        .map(String::as_str)
        .chain(["nats", "postgres"])
    {
        let service = block(&compose, &format!("  {service}:"));
        assert!(
            service.contains("healthcheck:") && !service.contains(" interval:"),
            "{service}"
        );
    }
    // Docker and ./dev kill a function only after its own deadline for stopping.
    let seconds = |text: &str, before: &str| {
        let (_, rest) = text
            .split_once(before)
            .unwrap_or_else(|| panic!("no {before}"));
        rest.chars()
            .take_while(char::is_ascii_digit)
            .collect::<String>()
            .parse::<u64>()
            .unwrap()
    };
    let limit = seconds(
        &read("shared/service/src/stop.rs"),
        "const KILL_AFTER: Duration = Duration::from_secs(",
    );
    assert!(
        seconds(&function, "stop_grace_period: ") > limit
            && seconds(&read("dev"), "drain_seconds=") > limit
    );
    let up = block(&read("justfile"), "up:");
    assert!(
        up.contains("--wait ") && up.contains("just nats micro ls"),
        "{up}"
    );
}

#[test]
fn spans_are_not_named_after_rooms_and_users() {
    let mut files = Vec::new();
    for folder in ["functions", "shared", "tools"] {
        rust_files(&root().join(folder), &mut files);
    }
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        for (number, line) in text
            .lines()
            .enumerate()
            .filter(|(_, line)| line.contains("otel.name"))
        {
            let names_subject = line.contains("{subject}") || line.contains("message.subject)");
            assert!(
                !names_subject || line.contains("subject_template"),
                "{}:{}: {line}",
                path.display(),
                number + 1
            );
        }
    }
}

#[test]
fn subjects_stand_in_protocol_and_nowhere_else() {
    // Subjects of NATS itself: JetStream's API, service discovery, inboxes.
    let of_nats = [
        "jetstream/src/api.rs",
        "base/src/discovery.rs",
        "base/src/subject.rs",
    ];
    let mut files = Vec::new();
    rust_files(&root().join("functions"), &mut files);
    for name in [
        "base",
        "nats",
        "service",
        "jetstream",
        "postgres",
        "timeline",
    ] {
        rust_files(&root().join(format!("shared/{name}/src")), &mut files);
    }
    for path in files {
        let text = path.to_str().unwrap();
        if text.contains("tests") || of_nats.iter().any(|end| text.ends_with(end)) {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        for (number, line) in code
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
        {
            for literal in [
                "\"chat.",
                "\"dm.",
                "\"admin.",
                "\"change.",
                "\"live.",
                "\"bootstrap.",
                "\"retention.",
                "\"$JS",
                "\"$SRV",
                "\"_INBOX",
                "\"_R_",
                "\"events.",
                "\"scrollback.outbox",
            ] {
                assert!(
                    !line.contains(literal),
                    "{}:{}: {line}",
                    path.display(),
                    number + 1
                );
            }
        }
    }
}

#[test]
fn a_function_never_depends_on_a_function_and_testing_reaches_no_release() {
    let names = functions();
    for function in &names {
        let manifest = read(&format!("functions/{function}/Cargo.toml"));
        let (dependencies, dev) = manifest
            .split_once("[dev-dependencies]")
            .unwrap_or((&manifest, ""));
        assert!(
            !dependencies.contains("testing"),
            "{function} takes testing into its release build"
        );
        for other in names.iter().filter(|other| *other != function) {
            assert!(
                !dependencies.contains(&format!("{other}.")) && !dev.contains(&format!("{other}.")),
                "{function} depends on {other}"
            );
        }
    }
    for name in [
        "base",
        "nats",
        "protocol",
        "service",
        "jetstream",
        "postgres",
        "timeline",
    ] {
        let manifest = read(&format!("shared/{name}/Cargo.toml"));
        let (dependencies, _) = manifest
            .split_once("[dev-dependencies]")
            .unwrap_or((&manifest, ""));
        assert!(
            !dependencies.contains("testing"),
            "{name} takes testing into its release build"
        );
    }
}

#[test]
fn every_reason_is_in_the_contract() {
    let contract = read("docs/PROTOCOL.md");
    for reason in protocol::reason::Reason::ALL {
        assert!(
            contract.contains(&format!("`{reason}`")),
            "{reason} is not in docs/PROTOCOL.md"
        );
    }
}

#[test]
fn the_first_page_of_the_contract_says_how_to_hear_a_reply() {
    let contract = read("docs/PROTOCOL.md");
    let (first, _) = contract.split_once("\n## Publishing").unwrap();
    for snippet in [
        "--inbox-prefix _INBOX.publisher",
        "inbox_prefix=\"_INBOX.publisher\"",
        "nats.CustomInboxPrefix(\"_INBOX.publisher\")",
        "inboxPrefix: \"_INBOX.publisher\"",
        "custom_inbox_prefix(\"_INBOX.publisher\")",
    ] {
        assert!(
            first.contains(snippet),
            "a client cannot find out how to get a reply: {snippet}"
        );
    }
    // The permissions match the lines.
    assert!(read("nats/accounts.conf").contains("subscribe: [\"_INBOX.publisher.>\""));
}

#[test]
fn one_version_of_rust() {
    let manifest = read("Cargo.toml");
    let (_, rest) = manifest.split_once("\nrust-version = \"").unwrap();
    let version = rest.split('"').next().unwrap();
    let channel = format!("channel = \"{version}.0\"");
    assert!(read("rust-toolchain.toml").contains(&channel), "{channel}");
    let image = format!("FROM rust:{version}-");
    assert!(read("Dockerfile").contains(&image), "{image}");
}
