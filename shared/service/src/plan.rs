//! From a function that was put together to one that runs.
//!
//! Nothing here depends on the function's state, so it is compiled once, with this crate, and not
//! again in every program.

use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::arguments;
use crate::config::{Declarations, Settings, Vars, unknown};
use crate::ctx::{Clock, Ctx, Shared};
use crate::function::Identity;
use crate::health::stay_healthy;
use crate::requests;
use crate::requests::{Answering, QueueLimits};
use crate::responder::{Registered, Service};
use crate::stop::{Ended, Running, Step, kill_when_late, run_to_end};
use crate::telemetry::Telemetry;
use base::backoff::Backoff;
use base::error::{Fatal, Result};
use base::log_once::LogOnce;
use nats::connection::{Connection, connect};

/// The server reports a permission violation apart from the answer; it arrives within this time.
const VIOLATION_TIME: Duration = Duration::from_millis(50);
/// Between attempts to reach ourselves while starting.
const PING_PAUSE: Duration = Duration::from_millis(200);

pub(crate) type Assemble =
    Box<dyn FnOnce(Ctx) -> BoxFuture<'static, Result<Assembled, Fatal>> + Send>;

/// What a function serves and works on, once its state is there.
pub(crate) struct Assembled {
    pub registered: Vec<Registered>,
    pub work: Vec<BoxFuture<'static, Result<(), Fatal>>>,
}

/// A [`Function`](crate::function::Function) without the type of its state.
pub(crate) struct Plan {
    pub identity: Identity,
    pub id: String,
    pub declared: Declarations,
    pub clock: Clock,
    pub assemble: Assemble,
}

impl Plan {
    /// The process: arguments, log, start, signals, stop.
    pub(crate) fn run(self) -> ExitCode {
        let identity = self.identity;
        if let Some(code) = arguments::handle(&identity, &self.declared.documented()) {
            return code;
        }
        match self.run_process() {
            Ok(()) => ExitCode::SUCCESS,
            Err(fatal) => {
                eprintln!("{}: {fatal}", identity.name);
                ExitCode::FAILURE
            }
        }
    }

    fn run_process(self) -> Result<(), Fatal> {
        let identity = self.identity;
        let vars = Vars::from_env();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|error| Fatal::new(format!("no tokio runtime: {error}")))?;
        let (telemetry, ended) = runtime.block_on(async move {
            match Telemetry::start(&identity, &self.id) {
                Ok(telemetry) => (telemetry, self.run_until_signal(vars).await),
                Err(fatal) => (Telemetry::default(), Ended::now(Err(fatal))),
            }
        });
        telemetry.stop_before(ended.deadline);
        runtime.shutdown_timeout(ended.deadline.left_for(Step::Threads));
        ended.outcome
    }

    async fn run_until_signal(self, vars: Vars) -> Ended {
        let stop = CancellationToken::new();
        if let Err(fatal) = stop_at_signal(self.identity.name, stop.clone()) {
            return Ended::now(Err(fatal));
        }
        match self.start_until(vars, stop.clone()).await {
            Ok(running) => running.finished().await,
            Err(_) if stop.is_cancelled() => Ended::now(Ok(())),
            Err(fatal) => Ended::now(Err(fatal)),
        }
    }

    /// Boxed here: the body of an async function is compiled in the crate that awaits it.
    pub(crate) fn start(self, vars: Vars) -> BoxFuture<'static, Result<Running, Fatal>> {
        self.start_until(vars, CancellationToken::new()).boxed()
    }

    async fn start_until(self, vars: Vars, stop: CancellationToken) -> Result<Running, Fatal> {
        // Where two providers are compiled in, rustls does not choose one. A second call fails,
        // and that is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let identity = self.identity;
        for warning in unknown(&vars, self.declared.variables()) {
            tracing::warn!("configuration: {warning}");
        }
        self.declared.check(&vars)?;
        let settings = Settings::read(&vars)?;
        let nats = connect(&settings.nats, identity.name, &stop).await?;
        let (failed, failures) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            identity,
            settings,
            vars,
            declared: self.declared,
            nats,
            clock: self.clock,
            health_checks: Mutex::default(),
            closing: Mutex::default(),
            stop: stop.clone(),
            failed,
        });
        let assembling = (self.assemble)(Ctx {
            shared: shared.clone(),
            state: Arc::new(()),
        });
        let Assembled {
            registered,
            mut work,
        } = tokio::select! {
            assembled = assembling => assembled?,
            () = stop.cancelled() => return Err(Fatal::new("stopped while starting")),
        };
        let service = Service::new(shared.nats.client().clone(), identity, self.id, registered);
        let setup = request_setup(&shared.settings);
        let answering = Answering::start(service.clone(), setup, &stop).await?;
        wait_until_registered(&service, &shared.nats, &answering, &stop).await?;
        work.push(answering.ended().boxed());
        let health = shared.settings.requests.health_file.clone();
        let health = health.map(|path| tokio::spawn(stay_healthy(path, service, shared.clone())));
        let name = identity.name;
        tracing::info!(function = name, version = identity.version, "ready");

        let task = tokio::spawn(async move {
            let ended = run_to_end(work, failures, &shared).await;
            if let Some(health) = health {
                health.abort();
            }
            ended
        });
        Ok(Running { stop, task })
    }
}

/// Cancels `stop` at SIGTERM or SIGINT. A second signal ends the process at once.
fn stop_at_signal(name: &'static str, stop: CancellationToken) -> Result<(), Fatal> {
    async fn either(terminate: &mut Signal, interrupt: &mut Signal) {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
    let no_signals = |error| Fatal::new(format!("signals cannot be received: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
    tokio::spawn(async move {
        either(&mut terminate, &mut interrupt).await;
        tracing::info!("asked to stop: finishing the requests and the work under way");
        kill_when_late(name);
        stop.cancel();
        either(&mut terminate, &mut interrupt).await;
        eprintln!("{name}: asked to stop again; leaving at once");
        std::process::exit(1);
    });
    Ok(())
}

/// How requests are received, by the settings.
fn request_setup(settings: &Settings) -> requests::Setup<'_> {
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

/// Waits until the function receives its own PING through the server. Refuses to start when this
/// user lacks a permission that the function needs.
async fn wait_until_registered(
    service: &Service,
    nats: &Connection,
    answering: &Answering,
    stop: &CancellationToken,
) -> Result<(), Fatal> {
    let mut log = LogOnce::default();
    let mut backoff = Backoff::fixed(PING_PAUSE);
    loop {
        let answer = service.ping_self().await;
        tokio::time::sleep(VIOLATION_TIME).await;
        nats.check_permissions()?;
        answering.check_permissions()?;
        let Err(why) = answer else { return Ok(()) };
        if log.is_news(&why) {
            tracing::warn!(why, "our own $SRV.PING is not answered yet; asking again");
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next_pause()) => {}
            () = stop.cancelled() => return Err(Fatal::new("stopped while starting")),
        }
    }
}
