//! A nats-server with the configuration in `nats/`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;

use crate::child::{Child, EndBy, kept, new_folder};
use crate::ports::free_port;
use crate::{SOON, eventually};

/// The checkout this test was built from.
pub(crate) const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// How many sets of ports are tried before giving up.
const PORT_ATTEMPTS: usize = 5;

/// A nats-server of its own: with `nats/nats-server.conf`, its users and permissions, free ports on
/// 127.0.0.1, a store in a temporary folder. Gone, with its store, when dropped.
pub struct NatsServer {
    folder: PathBuf,
    configuration: PathBuf,
    users: BTreeSet<String>,
    ports: Ports,
    child: Mutex<Option<Child>>,
}

#[derive(Clone, Copy)]
struct Ports {
    client: u16,
    monitor: u16,
    websocket: u16,
}

impl Ports {
    fn free() -> Self {
        Self {
            client: free_port(),
            monitor: free_port(),
            websocket: free_port(),
        }
    }
}

impl NatsServer {
    /// `settings` replace values of that file, `administrator` adds a user without limits.
    pub(crate) async fn new(settings: &[(String, String)], administrator: bool) -> Self {
        let folder = new_folder("nats");
        let source = Path::new(REPOSITORY).join("nats");
        let (configuration, accounts) = if settings.is_empty() && !administrator {
            (
                source.join("nats-server.conf"),
                source.join("accounts.conf"),
            )
        } else {
            changed(&source, &folder, settings, administrator)
        };
        let users = users(&read(&accounts));
        let mut server = Self {
            folder,
            configuration,
            users,
            ports: Ports::free(),
            child: Mutex::new(None),
        };
        for _ in 1..PORT_ATTEMPTS {
            match server.try_start().await {
                Ok(()) => return server,
                Err(log) if log.contains("address already in use") => server.ports = Ports::free(),
                Err(log) => panic!("nats-server does not start\n{log}"),
            }
        }
        server.start().await;
        server
    }

    /// `nats://127.0.0.1:<port>`, the same over stop and start.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.ports.client)
    }

    /// The port for clients.
    pub fn port(&self) -> u16 {
        self.ports.client
    }

    /// `ws://127.0.0.1:<port>`.
    pub fn websocket_url(&self) -> String {
        format!("ws://127.0.0.1:{}", self.ports.websocket)
    }

    /// `http://127.0.0.1:<port>`, the monitoring endpoints (`/varz`, `/connz`, `/jsz`).
    pub fn monitor_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports.monitor)
    }

    /// JetStream's folder. Copy or remove it only while the server is stopped.
    pub fn store_dir(&self) -> PathBuf {
        self.folder.join("store")
    }

    /// The users of `nats/accounts.conf`.
    pub fn users(&self) -> &BTreeSet<String> {
        &self.users
    }

    /// A user's password.
    ///
    /// # Panics
    ///
    /// When the configuration has no such user.
    pub fn password(&self, user: &str) -> String {
        assert!(
            self.users.contains(user),
            "nats/accounts.conf has no user {user}; it has {:?}",
            self.users
        );
        // Not a secret, only never the same for two users.
        format!("{user}-password")
    }

    /// The server's process id.
    ///
    /// # Panics
    ///
    /// When it is stopped.
    pub fn id(&self) -> u32 {
        self.child
            .lock()
            .expect("no panic under this lock")
            .as_ref()
            .expect("nats-server is stopped")
            .id()
    }

    /// SIGTERM, and waits for the end. Clients notice and try to reconnect.
    pub async fn stop(&self) {
        self.end("TERM").await;
    }

    /// SIGKILL, and waits for the end.
    pub async fn kill(&self) {
        self.end("KILL").await;
    }

    async fn end(&self, signal: &str) {
        let child = self.child.lock().expect("no panic under this lock").take();
        if let Some(child) = child {
            child.signal(signal);
            child.exited(SOON).await;
        }
    }

    /// Starts it again after [`stop`](Self::stop) or [`kill`](Self::kill): same ports, same store.
    /// Returns when it takes clients.
    ///
    /// # Panics
    ///
    /// When it does not start within [`SOON`], with its log.
    pub async fn start(&self) {
        if let Err(log) = self.try_start().await {
            panic!("nats-server does not start\n{log}");
        }
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(
            &std::fs::read(self.folder.join("nats-server.stderr")).unwrap_or_default(),
        )
        .into_owned()
    }

    async fn try_start(&self) -> Result<(), String> {
        let name = format!("test-{}-{}", std::process::id(), self.ports.client);
        let mut command = kept(EndBy::Kill, &program());
        command
            .arg("--name")
            .arg(&name)
            .arg("--config")
            .arg(&self.configuration);
        command.env("NATS_LISTEN", format!("127.0.0.1:{}", self.ports.client));
        command.env("NATS_MONITOR", format!("127.0.0.1:{}", self.ports.monitor));
        command.env(
            "NATS_WEBSOCKET",
            format!("127.0.0.1:{}", self.ports.websocket),
        );
        command.env("NATS_STORE_DIR", self.store_dir());
        for user in &self.users {
            command.env(password_variable(user), self.password(user));
        }
        let child = Child::start("nats-server", command, &self.folder);
        // It greets after JetStream has read its store. By name: in our place another process might
        // have taken the port.
        let ours = format!("\"server_name\":\"{name}\"");
        eventually("nats-server greets", SOON, async || {
            match greeting(self.ports.client).await {
                Some(info) if info.contains(&ours) => {
                    Some(info.contains("\"jetstream\":true").then_some(()))
                }
                _ if child.status().is_some() => Some(None),
                _ => None,
            }
        })
        .await
        .ok_or_else(|| child.log())?;
        if let Ok(program) = std::fs::read_link(format!("/proc/{}/exe", child.id())) {
            PROGRAM.get_or_init(|| program.into());
        }
        *self.child.lock().expect("no panic under this lock") = Some(child);
        Ok(())
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        // First the process, then what it writes to. The janitor removes what cannot be removed
        // now.
        drop(self.child.lock().ok().and_then(|mut child| child.take()));
        if std::thread::panicking() {
            for line in self
                .log()
                .lines()
                .filter(|line| line.contains("[ERR]") || line.contains("[FTL]"))
            {
                eprintln!("nats-server: {line}");
            }
        }
        _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// The first line a server sends.
async fn greeting(port: u16) -> Option<String> {
    let read = async {
        let mut line = String::new();
        let connection = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        BufReader::new(connection).read_line(&mut line).await.ok()?;
        Some(line)
    };
    tokio::time::timeout(Duration::from_secs(1), read)
        .await
        .ok()
        .flatten()
}

/// nats-server's binary, found once: where version managers put a script in its place, every start
/// through that script costs as much as the start of the server.
static PROGRAM: OnceLock<OsString> = OnceLock::new();

fn program() -> OsString {
    // What was named is run as it is, whatever it is.
    let named = std::env::var_os("SCROLLBACK_NATS_SERVER");
    if let Some(program) = named.or_else(|| PROGRAM.get().cloned()) {
        return program;
    }
    std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .map(|folder| folder.join("nats-server"))
        .find(|program| program.is_file())
        .expect("nats-server is not on the PATH: run ./dev test, or install 2.14.3 or newer")
        .into()
}

/// Writes the configuration with other values, since in the server's language a later `jetstream {
/// … }` replaces all of an earlier one, `sync_interval` included. Gives the paths of the two files.
fn changed(
    source: &Path,
    folder: &Path,
    settings: &[(String, String)],
    administrator: bool,
) -> (PathBuf, PathBuf) {
    let mut text = read(&source.join("nats-server.conf"));
    for (key, value) in settings {
        let line = text
            .lines()
            .find(|line| line.trim_start().starts_with(&format!("{key}:")));
        let line = line
            .unwrap_or_else(|| panic!("nats/nats-server.conf has no line `{key}: …`"))
            .to_owned();
        text = text.replace(&line, &format!("{key}: {value}"));
    }
    let mut accounts = read(&source.join("accounts.conf"));
    if administrator {
        let first = "users: [";
        assert!(
            accounts.contains(first),
            "nats/accounts.conf has no `{first}`"
        );
        accounts = accounts.replacen(
            first,
            &format!("{first} {{ user: \"administrator\", password: $ADMINISTRATOR_PASSWORD }}"),
            1,
        );
    }
    let paths = (
        folder.join("nats-server.conf"),
        folder.join("accounts.conf"),
    );
    std::fs::write(&paths.0, text).expect("a temporary file can be written");
    std::fs::write(&paths.1, accounts).expect("a temporary file can be written");
    paths
}

/// The users, by the variables of their passwords: a new function needs no change here.
fn users(accounts: &str) -> BTreeSet<String> {
    let users: BTreeSet<String> = accounts
        .split('$')
        .skip(1)
        .filter_map(|rest| {
            rest.split(|c: char| !c.is_ascii_uppercase() && c != '_')
                .next()?
                .strip_suffix("_PASSWORD")
        })
        .map(|name| name.to_lowercase().replace('_', "-"))
        .collect();
    assert!(
        !users.is_empty(),
        "nats/accounts.conf names no password as $<USER>_PASSWORD"
    );
    users
}

fn password_variable(user: &str) -> String {
    format!("{}_PASSWORD", user.to_uppercase().replace('-', "_"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
