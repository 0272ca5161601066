//! A PostgreSQL cluster: made once per test process, copied for those who want to stop it.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use sqlx::{Connection, PgConnection};
use tokio::sync::OnceCell;

use crate::child::{
    Child, EndBy, kept, look, new_folder, register_with_janitor, signal, stand_still,
};
use crate::ports::free_port;
use crate::{SOON, eventually};

/// How many ports are tried before giving up.
const PORT_ATTEMPTS: usize = 5;

/// A PostgreSQL server on 127.0.0.1 with default durability. The user is `scrollback`, a superuser,
/// without password.
pub struct Postgres {
    folder: PathBuf,
    port: u16,
    shared: bool,
    child: Mutex<Option<Child>>,
}

impl Postgres {
    /// The cluster that the tests of this process share.
    pub(crate) async fn shared() -> &'static Self {
        static SHARED: OnceCell<Postgres> = OnceCell::const_new();
        SHARED.get_or_init(|| Self::new(true)).await
    }

    /// A cluster of its own, which may be stopped.
    pub(crate) async fn own() -> Self {
        Self::new(false).await
    }

    async fn new(shared: bool) -> Self {
        let folder = new_folder("postgres");
        match shared {
            // Once per process, so a copy would save nothing.
            true => make(&folder),
            false => copy(template(), &folder.join("data")),
        }
        let mut server = Self {
            folder,
            port: free_port(),
            shared,
            child: Mutex::new(None),
        };
        for _ in 1..PORT_ATTEMPTS {
            match server.try_start().await {
                Ok(()) => return server,
                Err(log) if log.contains("Address already in use") => server.port = free_port(),
                Err(log) => panic!("PostgreSQL does not start\n{log}"),
            }
        }
        server.start().await;
        server
    }

    /// A client program of this PostgreSQL, such as `pgbench`.
    pub fn program(&self, name: &str) -> PathBuf {
        programs().join(name)
    }

    /// `postgres://scrollback@127.0.0.1:<port>/<database>`, the same over stop and start.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://scrollback@127.0.0.1:{}/{database}", self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The process id of the postmaster, the parent of all others.
    ///
    /// # Panics
    ///
    /// When it is stopped.
    pub fn id(&self) -> u32 {
        self.child
            .lock()
            .expect("no panic under this lock")
            .as_ref()
            .expect("PostgreSQL is stopped")
            .id()
    }

    /// Fast shutdown (SIGINT): sessions are ended, transactions rolled back. Waits for the end.
    ///
    /// # Panics
    ///
    /// As all that follow, when the cluster is the one all tests of this process share: use
    /// [`World::with_own_postgres`](crate::World::with_own_postgres).
    pub async fn stop(&self) {
        self.mine_to_stop();
        let child = self.child.lock().expect("no panic under this lock").take();
        if let Some(child) = child {
            child.signal("INT");
            child.exited(SOON).await;
        }
    }

    /// A crash: SIGKILL to the postmaster and every process of it. The next start recovers from the
    /// log. Also ends a paused server.
    pub async fn kill(&self) {
        self.mine_to_stop();
        let child = self.child.lock().expect("no panic under this lock").take();
        if let Some(child) = child {
            // Once the postmaster stands still it starts no more children; who is listed then is
            // all there is.
            stand_still(&[child.id()]).await;
            let children = children(child.id());
            child.signal("KILL");
            for &pid in &children {
                if look(pid).is_some() {
                    signal(pid, "KILL");
                }
            }
            child.exited(SOON).await;
            eventually("PostgreSQL's processes have ended", SOON, async || {
                children
                    .iter()
                    .all(|&pid| look(pid).is_none())
                    .then_some(())
            })
            .await;
        }
    }

    /// Starts it again after [`stop`](Self::stop) or [`kill`](Self::kill): same port, same data.
    /// Returns when it answers a query.
    ///
    /// # Panics
    ///
    /// When it does not start within [`SOON`], with its log.
    pub async fn start(&self) {
        if let Err(log) = self.try_start().await {
            panic!("PostgreSQL does not start\n{log}");
        }
    }

    /// SIGSTOP to every process: connections stay open and nobody answers, as when a network drops
    /// packets silently.
    pub async fn pause(&self) {
        self.mine_to_stop();
        stand_still(&[self.id()]).await;
        let children = children(self.id());
        for &pid in &children {
            // Standing still, they would not notice that their postmaster is gone.
            register_with_janitor(EndBy::Kill, pid);
        }
        stand_still(&children).await;
    }

    /// SIGCONT to every process: goes on after [`pause`](Self::pause).
    pub fn resume(&self) {
        self.mine_to_stop();
        for pid in children(self.id()) {
            if look(pid).is_some() {
                signal(pid, "CONT");
            }
        }
        signal(self.id(), "CONT");
    }

    /// What it logged so far, message texts included.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(
            &std::fs::read(self.folder.join("postgres.stderr")).unwrap_or_default(),
        )
        .into_owned()
    }

    fn mine_to_stop(&self) {
        assert!(
            !self.shared,
            "this PostgreSQL serves all tests of the process; World::with_own_postgres gives one \
             that may be stopped"
        );
    }

    async fn try_start(&self) -> Result<(), String> {
        let data = self.folder.join("data");
        let (program, arguments) = as_its_user("postgres");
        let mut command = kept(EndBy::Quit, &program);
        command
            .args(arguments)
            .arg("-D")
            .arg(&data)
            .args(["-p", &self.port.to_string()]);
        command.args([
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            "unix_socket_directories=",
            "-c",
            "max_connections=200",
        ]);
        // In its folder, which is removed: a server that is killed would leave segments in
        // /dev/shm.
        command.args(["-c", "dynamic_shared_memory_type=mmap"]);
        let child = Child::start("postgres", command, &self.folder);
        eventually("PostgreSQL answers", SOON, async || {
            match self.answers(&data).await {
                true => Some(Some(())),
                false => child.status().is_some().then_some(None),
            }
        })
        .await
        .ok_or_else(|| child.log())?;
        *self.child.lock().expect("no panic under this lock") = Some(child);
        Ok(())
    }

    /// Whether the server on our port answers, and is the one with our data.
    async fn answers(&self, data: &Path) -> bool {
        let ask = async {
            let mut connection = PgConnection::connect(&self.url("postgres")).await.ok()?;
            let directory: String = sqlx::query_scalar("show data_directory")
                .fetch_one(&mut connection)
                .await
                .ok()?;
            _ = connection.close().await;
            Some(Path::new(&directory) == data)
        };
        tokio::time::timeout(Duration::from_secs(2), ask)
            .await
            .ok()
            .flatten()
            .unwrap_or(false)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(child) = self.child.lock().ok().and_then(|mut child| child.take()) {
            // Immediate shutdown: with SIGKILL the backends would go on for a moment, in a folder
            // that is being removed.
            child.signal("QUIT");
            child.signal("CONT");
            for pid in children(child.id()) {
                if look(pid).is_some_and(|(state, _)| state == 'T') {
                    signal(pid, "CONT");
                }
            }
            let deadline = std::time::Instant::now() + Duration::from_secs(5);
            while child.status().is_none() && std::time::Instant::now() < deadline {
                std::thread::sleep(crate::POLL_INTERVAL);
            }
        }
        _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// The processes whose parent is `parent`. Backends are in sessions of their own, so there is no
/// group to signal.
fn children(parent: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").expect("/proc is there on Linux");
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid| look(pid).is_some_and(|(_, its_parent)| its_parent == parent))
        .collect()
}

/// A data directory that was never started, made once: copying it takes a quarter of the time of
/// `initdb`.
fn template() -> &'static Path {
    static TEMPLATE: OnceLock<PathBuf> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let folder = new_folder("initdb");
        make(&folder);
        folder.join("data")
    })
}

/// Makes `<folder>/data`.
fn make(folder: &Path) {
    give(folder);
    let data = folder.join("data");
    // Sorts as a dictionary does (like the en_US of the Docker image), not by bytes: a query that
    // relies on the order of bytes without saying so has to fail here. Before PostgreSQL 15, or
    // without ICU, there is only the plain way.
    let linguistic = ["--locale-provider=icu", "--icu-locale=en-US"];
    if let Err(words) = initdb(&data, &linguistic).or_else(|_| initdb(&data, &[])) {
        panic!("initdb failed\n{words}");
    }
}

fn initdb(data: &Path, options: &[&str]) -> Result<(), String> {
    let (program, arguments) = as_its_user("initdb");
    let mut command = Command::new(program);
    command.args(arguments).arg("-D").arg(data).args([
        "--no-sync",
        "-A",
        "trust",
        "-U",
        "scrollback",
        "-E",
        "UTF8",
        "--locale=C",
    ]);
    let output = command
        .args(options)
        .output()
        .expect("initdb can be started");
    let words = || {
        format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    };
    if output.status.success() {
        Ok(())
    } else {
        Err(words())
    }
}

/// `cp`, for it keeps owners and modes; PostgreSQL insists on both.
fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp")
        .args([OsStr::new("-a"), from.as_os_str(), to.as_os_str()])
        .status();
    assert!(
        copied.expect("cp can be started").success(),
        "{} cannot be copied to {}",
        from.display(),
        to.display()
    );
}

/// Who runs PostgreSQL, which refuses root.
enum Runner {
    /// Not root: the user that runs the test.
    Myself,
    /// Root: a user without rights.
    User { uid: u32, gid: u32 },
    /// Root, and no such user may enter the folder for temporary files: a user namespace, in which
    /// root has another number.
    Namespace,
}

fn runner() -> &'static Runner {
    static RUNNER: OnceLock<Runner> = OnceLock::new();
    RUNNER.get_or_init(|| {
        if effective_uid() != 0 {
            return Runner::Myself;
        }
        let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let find = |name: &str| {
            let line = users
                .lines()
                .find(|line| line.split(':').next() == Some(name))?;
            let mut fields = line.split(':').skip(2);
            Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
        };
        let Some((uid, gid)) = find("postgres").or_else(|| find("nobody")) else {
            return Runner::Namespace;
        };
        let folder = new_folder("reachable");
        let entered = Command::new("setpriv")
            .args(become_user(uid, gid))
            .args(["sh", "-c", r#"cd "$1""#, "sh"])
            .arg(&folder)
            .output();
        match entered {
            Ok(output) if output.status.success() => Runner::User { uid, gid },
            _ => Runner::Namespace,
        }
    })
}

fn become_user(uid: u32, gid: u32) -> [String; 3] {
    [
        format!("--reuid={uid}"),
        format!("--regid={gid}"),
        "--clear-groups".to_owned(),
    ]
}

/// The program and first arguments that run one of PostgreSQL's programs as a user it accepts. The
/// process id stays that of the program: both tools replace themselves.
fn as_its_user(name: &str) -> (OsString, Vec<OsString>) {
    let program = programs().join(name).into_os_string();
    match *runner() {
        Runner::Myself => (program, vec![]),
        Runner::User { uid, gid } => (
            "setpriv".into(),
            become_user(uid, gid)
                .into_iter()
                .map(OsString::from)
                .chain([program])
                .collect(),
        ),
        Runner::Namespace => (
            "unshare".into(),
            ["--user", "--map-user=1000", "--map-group=1000"]
                .map(OsString::from)
                .into_iter()
                .chain([program])
                .collect(),
        ),
    }
}

fn give(folder: &Path) {
    if let Runner::User { uid, gid } = *runner() {
        chown(folder, Some(uid), Some(gid)).expect("root may give a folder away");
    }
}

fn effective_uid() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc is there on Linux");
    let line = status
        .lines()
        .find(|line| line.starts_with("Uid:"))
        .expect("the kernel writes it");
    line.split_whitespace()
        .nth(2)
        .and_then(|uid| uid.parse().ok())
        .expect("real, effective, saved, file system")
}

/// The folder of `initdb` and `postgres`: `SCROLLBACK_PG_BIN`, else the newest that Debian's
/// packages installed, else the PATH.
fn programs() -> &'static Path {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        if let Some(folder) = std::env::var_os("SCROLLBACK_PG_BIN") {
            return folder.into();
        }
        let version = |folder: &Path| folder.file_name()?.to_str()?.parse::<u32>().ok();
        let packaged = std::fs::read_dir("/usr/lib/postgresql")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|folder| folder.join("bin/initdb").is_file())
            .max_by_key(|folder| version(folder));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut path = std::env::split_paths(&path);
        packaged
            .map(|folder| folder.join("bin"))
            .or_else(|| {
                path.find(|folder| {
                    folder.join("initdb").is_file() && folder.join("postgres").is_file()
                })
            })
            .expect(
                "PostgreSQL is not installed: run ./dev test, or install postgresql, or set \
                 SCROLLBACK_PG_BIN",
            )
    })
}
