//! The functions' binaries, built once per test process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::nats_server::REPOSITORY;

/// The path of a function's binary, of the same profile as the running test.
///
/// # Panics
///
/// When the workspace does not build (with the compiler's words), or has no such binary.
pub fn binary(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        // …/target/<profile>/deps/<test>: the binaries lie one folder up.
        let test = std::env::current_exe().expect("a running program has a path");
        let folder = test
            .ancestors()
            .nth(2)
            .expect("a test lies in <profile>/deps")
            .to_path_buf();
        if std::env::var_os("SCROLLBACK_SKIP_BUILD").is_none_or(|skip| skip.is_empty()) {
            build(&folder);
        }
        folder
    });
    let binary = folder.join(name);
    assert!(
        binary.is_file(),
        "there is no function {name}: {} does not exist",
        binary.display()
    );
    binary
}

/// All of the workspace, not the one asked for: cargo then unifies features as in every other build
/// of it, and nothing is compiled twice.
fn build(folder: &Path) {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let profile = match folder.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(profile) => profile,
    };
    let mut command = Command::new(cargo);
    command
        .args([
            "build",
            "--quiet",
            "--workspace",
            "--bins",
            "--locked",
            "--profile",
            profile,
        ])
        .current_dir(REPOSITORY);
    // What cargo set for this test about its own package. Build scripts watch some of these (ring's
    // does), and would run again, and everything above them be compiled again, each time another
    // package asks.
    for (name, _) in std::env::vars_os() {
        let set_by_cargo = name.to_str().is_some_and(|name| {
            name.starts_with("CARGO_PKG_")
                || name.starts_with("CARGO_MANIFEST_")
                || name.starts_with("CARGO_BIN_")
                || matches!(
                    name,
                    "CARGO" | "CARGO_CRATE_NAME" | "CARGO_PRIMARY_PACKAGE" | "OUT_DIR"
                )
        });
        if set_by_cargo {
            command.env_remove(name);
        }
    }
    let output = command.output().expect("cargo can be started");
    assert!(
        output.status.success(),
        "the functions do not build:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
