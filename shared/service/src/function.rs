//! One start for every function: configuration, connections, service, work, shutdown.

use std::fmt;
use std::future::Future;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_nats::connection::State;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::config::{
    Declared, NatsVariables, RequestVariables, STANDARD, Settings, Variable, Vars, help, json,
    unknown,
};
use crate::ctx::{Clock, Ctx, Shared};
use crate::job::{self, Description, Job};
use crate::meter::Meter;
use crate::request::{Reply, Request};
use crate::requests;
use crate::requests::{Answering, QueueLimits};
use crate::responder::{QUEUE_GROUP, Registered, Service};
use crate::telemetry::{Telemetry, new_instance_id};
use base::discovery::EndpointInfo;
use base::endpoint::{Endpoint, ParseRequest};
use base::error::{Fatal, Result};
use nats::connection::{Connection, connect};

/// Stopping takes at most this, all of it together; compose and `dev` wait 30 s before they kill.
const STOP_LIMIT: Duration = Duration::from_secs(25);
/// What of it is for finishing what was taken. The rest is for the telemetry's last export and for tokio's threads.
const DRAIN_LIMIT: Duration = Duration::from_secs(18);
/// How long sending the last replies may take, and as long closing the database.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take where NATS is away and would have to come back first.
const AWAY_LIMIT: Duration = Duration::from_secs(1);
/// What of that is left for sending the last replies, and as much for closing the database.
const FLUSH_RESERVE: Duration = Duration::from_millis(500);
const HEALTH_INTERVAL: Duration = Duration::from_secs(5);
/// Older than this and the replica counts as unhealthy: three touches missed.
const HEALTH_AGE: Duration = Duration::from_secs(20);
/// The server's objections travel beside its answers; they arrive within this.
const OBJECTION_TIME: Duration = Duration::from_millis(50);
/// Between attempts to hear ourselves while starting.
const PING_PAUSE: Duration = Duration::from_millis(200);

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
type Assemble = Box<dyn FnOnce(Ctx) -> BoxFuture<'static, Result<Assembled, Fatal>> + Send>;

/// A function: who it is, what it answers, what it works on.
pub struct Function<S = ()> {
    identity: Identity,
    /// Of this replica, for the service API and for telemetry.
    id: String,
    /// Every variable it reads.
    variables: Vec<Variable>,
    clock: Clock,
    setup: Setup<S>,
    endpoints: Vec<Bind<S>>,
    work: Vec<(EndpointInfo, &'static str, Work<S>)>,
}

impl<S> fmt::Debug for Function<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Function")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
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
            id: new_instance_id(),
            variables: [NatsVariables::VARIABLES, RequestVariables::VARIABLES].concat(),
            clock: Arc::new(SystemTime::now),
            setup: Box::new(move |ctx| setup(ctx).boxed()),
            endpoints: Vec::new(),
            work: Vec::new(),
        }
    }

    /// Another clock than the system's for [`Ctx::clock`]: a test cannot wait until messages are days old.
    #[must_use]
    pub fn clock(mut self, clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Declares variables that the function reads with [`Ctx::read_settings`]. `--help` and the
    /// configuration reference show them, and a variable with a similar name is warned about.
    #[must_use]
    pub fn settings<T: Declared>(mut self) -> Self {
        self.variables.extend_from_slice(T::VARIABLES);
        self
    }

    /// Answers `endpoint` with `handler`.
    ///
    /// **Order.** Requests of one caller are started in the order in which they reached this replica, of all
    /// endpoints together, and the handler's future is polled for the first time before the next request is started.
    /// So whatever a handler does before it first has to wait, such as taking a place in a queue, happens in the order
    /// of arrival. The caller is the user whom the subject names, otherwise whose inbox the answer goes to. What
    /// a handler does then holds up every other request: no blocking, no long computing before the first await.
    ///
    /// Keep the order's part synchronous. `lock().await` on a lock that is free may be counted on; anything that goes
    /// through another task, or that was pending once, may not.
    #[must_use]
    pub fn answer<Q, R, F>(
        mut self,
        endpoint: Endpoint<Q, R>,
        handler: impl Fn(Ctx<S>, Request<Q>) -> F + Clone + Send + Sync + 'static,
    ) -> Self
    where
        Q: ParseRequest + Send + 'static,
        R: 'static,
        F: Future<Output = Result<Reply<R>>> + Send + 'static,
    {
        self.endpoints.push(Box::new(move |ctx| Registered {
            info: EndpointInfo {
                name: endpoint.name.to_owned(),
                subject: endpoint.template.subscription(),
                queue_group: QUEUE_GROUP.to_owned(),
                metadata: [("about".to_owned(), endpoint.about())].into(),
            },
            meter: Meter::new(endpoint.name),
            user_after: endpoint.template.prefix_of_user(),
            handler: Some(Arc::new(move |subject: String, payload: Bytes| {
                let (ctx, handler) = (ctx.clone(), handler.clone());
                async move {
                    let ask = Q::parse(endpoint.template.names_of(&subject), &payload)?;
                    let reply = handler(ctx, Request { body: ask }).await?;
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
            metadata: [
                ("about".to_owned(), about.to_owned()),
                ("kind".to_owned(), "work".to_owned()),
            ]
            .into(),
        };
        self.work.push((
            info,
            name,
            Box::new(move |ctx, meter| work(ctx, meter).boxed()),
        ));
        self
    }

    /// Repeats a job from start to stop; its description shows it in STATS beside the endpoints.
    #[must_use]
    pub fn job<J: Job<S>>(self) -> Self {
        let Description {
            name,
            subject,
            about,
            ..
        } = J::DESCRIPTION;
        self.work(name, subject, about, job::repeat::<S, J>)
    }

    /// The process: arguments, log, start, signals, stop.
    pub fn run(self) -> ExitCode {
        self.into_plan().run()
    }

    /// Starts the function inside this process; a test stops it with [`Running::stop`].
    ///
    /// # Errors
    /// As a process would exit: wrong configuration, refused user, failed setup.
    pub async fn start(self, vars: Vars) -> Result<Running, Fatal> {
        self.into_plan().start(vars).await
    }

    fn into_plan(self) -> Plan {
        let Function {
            identity,
            id,
            variables,
            clock,
            setup,
            endpoints,
            work,
        } = self;
        let assemble = move |ctx: Ctx| {
            async move {
                let shared = ctx.shared.clone();
                let state = Arc::new(setup(ctx).await?);
                let ctx = Ctx { shared, state };
                let mut assembled = Assembled {
                    registered: endpoints
                        .into_iter()
                        .map(|bind| bind(ctx.clone()))
                        .collect(),
                    work: Vec::new(),
                };
                for (info, name, start) in work {
                    let meter = Meter::new(name);
                    assembled.registered.push(Registered {
                        info,
                        meter: meter.clone(),
                        handler: None,
                        user_after: None,
                    });
                    assembled.work.push(start(ctx.clone(), meter));
                }
                Ok(assembled)
            }
            .boxed()
        };
        Plan {
            identity,
            id,
            variables,
            clock,
            assemble: Box::new(assemble),
        }
    }
}

/// What a function serves and works on, once its state is there.
struct Assembled {
    registered: Vec<Registered>,
    work: Vec<BoxFuture<'static, Result<(), Fatal>>>,
}

/// A [`Function`] without its type of state. Everything below is compiled once, in this crate, and
/// not again in each of ten binaries.
struct Plan {
    identity: Identity,
    id: String,
    variables: Vec<Variable>,
    clock: Clock,
    assemble: Assemble,
}

impl Plan {
    fn run(self) -> ExitCode {
        let identity = self.identity;
        match std::env::args().nth(1).as_deref() {
            None => {}
            Some("--help" | "-h") => {
                println!(
                    "{} {}\n{}\n\n{HELP_SETTINGS}\n{}\n{HELP_REST}",
                    identity.name,
                    identity.version,
                    identity.description,
                    help(&self.documented())
                );
                return ExitCode::SUCCESS;
            }
            Some("--variables") => {
                println!("{:#}", json(&self.documented()));
                return ExitCode::SUCCESS;
            }
            Some("--version" | "-V") => {
                println!("{} {}", identity.name, identity.version);
                return ExitCode::SUCCESS;
            }
            Some("--health") => return health(),
            Some(other) => {
                eprintln!(
                    "{}: unknown argument {other:?}; configuration comes from the environment, see --help",
                    identity.name
                );
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

    /// The variables it reads, and those that libraries read.
    fn documented(&self) -> Vec<Variable> {
        [self.variables.as_slice(), &STANDARD].concat()
    }

    fn run_to_end(self) -> Result<(), Fatal> {
        let identity = self.identity;
        let vars = Vars::from_env();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|error| Fatal::new(format!("no tokio runtime: {error}")))?;
        let (telemetry, outcome) = runtime.block_on(async move {
            let telemetry = match Telemetry::start(&identity, &self.id) {
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
        let (told, name) = (stop.clone(), self.identity.name);
        tokio::spawn(async move {
            let mut signal = async || {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            signal().await;
            tracing::info!("told to stop; finishing what was taken");
            end_late(name);
            told.cancel();
            signal().await;
            eprintln!("{name}: told to stop again; leaving at once");
            std::process::exit(1);
        });
        match self.start_with(vars, stop.clone()).await {
            Ok(running) => running.ended().await,
            Err(_) if stop.is_cancelled() => Ok(()),
            Err(fatal) => Err(fatal),
        }
    }

    /// Boxed here: an async function's body is compiled in the crate that awaits it.
    fn start(self, vars: Vars) -> BoxFuture<'static, Result<Running, Fatal>> {
        self.start_with(vars, CancellationToken::new()).boxed()
    }

    async fn start_with(self, vars: Vars, stop: CancellationToken) -> Result<Running, Fatal> {
        // Two providers in one tree would make rustls ask which; a second call is no error.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let identity = self.identity;
        for sentence in unknown(&vars, &self.variables) {
            tracing::warn!("configuration: {sentence}");
        }
        let settings = Settings::read(&vars)?;
        let nats = connect(&settings.nats, identity.name, &stop).await?;
        let (failed, failures) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            identity,
            settings,
            vars,
            declared: self.variables,
            nats,
            clock: self.clock,
            health_checks: Mutex::default(),
            closing: Mutex::default(),
            stop: stop.clone(),
            failed,
        });
        let assembled = (self.assemble)(Ctx {
            shared: shared.clone(),
            state: Arc::new(()),
        });
        let Assembled {
            registered,
            mut work,
        } = tokio::select! {
            assembled = assembled => assembled?,
            () = stop.cancelled() => return Err(Fatal::new("stopped while starting")),
        };
        let service = Service::new(shared.nats.client().clone(), identity, self.id, registered);
        let answering =
            Answering::start(service.clone(), receiving(&shared.settings), &stop).await?;
        hear_itself(&service, &shared.nats, &answering, &stop).await?;
        let health = shared.settings.requests.health_file.clone();
        let health = health.map(|path| tokio::spawn(stay_healthy(path, service, shared.clone())));
        tracing::info!(
            function = identity.name,
            version = identity.version,
            "ready"
        );

        work.push(answering.ended().boxed());
        let stopping = stop.clone();
        let task = tokio::spawn(async move {
            let outcome = work_until(work, &shared.nats, failures, &stopping).await;
            if let Some(health) = health {
                health.abort();
            }
            outcome.leave(&shared).await
        });
        Ok(Running { stop, task })
    }
}

/// How requests are received, by the settings.
fn receiving(settings: &Settings) -> requests::Setup<'_> {
    requests::Setup {
        nats: &settings.nats,
        permits: settings.requests.max_concurrent_requests,
        limits: QueueLimits {
            requests: settings.requests.max_waiting_requests,
            bytes: settings.requests.max_waiting_bytes,
        },
        deadline: settings.request_deadline(),
    }
}

/// Waits until the function answers itself, and refuses to start when it may not do what it needs.
async fn hear_itself(
    service: &Service,
    nats: &Connection,
    answering: &Answering,
    stop: &CancellationToken,
) -> Result<(), Fatal> {
    let mut said = false;
    loop {
        let heard = service.ping_self().await;
        tokio::time::sleep(OBJECTION_TIME).await;
        if let Some(objection) = nats.refused().or_else(|| answering.refused()) {
            return Err(Fatal::new(format!(
                "NATS refuses this user what it needs: {objection}; check nats/accounts.conf"
            )));
        }
        let Err(why) = heard else { return Ok(()) };
        if !said {
            tracing::warn!(why, "waiting for an answer to our own $SRV.PING");
            said = true;
        }
        tokio::select! {
            () = tokio::time::sleep(PING_PAUSE) => {}
            () = stop.cancelled() => return Err(Fatal::new("stopped while starting")),
        }
    }
}

/// Ends the process when stopping takes longer than it may, whatever holds it up: tokio itself would wait for ever for
/// a thread that is blocked.
fn end_late(name: &'static str) {
    let late = std::thread::Builder::new()
        .name("stop-limit".to_owned())
        .spawn(move || {
            std::thread::sleep(STOP_LIMIT);
            eprintln!(
                "{name}: not stopped within {} s; leaving what is left",
                STOP_LIMIT.as_secs()
            );
            std::process::exit(1);
        });
    if let Err(error) = late {
        tracing::warn!(%error, "no thread to watch over stopping");
    }
}

/// What happened to the work, and until when everything must be over.
struct Stopped {
    outcome: Result<(), Fatal>,
    end: Instant,
}

/// Runs all work side by side until told to stop; the first failure ends everything. What is left after that gets one
/// deadline, all of it together.
async fn work_until(
    work: Vec<BoxFuture<'static, Result<(), Fatal>>>,
    nats: &Connection,
    mut failures: mpsc::UnboundedReceiver<Fatal>,
    stop: &CancellationToken,
) -> Stopped {
    let mut tasks: Vec<JoinHandle<Result<(), Fatal>>> =
        work.into_iter().map(tokio::spawn).collect();
    let (mut outcome, gone) = tokio::select! {
        () = stop.cancelled() => (Ok(()), None),
        (first, index, _) = futures::future::select_all(tasks.iter_mut()) => (flatten(first), Some(index)),
        Some(fatal) = failures.recv() => (Err(fatal), None),
        () = nats.ended() => (Err(Fatal::new("the NATS client ended; leaving so that a fresh start can connect")), None),
    };
    stop.cancel();
    let end = Instant::now() + DRAIN_LIMIT;
    if let Some(index) = gone {
        tasks.swap_remove(index);
    }
    let finished = tokio::time::timeout_at(
        (end - 2 * FLUSH_RESERVE).into(),
        futures::future::join_all(tasks),
    )
    .await;
    match finished {
        Ok(ends) => {
            outcome = ends
                .into_iter()
                .fold(outcome, |outcome, end| outcome.and(flatten(end)))
        }
        Err(_) => tracing::warn!(
            "some work or some requests were still under way after {} s",
            DRAIN_LIMIT.as_secs()
        ),
    }
    Stopped { outcome, end }
}

impl Stopped {
    /// Sends what is left and closes what is open.
    async fn leave(self, shared: &Shared) -> Result<(), Fatal> {
        // Fails or times out where the servers are away; they notice by themselves that we are gone.
        let connected = shared.nats.client().connection_state() == State::Connected;
        let limit = if connected { FLUSH_LIMIT } else { AWAY_LIMIT };
        let flush = (Instant::now() + limit).min(self.end - FLUSH_RESERVE);
        let _ = tokio::time::timeout_at(flush.into(), shared.nats.client().flush()).await;
        let close = (Instant::now() + FLUSH_LIMIT).min(self.end);
        let closing = std::mem::take(
            &mut *shared
                .closing
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let _ = tokio::time::timeout_at(close.into(), futures::future::join_all(closing)).await;
        self.outcome
    }
}

fn flatten(ended: Result<Result<(), Fatal>, tokio::task::JoinError>) -> Result<(), Fatal> {
    ended.unwrap_or_else(|error| Err(Fatal::new(format!("the work ended badly: {error}"))))
}

/// Touches the health file while the function answers itself and PostgreSQL answers the function.
async fn stay_healthy(path: std::path::PathBuf, service: Arc<Service>, shared: Arc<Shared>) {
    let mut well = true;
    while !shared.stop.is_cancelled() {
        match probe(&service, &shared).await {
            Ok(()) => {
                if let Err(error) = tokio::fs::write(&path, b"").await {
                    tracing::warn!(path = %path.display(), %error, "the health file cannot be written");
                }
                if !well {
                    tracing::info!("healthy again");
                }
                well = true;
            }
            Err(why) => {
                if well {
                    tracing::warn!(
                        why,
                        "not healthy; the health file is not touched until this passes"
                    );
                }
                well = false;
            }
        }
        tokio::time::sleep(HEALTH_INTERVAL).await;
    }
}

async fn probe(service: &Service, shared: &Shared) -> Result<(), String> {
    service
        .ping_self()
        .await
        .map_err(|why| format!("our own $SRV.PING is not answered: {why}"))?;
    let checks: Vec<_> = {
        let checks = shared
            .health_checks
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        checks.iter().map(|check| check()).collect()
    };
    futures::future::try_join_all(checks).await.map(|_| ())
}

/// `--health`: whether the running copy touched its health file lately.
fn health() -> ExitCode {
    let Some(path) = std::env::var_os("HEALTH_FILE") else {
        eprintln!("--health needs HEALTH_FILE, the same as the running copy's");
        return ExitCode::from(2);
    };
    let fresh = std::fs::metadata(&path)
        .and_then(|file| file.modified())
        .is_ok_and(|touched| touched.elapsed().is_ok_and(|age| age < HEALTH_AGE));
    if fresh {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

const HELP_SETTINGS: &str = "Configuration comes from the environment:";

const HELP_REST: &str = "\
A variable with \"Or NAME_FILE\" may be in a file that NAME_FILE names; setting both is an error.

  --health     exits 0 when the running replica is healthy: HEALTH_FILE was touched within 20 s
  --variables  prints the variables as JSON
  --version    prints the version";

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
