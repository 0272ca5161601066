//! Child processes that cannot outlive the test process, whatever ends it.
//!
//! A janitor, one small shell per test process, reads a pipe of which only the test process holds
//! the other end. When that process is gone, also by SIGKILL, the pipe ends, and the janitor ends
//! what was started and removes the folder. A child registers with the janitor before it becomes
//! the server (`exec`, so that its process id and its signals are the server's own); until then it
//! holds the pipe open itself, so there is no moment in which a child runs that nobody would end.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{PipeWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::{SOON, eventually};

/// How much of a log a panic shows.
const LOG_LINES_SHOWN: usize = 60;

/// Reads "<how> <pid>" lines until the pipe ends, then ends those processes and removes the folder
/// `$1`. A process is known by its id and its start time, since ids are used again. A postmaster
/// gets SIGQUIT, which takes its backends with it (they are in sessions of their own), and SIGKILL
/// when that did not help within 5 s.
const JANITOR: &str = r#"
trap '' HUP INT TERM
look() {
  born= state=
  read -r stat 2>/dev/null <"/proc/$1/stat" || return 1
  set -- ${stat##*) }
  state=$1; shift 19; born=$1
}
same() { look "${1%:*}" && [ "$born" = "${1#*:}" ] && [ "$state" != Z ]; }
quit= kill=
while read -r how pid; do
  look "$pid" || continue
  case $how in quit) quit="$quit $pid:$born" ;; kill) kill="$kill $pid:$born" ;; esac
done
for one in $quit; do same "$one" && kill -s QUIT "${one%:*}" && kill -s CONT "${one%:*}"; done
for one in $kill; do same "$one" && kill -s KILL "${one%:*}"; done
tries=0
while [ $tries -lt 250 ]; do
  left=; for one in $quit $kill; do same "$one" && left=1; done
  [ -z "$left" ] && break
  tries=$((tries + 1)); sleep 0.02
done
for one in $quit; do same "$one" && kill -s KILL "${one%:*}"; done
rm -rf "$1" || { sleep 0.5; rm -rf "$1"; }
"#;

struct Janitor {
    pipe: PipeWriter,
    folder: PathBuf,
}

#[expect(
    clippy::zombie_processes,
    reason = "the janitor ends after this process, so nobody here can wait for it"
)]
fn janitor() -> &'static Janitor {
    static JANITOR_OF_PROCESS: OnceLock<Janitor> = OnceLock::new();
    JANITOR_OF_PROCESS.get_or_init(|| {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("it is after 1970")
            .as_nanos();
        let folder =
            std::env::temp_dir().join(format!("scrollback-test-{}-{now}", std::process::id()));
        let (reader, pipe) = std::io::pipe().expect("a pipe");
        Command::new("sh")
            .args([
                OsStr::new("-c"),
                OsStr::new(JANITOR),
                OsStr::new("janitor"),
                folder.as_os_str(),
            ])
            .current_dir("/")
            .stdin(reader)
            // Not those of the test: a `cargo test | less` would wait for the janitor too.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Ctrl-C and a test runner's kill go to the group of the test.
            .process_group(0)
            .spawn()
            .expect("sh can be started");
        std::fs::create_dir(&folder).expect("the folder for temporary files can be written");
        // PostgreSQL's user passes through.
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o711))
            .expect("the folder is ours");
        Janitor { pipe, folder }
    })
}

/// A new, empty folder, removed with the test process at the latest.
pub(crate) fn new_folder(name: &str) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let folder = janitor()
        .folder
        .join(format!("{name}-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
    std::fs::create_dir(&folder).expect("the folder for temporary files can be written");
    std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o711))
        .expect("the folder is ours");
    folder
}

/// What the janitor does to a process.
#[derive(Clone, Copy)]
pub(crate) enum EndBy {
    Kill,
    Quit,
}

impl EndBy {
    fn word(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Quit => "quit",
        }
    }
}

/// Registers a process with the janitor that a server started by itself.
pub(crate) fn register_with_janitor(end: EndBy, pid: u32) {
    // One write, shorter than PIPE_BUF: lines of several writers never mix.
    let line = format!("{} {pid}\n", end.word());
    (&janitor().pipe)
        .write_all(line.as_bytes())
        .expect("the janitor reads as long as we live");
}

/// A command that runs `program` under the janitor's eye; arguments, environment and output are the
/// caller's. Its standard input is empty.
pub(crate) fn kept(end: EndBy, program: &OsStr) -> Command {
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            r#"echo "$1 $$" >&0; shift; exec "$@" </dev/null"#,
            "sh",
            end.word(),
        ])
        .arg(program)
        .stdin(
            janitor()
                .pipe
                .try_clone()
                .expect("a pipe can be duplicated"),
        )
        .process_group(0);
    command
}

/// Sends a signal by its name without `SIG`. The shell's own `kill`: the program of that name is
/// not on every machine.
pub(crate) fn signal(pid: u32, name: &str) {
    let sent = Command::new("sh")
        .args(["-c", r#"kill -s "$1" "$2""#, "sh", name, &pid.to_string()])
        .stderr(Stdio::null())
        .status();
    assert!(
        sent.expect("sh can be started").success(),
        "SIG{name} to process {pid}: there is no such process"
    );
}

/// The state and the parent of a process, as in `/proc/<pid>/stat`; `None` when it is gone or a
/// zombie.
pub(crate) fn look(pid: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    (state != 'Z' && state != 'X').then_some((state, parent))
}

/// Stops processes and waits until each of them really stands still.
pub(crate) async fn stand_still(pids: &[u32]) {
    for &pid in pids {
        // A backend may have ended since it was listed.
        if look(pid).is_some() {
            signal(pid, "STOP");
        }
    }
    eventually("stopped processes stand still", SOON, async || {
        pids.iter()
            .all(|&pid| look(pid).is_none_or(|(state, _)| state == 'T'))
            .then_some(())
    })
    .await;
}

/// A child with its output in files, ended with SIGKILL when dropped.
pub(crate) struct Child {
    what: String,
    child: Mutex<std::process::Child>,
    id: u32,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Child {
    /// Starts a command of [`kept`], its output appended to `<folder>/<what>.stdout` and
    /// `….stderr`.
    pub(crate) fn start(what: &str, mut command: Command, folder: &Path) -> Self {
        let stdout = folder.join(format!("{what}.stdout"));
        let stderr = folder.join(format!("{what}.stderr"));
        let append = |path: &Path| {
            File::options()
                .create(true)
                .append(true)
                .open(path)
                .expect("a log can be written")
        };
        let child = command
            .stdout(append(&stdout))
            .stderr(append(&stderr))
            .spawn()
            .expect("sh can be started");
        Self {
            what: what.to_owned(),
            id: child.id(),
            child: Mutex::new(child),
            stdout,
            stderr,
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    fn child(&self) -> MutexGuard<'_, std::process::Child> {
        // What a panic elsewhere left is still a process that can be asked and killed.
        self.child
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(crate) fn status(&self) -> Option<ExitStatus> {
        self.child().try_wait().expect("a child can be waited for")
    }

    pub(crate) fn stdout(&self) -> String {
        read(&self.stdout)
    }

    pub(crate) fn stderr(&self) -> String {
        read(&self.stderr)
    }

    pub(crate) fn signal(&self, name: &str) {
        // Under the lock, and only while the child is not reaped: its id cannot belong to another
        // process.
        let mut child = self.child();
        if child
            .try_wait()
            .expect("a child can be waited for")
            .is_none()
        {
            signal(self.id, name);
        }
    }

    pub(crate) async fn exited(&self, within: Duration) -> ExitStatus {
        let what = format!("{} (process {}) has ended", self.what, self.id);
        let mut deadline = tokio::time::interval(crate::POLL_INTERVAL);
        let started = std::time::Instant::now();
        loop {
            if let Some(status) = self.status() {
                return status;
            }
            assert!(
                started.elapsed() < within,
                "{what}: not within {within:?}\n{}",
                self.log()
            );
            deadline.tick().await;
        }
    }

    /// The end of what it wrote, for a panic.
    pub(crate) fn log(&self) -> String {
        let written = format!("{}{}", self.stdout(), self.stderr());
        let lines: Vec<&str> = written.lines().collect();
        let shown = lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n");
        format!(
            "---- the end of the log of {} (process {}) ----\n{shown}\n----",
            self.what, self.id
        )
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let mut child = self.child();
        // Errors mean that it has ended already.
        _ = child.kill();
        _ = child.wait();
    }
}

fn read(path: &Path) -> String {
    // A test may look after its world, and the files with it, is gone.
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

/// A running function: the real binary as a process of its own. Ended with SIGKILL when dropped,
/// and in a test that panics its log is printed then.
pub struct Process {
    child: Child,
    instance: Option<String>,
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.child.log());
        }
    }
}

impl Process {
    pub(crate) fn new(child: Child, instance: Option<String>) -> Self {
        Self { child, instance }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The id under which it answers in the service API (`$SRV.STATS.<name>.<id>`); `None` after
    /// [`World::launch`](crate::World::launch), which does not wait for it.
    pub fn instance(&self) -> Option<&str> {
        self.instance.as_deref()
    }

    /// SIGKILL, and waits for the end. Also ends a paused process.
    pub async fn kill(self) {
        self.child.signal("KILL");
        self.child.exited(SOON).await;
    }

    /// SIGTERM, and waits for the end.
    ///
    /// # Panics
    ///
    /// When it still runs after [`SOON`].
    pub async fn terminate(self) -> ExitStatus {
        self.child.signal("TERM");
        self.child.exited(SOON).await
    }

    /// Sends a signal by its name without `SIG` (`"TERM"`, `"HUP"`) and does not wait. Nothing
    /// happens when the process has ended.
    pub fn signal(&self, name: &str) {
        self.child.signal(name);
    }

    /// Waits until it ends by itself, or by an earlier [`signal`](Self::signal).
    ///
    /// # Panics
    ///
    /// When it still runs after `within`.
    pub async fn exited(&self, within: Duration) -> ExitStatus {
        self.child.exited(within).await
    }

    /// SIGSTOP: it keeps its connections and does nothing. Returns when it stands still.
    pub async fn pause(&self) {
        stand_still(&[self.child.id()]).await;
    }

    /// SIGCONT: goes on after [`pause`](Self::pause).
    pub fn resume(&self) {
        self.child.signal("CONT");
    }

    /// Whether it has not ended yet; a paused process runs.
    pub fn is_running(&self) -> bool {
        self.child.status().is_none()
    }

    /// What it wrote to standard error so far; the functions log there.
    pub fn stderr(&self) -> String {
        self.child.stderr()
    }

    /// What it wrote to standard output so far.
    pub fn stdout(&self) -> String {
        self.child.stdout()
    }
}
