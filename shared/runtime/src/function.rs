//! One start for every function: configuration, connections, service, work, shutdown.

use std::fmt;
use std::future::Future;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use wire::{Ask, Endpoint, EndpointInfo};

use crate::ctx::{Clock, Ctx, Shared};
use crate::requests::Requests;
use crate::service::{QUEUE_GROUP, Registered, Service};
use crate::{Connection, Database, Fatal, Log, Meter, Reply, Request, Result, Settings, Telemetry, Vars, connect};

/// What was taken is finished within this; compose and `dev` wait five seconds longer before they kill.
const DRAIN_LIMIT: Duration = Duration::from_secs(25);
const HEALTH_INTERVAL: Duration = Duration::from_secs(5);
/// Older than this and the copy counts as unhealthy: three touches missed.
const HEALTH_AGE: Duration = Duration::from_secs(20);
/// The server's objections travel beside its answers; they arrive within this.
const OBJECTION_TIME: Duration = Duration::from_millis(50);

/// Who a function is; made by [`crate::this!`].
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Its name, for the service API and for NATS permissions.
    pub name: &'static str,
    /// Semantic version.
    pub version: &'static str,
    /// What it is for, in a sentence.
    pub description: &'static str,
}

type Setup<S> = Box<dyn FnOnce(Ctx) -> BoxFuture<'static, Result<S, Fatal>> + Send>;
type Bind<S> = Box<dyn FnOnce(Ctx<S>) -> Registered + Send>;
type Work<S> = Box<dyn FnOnce(Ctx<S>, Meter) -> BoxFuture<'static, Result<(), Fatal>> + Send>;

/// A function: who it is, what it answers, what it works on.
pub struct Function<S = ()> {
    identity: Identity,
    own_settings: &'static str,
    clock: Clock,
    setup: Setup<S>,
    endpoints: Vec<Bind<S>>,
    work: Vec<(EndpointInfo, &'static str, Work<S>)>,
}

impl<S> fmt::Debug for Function<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Function").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl Function {
    /// A function without state of its own.
    pub fn new(identity: Identity) -> Function {
        Function::with(identity, async |_| Ok(()))
    }
}

impl<S: Send + Sync + 'static> Function<S> {
    /// A function with state; `setup` runs before it registers, and may refuse to start.
    pub fn with<F>(identity: Identity, setup: impl FnOnce(Ctx) -> F + Send + 'static) -> Function<S>
    where
        F: Future<Output = Result<S, Fatal>> + Send + 'static,
    {
        Function {
            identity,
            own_settings: "",
            clock: Box::new(SystemTime::now),
            setup: Box::new(move |ctx| setup(ctx).boxed()),
            endpoints: Vec::new(),
            work: Vec::new(),
        }
    }

    /// Another clock than the system's for [`Ctx::cutoff_ms`]: a test cannot wait until messages are days old.
    #[must_use]
    pub fn clock(mut self, clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        self.clock = Box::new(clock);
        self
    }

    /// What `--help` says of the function's own variables: one a line, in the form of those every function has.
    #[must_use]
    pub fn settings(mut self, help: &'static str) -> Self {
        self.own_settings = help;
        self
    }

    /// Answers `endpoint` with `handler`.
    #[must_use]
    pub fn answer<Q, R, F>(
        mut self,
        endpoint: Endpoint<Q, R>,
        handler: impl Fn(Ctx<S>, Request<Q>) -> F + Clone + Send + Sync + 'static,
    ) -> Self
    where
        Q: Ask + Send + 'static,
        R: 'static,
        F: Future<Output = Result<Reply<R>>> + Send + 'static,
    {
        self.endpoints.push(Box::new(move |ctx| Registered {
            info: EndpointInfo {
                name: endpoint.name.to_owned(),
                subject: endpoint.subscription.to_owned(),
                queue_group: QUEUE_GROUP.to_owned(),
                metadata: [("about".to_owned(), endpoint.about.to_owned())].into(),
            },
            meter: Meter::new(endpoint.name),
            handler: Some(Arc::new(move |message: async_nats::Message| {
                let (ctx, handler) = (ctx.clone(), handler.clone());
                async move {
                    let ask = Q::parse(endpoint.names(&message.subject), &message.payload)?;
                    let reply = handler(ctx, Request { ask }).await?;
                    Ok((reply.body, reply.headers))
                }
                .boxed()
            })),
        }));
        self
    }

    /// Works on something from start to stop; `name` and `subject` show it in STATS beside the endpoints.
    #[must_use]
    pub fn work<F>(
        mut self,
        name: &'static str,
        subject: &'static str,
        about: &'static str,
        work: impl FnOnce(Ctx<S>, Meter) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), Fatal>> + Send + 'static,
    {
        let info = EndpointInfo {
            name: name.to_owned(),
            subject: subject.to_owned(),
            queue_group: self.identity.name.to_owned(),
            metadata: [("about".to_owned(), about.to_owned()), ("kind".to_owned(), "work".to_owned())].into(),
        };
        self.work.push((info, name, Box::new(move |ctx, meter| work(ctx, meter).boxed())));
        self
    }

    /// The process: arguments, log, start, signals, stop.
    pub fn run(self) -> ExitCode {
        let identity = self.identity;
        match std::env::args().nth(1).as_deref() {
            None => {}
            Some("--help" | "-h") => {
                println!(
                    "{} {}\n{}\n\n{HELP_SETTINGS}{}\n{HELP_REST}",
                    identity.name, identity.version, identity.description, self.own_settings
                );
                return ExitCode::SUCCESS;
            }
            Some("--version" | "-V") => {
                println!("{} {}", identity.name, identity.version);
                return ExitCode::SUCCESS;
            }
            Some("--health") => return health(),
            Some(other) => {
                eprintln!("{}: unknown argument {other:?}; configuration comes from the environment, see --help", identity.name);
                return ExitCode::from(2);
            }
        }
        match self.run_to_end() {
            Ok(()) => ExitCode::SUCCESS,
            Err(fatal) => {
                eprintln!("{}: {fatal}", identity.name);
                ExitCode::FAILURE
            }
        }
    }

    fn run_to_end(self) -> Result<(), Fatal> {
        let identity = self.identity;
        let vars = Vars::from_env()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|error| Fatal::new(format!("no tokio runtime: {error}")))?;
        let (telemetry, outcome) = runtime.block_on(async move {
            let telemetry = match Telemetry::start(&identity) {
                Ok(telemetry) => telemetry,
                Err(fatal) => return (Telemetry::default(), Err(fatal)),
            };
            (telemetry, self.until_signal(vars).await)
        });
        telemetry.stop();
        runtime.shutdown_timeout(Duration::from_secs(1));
        outcome
    }

    async fn until_signal(self, vars: Vars) -> Result<(), Fatal> {
        let no_signals = |error| Fatal::new(format!("signals cannot be received: {error}"));
        let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
        let stop = CancellationToken::new();
        let told = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("told to stop; finishing what was taken");
            told.cancel();
        });
        match self.start_with(vars, stop.clone()).await {
            Ok(running) => running.ended().await,
            Err(_) if stop.is_cancelled() => Ok(()),
            Err(fatal) => Err(fatal),
        }
    }

    /// Starts the function inside this process; a test stops it with [`Running::stop`].
    ///
    /// # Errors
    /// As a process would exit: wrong configuration, refused user, failed setup.
    pub async fn start(self, vars: Vars) -> Result<Running, Fatal> {
        self.start_with(vars, CancellationToken::new()).await
    }

    async fn start_with(self, vars: Vars, stop: CancellationToken) -> Result<Running, Fatal> {
        // Two providers in one tree would make rustls ask which; a second call is no error.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let identity = self.identity;
        let settings = Settings::read(&vars)?;
        let database = Database::new(&settings, identity.name)?;
        let nats = connect(&settings.nats, identity.name, &stop).await?;
        let log = Log::new(nats.clone(), settings.clone(), identity.name, stop.clone());
        let shared = Arc::new(Shared { identity, settings, vars, nats, database, log, clock: self.clock, stop: stop.clone() });
        let state = (self.setup)(Ctx { shared: shared.clone(), state: Arc::new(()) }).await?;
        let ctx = Ctx { shared: shared.clone(), state: Arc::new(state) };

        let mut registered: Vec<Registered> = self.endpoints.into_iter().map(|bind| bind(ctx.clone())).collect();
        let mut work = Vec::new();
        for (info, name, start) in self.work {
            let meter = Meter::new(name);
            registered.push(Registered { info, meter: meter.clone(), handler: None });
            work.push(start(ctx.clone(), meter));
        }
        let Settings { max_concurrent_requests, .. } = shared.settings;
        let deadline = shared.settings.request_deadline();
        let service = Service::new(shared.nats.client().clone(), identity, registered, max_concurrent_requests, deadline);
        let requests = Requests::connect(&shared.settings.nats, identity.name, &stop).await?;
        let asked = requests.connection.clone();
        let answering = service.start(requests, &stop).await?;
        tokio::time::sleep(OBJECTION_TIME).await;
        if let Some(objection) = shared.nats.refused().or_else(|| asked.refused()) {
            return Err(Fatal::new(format!("NATS refuses this user what it needs: {objection}; check nats/accounts.conf")));
        }
        let health = shared.settings.health_file.clone().map(|path| tokio::spawn(stay_healthy(path, shared.nats.clone(), stop.clone())));
        tracing::info!(function = identity.name, version = identity.version, "ready");

        let task = tokio::spawn(async move {
            let outcome = work_until(work, &stop).await;
            stop.cancel();
            if tokio::time::timeout(DRAIN_LIMIT, answering).await.is_err() {
                tracing::warn!("some requests were still under way after {} s", DRAIN_LIMIT.as_secs());
            }
            let _ = tokio::time::timeout(DRAIN_LIMIT, shared.nats.client().flush()).await;
            let _ = tokio::time::timeout(HEALTH_INTERVAL, shared.database.close()).await;
            if let Some(health) = health {
                health.abort();
            }
            outcome
        });
        Ok(Running { stop: ctx.shared.stop.clone(), task })
    }
}

/// Runs all work side by side until told to stop; the first failure ends everything.
async fn work_until(work: Vec<BoxFuture<'static, Result<(), Fatal>>>, stop: &CancellationToken) -> Result<(), Fatal> {
    let mut tasks: Vec<JoinHandle<Result<(), Fatal>>> = work.into_iter().map(tokio::spawn).collect();
    if tasks.is_empty() {
        stop.cancelled().await;
        return Ok(());
    }
    let (first, _, rest) = futures::future::select_all(tasks.drain(..)).await;
    stop.cancel();
    let mut outcome = flatten(first);
    for task in rest {
        let ended = tokio::time::timeout(DRAIN_LIMIT, task).await.unwrap_or(Ok(Ok(())));
        outcome = outcome.and(flatten(ended));
    }
    outcome
}

fn flatten(ended: Result<Result<(), Fatal>, tokio::task::JoinError>) -> Result<(), Fatal> {
    ended.unwrap_or_else(|error| Err(Fatal::new(format!("the work ended badly: {error}"))))
}

async fn stay_healthy(path: std::path::PathBuf, nats: Connection, stop: CancellationToken) {
    while !stop.is_cancelled() {
        if nats.client().connection_state() == async_nats::connection::State::Connected
            && let Err(error) = tokio::fs::write(&path, b"").await
        {
            tracing::warn!(path = %path.display(), %error, "the health file cannot be written");
        }
        tokio::time::sleep(HEALTH_INTERVAL).await;
    }
}

/// `--health`: whether the running copy touched its health file lately.
fn health() -> ExitCode {
    let Some(path) = std::env::var_os("HEALTH_FILE") else {
        eprintln!("--health needs HEALTH_FILE, the same as the running copy's");
        return ExitCode::from(2);
    };
    let fresh =
        std::fs::metadata(&path).and_then(|file| file.modified()).is_ok_and(|touched| touched.elapsed().is_ok_and(|age| age < HEALTH_AGE));
    if fresh { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

const HELP_SETTINGS: &str = "\
Configuration comes from the environment:
  NATS_URL                 nats://127.0.0.1:4222; several, separated by commas
  NATS_USER, NATS_PASS     or NATS_CREDS, a credentials file
  DATABASE_URL             postgres://user:password@host:5432/database
  DATABASE_CONNECTIONS     the most connections one copy keeps (4)
  MAX_CONCURRENT_REQUESTS  handled side by side in one copy (256)
  REQUEST_DEADLINE_MS      after this a request is answered with 503 (5000)
  MAX_TEXT_BYTES           the longest text; the same for every function (65536)
  EXPIRE_DAYS              how long messages are kept; 0: for ever; the same for every function (30)
  HEALTH_FILE              touched while healthy; --health looks at it
  OTEL_*                   the standard variables; silent when none is set
  RUST_LOG                 info,async_nats=warn,sqlx=warn";

const HELP_REST: &str = "\
NATS_USER, NATS_PASS and DATABASE_URL may stand in files named by NATS_USER_FILE and so on.

  --health   exits 0 when the running copy is healthy
  --version  prints the version";

/// A function that was started.
#[derive(Debug)]
pub struct Running {
    stop: CancellationToken,
    task: JoinHandle<Result<(), Fatal>>,
}

impl Running {
    /// Drains and waits for the end, as SIGTERM does.
    ///
    /// # Errors
    /// Why it ended, when not because it was told to.
    pub async fn stop(self) -> Result<(), Fatal> {
        self.stop.cancel();
        self.ended().await
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// Why it ended, when not because it was told to.
    pub async fn ended(self) -> Result<(), Fatal> {
        flatten(self.task.await)
    }
}
