//! One test's world.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::sync::{Mutex, OnceCell};

use crate::binaries::binary;
use crate::child::{Child, EndBy, Process, kept, new_folder};
use crate::{NatsServer, Postgres, SOON};

/// How long to wait for an answer before asking again: until it subscribes, a function cannot hear
/// the question.
const PING_EVERY: Duration = Duration::from_millis(20);

/// One test's world: a nats-server of its own (the configuration in `nats/`, real users and
/// permissions) and an empty database of its own. All of it is gone when dropped, or when the test
/// process ends, however it ends.
pub struct World {
    nats: NatsServer,
    postgres: Cluster,
    database: String,
    folder: PathBuf,
    operator: OnceCell<async_nats::Client>,
    /// Service ids seen. Held while a function is started, so that the one new id is the new
    /// function's.
    instances: Mutex<HashSet<String>>,
    processes: AtomicU32,
}

enum Cluster {
    Shared(&'static Postgres),
    Own(Postgres),
}

/// What a [`World`] should be like, where it should differ. Made by [`World::builder`].
#[derive(Default)]
pub struct WorldBuilder {
    bare: bool,
    own_postgres: bool,
    administrator: bool,
    nats_settings: Vec<(String, String)>,
}

impl WorldBuilder {
    /// Nothing applied: no stream, no schema.
    pub fn bare(mut self) -> Self {
        self.bare = true;
        self
    }

    /// A PostgreSQL cluster of its own, which may be stopped, killed, paused and started.
    pub fn own_postgres(mut self) -> Self {
        self.own_postgres = true;
        self
    }

    /// A NATS user `administrator` without limits in the account, for what no other user may do:
    /// deleting the stream, restoring a backup, making another stream. The other users stay as they
    /// are.
    pub fn administrator(mut self) -> Self {
        self.administrator = true;
        self
    }

    /// Another value for a key of `nats/nats-server.conf`, such as `("max_payload", "8MB")` or
    /// `("max_file_store", "64MB")`. The file must have a line `<key>: …`.
    pub fn nats_setting(mut self, key: &str, value: &str) -> Self {
        self.nats_settings.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Starts the servers and, unless [`bare`](Self::bare), applies stream, consumer and schema.
    ///
    /// # Panics
    ///
    /// When a server is not installed or does not start, or `stream-bootstrap` does not answer,
    /// with its log.
    pub async fn start(self) -> World {
        let postgres = async {
            let cluster = match self.own_postgres {
                true => Cluster::Own(Postgres::own().await),
                false => Cluster::Shared(Postgres::shared().await),
            };
            let database = create_database(&cluster).await;
            (cluster, database)
        };
        let nats = NatsServer::new(&self.nats_settings, self.administrator);
        let ((postgres, database), nats) = tokio::join!(postgres, nats);
        let world = World {
            nats,
            postgres,
            database,
            folder: new_folder("world"),
            operator: OnceCell::new(),
            instances: Mutex::default(),
            processes: AtomicU32::new(0),
        };
        if !self.bare {
            world.bootstrap().await;
        }
        world
    }
}

impl World {
    /// Servers up, and the real `stream-bootstrap` run until it answers, then ended by SIGTERM:
    /// stream, consumer and schema are in place, no function runs.
    ///
    /// # Panics
    ///
    /// As [`WorldBuilder::start`].
    pub async fn start() -> Self {
        Self::builder().start().await
    }

    /// Servers up, nothing applied.
    ///
    /// # Panics
    ///
    /// As [`WorldBuilder::start`].
    pub async fn bare() -> Self {
        Self::builder().bare().start().await
    }

    /// Like [`start`](Self::start), with a PostgreSQL cluster of its own, which may be stopped and
    /// started.
    ///
    /// # Panics
    ///
    /// As [`WorldBuilder::start`].
    pub async fn with_own_postgres() -> Self {
        Self::builder().own_postgres().start().await
    }

    /// A world that differs from [`start`](Self::start).
    pub fn builder() -> WorldBuilder {
        WorldBuilder::default()
    }

    /// This world's nats-server.
    pub fn nats(&self) -> &NatsServer {
        &self.nats
    }

    /// The PostgreSQL in which this world's database lies.
    pub fn postgres(&self) -> &Postgres {
        match &self.postgres {
            Cluster::Shared(postgres) => postgres,
            Cluster::Own(postgres) => postgres,
        }
    }

    /// `DATABASE_URL` of this world's database.
    pub fn database_url(&self) -> String {
        self.postgres().url(&self.database)
    }

    /// The environment of a function: `NATS_URL`, `NATS_USER`, `NATS_PASS`, `DATABASE_URL`.
    ///
    /// # Panics
    ///
    /// When `nats/accounts.conf` has no user of that name.
    pub fn vars(&self, function: &str) -> HashMap<String, String> {
        let vars = [
            ("NATS_URL", self.nats.url()),
            ("NATS_USER", function.to_owned()),
            ("NATS_PASS", self.nats.password(function)),
            ("DATABASE_URL", self.database_url()),
        ];
        vars.into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }

    /// How to connect as a user of `nats/accounts.conf`: credentials and the private inbox prefix
    /// `_INBOX.<user>`, which the permissions demand. For tests that want other options besides,
    /// such as an event callback.
    ///
    /// # Panics
    ///
    /// When there is no such user.
    pub fn connect_options(&self, user: &str) -> async_nats::ConnectOptions {
        let password = self.nats.password(user);
        async_nats::ConnectOptions::with_user_and_password(user.to_owned(), password)
            .custom_inbox_prefix(format!("_INBOX.{user}"))
            .request_timeout(Some(SOON / 3))
            .name("test")
    }

    /// A client with the rights of a user of `nats/accounts.conf`: `publisher`, `operator`, or a
    /// function's.
    ///
    /// # Panics
    ///
    /// When there is no such user, or the server does not take the connection.
    pub async fn client(&self, user: &str) -> async_nats::Client {
        let connected = self.connect_options(user).connect(self.nats.url()).await;
        connected.unwrap_or_else(|error| panic!("{user} cannot connect to nats-server: {error}"))
    }

    /// A pool of at most 5 connections to this world's database, for looking into it. It gives up
    /// after [`SOON`].
    ///
    /// # Panics
    ///
    /// When PostgreSQL does not answer.
    pub async fn database(&self) -> sqlx::PgPool {
        let connected = PgPoolOptions::new()
            .max_connections(5)
            .acquire_timeout(SOON)
            .connect(&self.database_url())
            .await;
        connected.unwrap_or_else(|error| panic!("PostgreSQL does not answer: {error}"))
    }

    /// Stores 40,000 messages in 2,000 conversations, `a-7` to `b-7` and so on, past the stream:
    /// enough for PostgreSQL to plan as for many.
    ///
    /// # Panics
    ///
    /// When PostgreSQL does not take them.
    pub async fn store_conversations(&self) {
        let stored = sqlx::raw_sql(
            "insert into rooms (name) select 'dm.a-' || n || '.b-' || n
               from generate_series(0, 1999) as n;
             insert into messages (seq, room_id, sender, recipient, id, derived, text,
                                   sent_at, received_at)
             select n, rooms.id, 'a-' || n % 2000, 'b-' || n % 2000, 'id-' || n, false,
                    'hello', now(), now()
               from generate_series(1, 40000) as n
               join rooms on rooms.name = 'dm.a-' || n % 2000 || '.b-' || n % 2000;
             analyze",
        );
        stored
            .execute(&self.database().await)
            .await
            .expect("messages are stored");
    }

    /// The streams and consumers in `nats/`, each changed by `edit` (its file name, its
    /// configuration), in a folder of this world. `stream-bootstrap` takes them when started with
    /// `BOOTSTRAP_CONFIG` set to it.
    ///
    /// # Panics
    ///
    /// When those files cannot be read.
    pub fn with_edited_config(&self, edit: impl Fn(&str, &mut serde_json::Value)) -> String {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../nats");
        let to = self.folder.join("config");
        for folder in ["streams", "consumers"] {
            std::fs::create_dir_all(to.join(folder)).expect("a folder in this world's own");
            for file in std::fs::read_dir(from.join(folder)).expect("a folder in nats") {
                let file = file.expect("a folder in nats");
                let text = std::fs::read(file.path()).expect("a readable file");
                let mut object = serde_json::from_slice(&text).expect("a JSON file");
                edit(&file.file_name().to_string_lossy(), &mut object);
                std::fs::write(to.join(folder).join(file.file_name()), object.to_string())
                    .expect("a file in this world's own folder");
            }
        }
        to.to_string_lossy().into_owned()
    }

    /// A running `stream-bootstrap` that lets what nobody acknowledges come again after `ack_wait`,
    /// not thirty seconds.
    ///
    /// # Panics
    ///
    /// As [`spawn`](Self::spawn).
    pub async fn with_ack_wait(&self, ack_wait: Duration) -> Process {
        let config = self.with_edited_config(|_, object| {
            if let Some(configured) = object.get_mut("ack_wait") {
                *configured = serde_json::json!(
                    u64::try_from(ack_wait.as_nanos()).expect("nanoseconds that fit")
                );
            }
        });
        self.spawn_with("stream-bootstrap", &[("BOOTSTRAP_CONFIG", &config)])
            .await
    }

    /// Starts a function's real binary with [`vars`](Self::vars) and waits until it answers
    /// `$SRV.PING.<name>`.
    ///
    /// # Panics
    ///
    /// When it ends instead, or does not answer within [`SOON`]; with its log.
    pub async fn spawn(&self, name: &str) -> Process {
        self.spawn_with(name, &[]).await
    }

    /// Like [`spawn`](Self::spawn), with `extra` environment variables.
    ///
    /// # Panics
    ///
    /// As [`spawn`](Self::spawn).
    pub async fn spawn_with(&self, name: &str, extra: &[(&str, &str)]) -> Process {
        let mut known = self.instances.lock().await;
        let child = self.child(name, extra);
        let instance = self.new_instance(name, &child, &known).await;
        known.insert(instance.clone());
        Process::new(child, Some(instance))
    }

    /// Like [`spawn_with`](Self::spawn_with), and does not wait: for a function whose servers are
    /// away, or that is to be signalled at once.
    pub fn launch(&self, name: &str, extra: &[(&str, &str)]) -> Process {
        Process::new(self.child(name, extra), None)
    }

    /// A function's real binary with [`vars`](Self::vars) as a command, for a test that expects it
    /// to end by itself: add variables, then `.output().await`. Killed when its future is dropped.
    pub fn command(&self, name: &str) -> tokio::process::Command {
        self.command_as(name, name)
    }

    /// Like [`command`](Self::command), for a binary that is no function, such as `demo`: with the
    /// variables of `user`.
    pub fn command_as(&self, binary: &str, user: &str) -> tokio::process::Command {
        let mut command = tokio::process::Command::from(self.std_command(binary, user));
        command.kill_on_drop(true);
        command
    }

    fn std_command(&self, name: &str, user: &str) -> std::process::Command {
        let mut command = kept(EndBy::Kill, binary(name).as_os_str());
        // Nothing from the surroundings, or a developer's DATABASE_URL and OTEL_* would take part
        // in the test.
        command.env_clear();
        for name in ["PATH", "HOME", "TMPDIR", "RUST_BACKTRACE", "RUST_LOG"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.envs(self.vars(user));
        command
    }

    fn child(&self, name: &str, extra: &[(&str, &str)]) -> Child {
        let mut command = self.std_command(name, name);
        command.envs(extra.iter().copied());
        let what = format!("{name}.{}", self.processes.fetch_add(1, Ordering::Relaxed));
        Child::start(&what, command, &self.folder)
    }

    /// Asks who serves as `name` until one answers that is not `known`.
    async fn new_instance(&self, name: &str, child: &Child, known: &HashSet<String>) -> String {
        let operator = self.operator.get_or_init(|| self.client("operator")).await;
        let inbox = operator.new_inbox();
        let mut answers = operator
            .subscribe(inbox.clone())
            .await
            .expect("a client that is not closed");
        let deadline = Instant::now() + SOON;
        loop {
            let question =
                operator.publish_with_reply(format!("$SRV.PING.{name}"), inbox.clone(), "".into());
            question.await.expect("a client that is not closed");
            while let Ok(Some(answer)) = tokio::time::timeout(PING_EVERY, answers.next()).await {
                let answer: serde_json::Value =
                    serde_json::from_slice(&answer.payload).unwrap_or_default();
                match answer["id"].as_str() {
                    Some(id) if !known.contains(id) => return id.to_owned(),
                    _ => {}
                }
            }
            if let Some(status) = child.status() {
                panic!(
                    "{name} ended with {status} instead of answering\n{}",
                    child.log()
                );
            }
            assert!(
                Instant::now() < deadline,
                "{name} does not answer $SRV.PING.{name} within {SOON:?}\n{}",
                child.log()
            );
        }
    }

    async fn bootstrap(&self) {
        let bootstrap = self.spawn("stream-bootstrap").await;
        let log = bootstrap.stderr();
        let status = bootstrap.terminate().await;
        assert!(
            status.success(),
            "stream-bootstrap ended with {status}\n{log}"
        );
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The janitor removes what cannot be removed now. The database stays until its cluster
        // goes: dropping it takes longer.
        _ = std::fs::remove_dir_all(&self.folder);
    }
}

async fn create_database(cluster: &Cluster) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("world_{}", COUNT.fetch_add(1, Ordering::Relaxed));
    let postgres = match cluster {
        Cluster::Shared(postgres) => postgres,
        Cluster::Own(postgres) => postgres,
    };
    let mut connection = PgConnection::connect(&postgres.url("postgres"))
        .await
        .expect("PostgreSQL answered a moment ago");
    // template0, because nobody can be connected to it: autovacuum in template1 makes this
    // statement wait. The name is ours, so there is nothing to quote.
    let created = sqlx::raw_sql(AssertSqlSafe(format!(
        "create database {name} template template0"
    )))
    .execute(&mut connection)
    .await;
    created.unwrap_or_else(|error| panic!("create database {name}: {error}"));
    _ = connection.close().await;
    name
}
