//! What a function is: who it is, what it answers, what it works on.

use std::fmt;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;

use crate::config::{Declarations, Declared, NatsVariables, RequestVariables, Vars};
use crate::ctx::{Clock, Ctx};
use crate::job::{self, Description, Job};
use crate::meter::Meter;
use crate::plan::{Assembled, Plan};
use crate::request::{Reply, Request};
use crate::responder::{QUEUE_GROUP, Registered};
pub use crate::stop::Running;
use crate::telemetry::new_instance_id;
use base::discovery::EndpointInfo;
use base::endpoint::{Endpoint, ParseRequest};
use base::error::{Fatal, Result};

/// Who a function is; made by [`crate::this!`].
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// What the function is a part of. Its metrics begin with it (`{project}.handled`), and the
    /// service API shows it as metadata.
    pub project: &'static str,
    /// The function's name, for the service API, telemetry and NATS permissions.
    pub name: &'static str,
    /// Its semantic version.
    pub version: &'static str,
    /// What it is for, in one line.
    pub description: &'static str,
}

type Setup<S> = Box<dyn FnOnce(Ctx) -> BoxFuture<'static, Result<S, Fatal>> + Send>;
type Bind<S> = Box<dyn FnOnce(Ctx<S>) -> Registered + Send>;
type Work<S> = Box<dyn FnOnce(Ctx<S>, Meter) -> BoxFuture<'static, Result<(), Fatal>> + Send>;

/// A function that is being put together; `S` is its state.
///
/// Every method adds something; [`run`](Function::run) makes a process of it.
pub struct Function<S = ()> {
    identity: Identity,
    /// Of this replica, for the service API and for telemetry.
    id: String,
    declared: Declarations,
    clock: Clock,
    setup: Setup<S>,
    endpoints: Vec<Bind<S>>,
    work: Vec<(EndpointInfo, Meter, Work<S>)>,
}

impl<S> fmt::Debug for Function<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Function")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

impl Function {
    /// A function without state.
    pub fn new(identity: Identity) -> Function {
        Function::with(identity, async |_| Ok(()))
    }
}

impl<S: Send + Sync + 'static> Function<S> {
    /// A function with the state that `setup` returns. `setup` runs before the function registers,
    /// and an error of it is the end of the process.
    pub fn with<F>(identity: Identity, setup: impl FnOnce(Ctx) -> F + Send + 'static) -> Function<S>
    where
        F: Future<Output = Result<S, Fatal>> + Send + 'static,
    {
        let mut declared = Declarations::default();
        declared.add::<NatsVariables>();
        declared.add::<RequestVariables>();
        Function {
            identity,
            id: new_instance_id(),
            declared,
            clock: Arc::new(SystemTime::now),
            setup: Box::new(move |ctx| setup(ctx).boxed()),
            endpoints: Vec::new(),
            work: Vec::new(),
        }
    }

    /// Another clock than the system's for [`Ctx::clock`]: a test cannot wait until messages are
    /// days old.
    #[must_use]
    pub fn clock(mut self, clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Declares variables that the function reads with [`Ctx::read_settings`]. `--help` and the
    /// configuration reference show them, all are checked before anything is connected, and a
    /// variable with a similar name is warned about.
    #[must_use]
    pub fn settings<T: Declared>(mut self) -> Self {
        self.declared.add::<T>();
        self
    }

    /// Answers `endpoint` with `handler`.
    ///
    /// **Order.** Requests of one caller are started in the order in which they reached this
    /// replica, across all endpoints, and the handler's future is polled for the first time before
    /// the next request is started. So whatever a handler does before it first waits, such as
    /// joining a queue, happens in the order of arrival. The caller is the user that the subject
    /// names, or otherwise the owner of the inbox that the answer goes to.
    ///
    /// Because of this, everything up to a handler's first await holds up all other requests: do
    /// not block there, and do not compute for long. Whatever depends on the order must not wait:
    /// `lock().await` on a free lock is fine, but a future that goes through another task, or that
    /// has been pending once, may be overtaken.
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
        let project = self.identity.project;
        self.endpoints.push(Box::new(move |ctx| Registered {
            info: EndpointInfo {
                name: endpoint.name.to_owned(),
                subject: endpoint.template.subscription(),
                queue_group: QUEUE_GROUP.to_owned(),
                metadata: [("about".to_owned(), endpoint.about())].into(),
            },
            meter: Meter::new(project, endpoint.name),
            user_after: endpoint.template.prefix_of_user(),
            handler: Some(Arc::new(move |subject: String, payload: Bytes| {
                let ctx = ctx.clone();
                let handler = handler.clone();
                async move {
                    let body = Q::parse(endpoint.template.names_of(&subject), &payload)?;
                    let reply = handler(ctx, Request { body }).await?;
                    Ok((reply.body, reply.headers))
                }
                .boxed()
            })),
        }));
        self
    }

    /// Works on something from start to stop; `name` and `subject` show it in STATS beside the
    /// endpoints. For work that repeats use [`job`](Function::job).
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
        let meter = Meter::new(self.identity.project, name);
        let work: Work<S> = Box::new(move |ctx, meter| work(ctx, meter).boxed());
        self.work.push((info, meter, work));
        self
    }

    /// Repeats a [job](crate::job) from start to stop; its description shows it in STATS beside
    /// the endpoints.
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
    /// Whatever would end a process at its start: wrong configuration, a refused user, a failed
    /// setup.
    pub async fn start(self, vars: Vars) -> Result<Running, Fatal> {
        self.into_plan().start(vars).await
    }

    fn into_plan(self) -> Plan {
        let Function {
            identity,
            id,
            declared,
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
                for (info, meter, start) in work {
                    assembled.work.push(start(ctx.clone(), meter.clone()));
                    assembled.registered.push(Registered {
                        info,
                        meter,
                        handler: None,
                        user_after: None,
                    });
                }
                Ok(assembled)
            }
            .boxed()
        };
        Plan {
            identity,
            id,
            declared,
            clock,
            assemble: Box::new(assemble),
        }
    }
}
