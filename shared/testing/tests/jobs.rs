//! The loop that all jobs of functions share: pauses, wake-ups, failures, stopping.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::Client;
use base::discovery::{EndpointStats, Stats};
use protocol::subject::OUTBOX_WAKE;
use service::config::Vars;
use service::ctx::Ctx;
use service::function::{Function, Identity, Running};
use service::job::{Description, Done, Failure, Job, Next, Schedule, WakeUp};
use service::meter::Meter;
use testing::{SOON, World, eventually};
use tokio::sync::Notify;

/// Longer than any test: what runs earlier was woken.
const IDLE: Duration = Duration::from_secs(3_600);

/// What one run does.
#[derive(Clone, Copy)]
enum Step {
    Succeed(u64, Next),
    Fail(&'static str),
    /// Publishes where the function must not.
    Trespass,
    /// Waits until the test lets it go on.
    Hang,
}

/// What the runs do, and what they did.
#[derive(Default)]
struct Script {
    steps: Mutex<VecDeque<Step>>,
    begun: AtomicU32,
    ended: AtomicU32,
    woken: AtomicU32,
    go_on: Notify,
    wanted: Arc<Notify>,
}

impl Script {
    async fn has_begun(&self, runs: u32) {
        eventually(&format!("{runs} runs have begun"), SOON, async || {
            (self.begun.load(Ordering::SeqCst) >= runs).then_some(())
        })
        .await;
    }
}

/// Goes through its script, then has nothing more to do. `SUBJECT`: woken by a message, otherwise
/// from within the function.
struct Scripted<const SUBJECT: bool>(Arc<Script>);

impl<const SUBJECT: bool> Job<Arc<Script>> for Scripted<SUBJECT> {
    const DESCRIPTION: Description = Description {
        name: "scripted",
        subject: "script",
        about: "Does what a test says",
        failing: "the script is stuck",
        recovered: "the script goes on",
    };

    fn start(ctx: &Ctx<Arc<Script>>) -> (Self, Schedule) {
        let (wake_up, timeout) = if SUBJECT {
            (WakeUp::Subject(OUTBOX_WAKE), SOON)
        } else {
            let wanted = ctx.wanted.clone();
            (WakeUp::Notify(wanted), Duration::from_millis(200))
        };
        let schedule = Schedule::every(IDLE)
            .retry(Duration::from_millis(1), Duration::from_millis(20))
            .timeout(timeout)
            .wake_up(wake_up);
        (Scripted(Arc::clone(ctx)), schedule)
    }

    async fn run(&mut self, ctx: &Ctx<Arc<Script>>, _: &Meter) -> Result<Done, Failure> {
        let step = self.0.steps.lock().unwrap().pop_front();
        self.0.begun.fetch_add(1, Ordering::SeqCst);
        let done = match step {
            None => Ok((0, Next::Idle)),
            Some(Step::Succeed(handled, next)) => Ok((handled, next)),
            Some(Step::Fail(error)) => Err(Failure::retry(error)),
            Some(Step::Trespass) => {
                let nats = ctx.nats().client();
                nats.publish("chat.general", "".into()).await.unwrap();
                nats.flush().await.unwrap();
                Err(Failure::retry("no answer"))
            }
            Some(Step::Hang) => {
                self.0.go_on.notified().await;
                Ok((1, Next::Again))
            }
        };
        self.0.ended.fetch_add(1, Ordering::SeqCst);
        done.map(|(handled, next)| Done { handled, next })
    }

    fn woken(&mut self) {
        self.0.woken.fetch_add(1, Ordering::SeqCst);
    }
}

async fn start<const SUBJECT: bool>(world: &World, steps: &[Step]) -> (Running, Arc<Script>) {
    let script = Arc::new(Script::default());
    script.steps.lock().unwrap().extend(steps);
    let state = script.clone();
    // The permissions of a function that listens to a subject of its own.
    let identity = Identity {
        project: protocol::PROJECT,
        name: "relay-outbox",
        version: "0.1.0",
        description: "goes through a script",
    };
    let function = Function::with(identity, async move |_| Ok(state)).job::<Scripted<SUBJECT>>();
    let vars = Vars::from_pairs(world.vars("relay-outbox"));
    (function.start(vars).await.unwrap(), script)
}

async fn stats(operator: &Client) -> EndpointStats {
    let reply = operator.request("$SRV.STATS.relay-outbox", "".into()).await;
    let stats: Stats = serde_json::from_slice(&reply.unwrap().payload).unwrap();
    stats.endpoints.into_iter().next().unwrap()
}

#[tokio::test]
async fn runs_are_counted_and_follow_one_another_as_they_say() {
    let world = World::bare().await;
    let operator = world.client("operator").await;
    let steps = [
        Step::Succeed(3, Next::Again),
        Step::Succeed(0, Next::Soon),
        Step::Fail("the database is away"),
        Step::Fail("the database is away"),
        Step::Succeed(2, Next::After(Duration::from_millis(1))),
        Step::Fail("the stream is gone"),
        Step::Succeed(4, Next::Idle),
    ];
    let (running, script) = start::<true>(&world, &steps).await;
    script.has_begun(7).await;
    let found = eventually("all runs are counted", SOON, async || {
        let found = stats(&operator).await;
        (found.num_requests == 9).then_some(found)
    })
    .await;
    assert_eq!(found.num_errors, 3);
    assert_eq!(found.last_error, "the stream is gone");
    assert_eq!(script.woken.load(Ordering::SeqCst), 0);

    // Idle for an hour now, unless a message wakes it.
    let worker = world.client("persist-message").await;
    worker.publish(OUTBOX_WAKE, "".into()).await.unwrap();
    worker.flush().await.unwrap();
    script.has_begun(8).await;
    assert_eq!(script.woken.load(Ordering::SeqCst), 1);
    running.stop().await.unwrap();
    assert_eq!(script.begun.load(Ordering::SeqCst), 8);
}

#[tokio::test]
async fn a_run_that_takes_too_long_has_failed_and_a_wish_during_it_is_kept() {
    let world = World::bare().await;
    let operator = world.client("operator").await;
    let steps = [Step::Hang, Step::Succeed(1, Next::Idle)];
    let (running, script) = start::<false>(&world, &steps).await;
    script.has_begun(1).await;
    script.wanted.notify_one();
    script.has_begun(2).await;
    assert_eq!(script.woken.load(Ordering::SeqCst), 1);
    script.wanted.notify_one();
    script.has_begun(3).await;
    assert_eq!(script.woken.load(Ordering::SeqCst), 2);
    let found = stats(&operator).await;
    assert_eq!((found.num_requests, found.num_errors), (1, 1));
    assert!(
        found.last_error.contains("given up"),
        "{}",
        found.last_error
    );
    assert_eq!(script.ended.load(Ordering::SeqCst), 2, "one never ended");
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_missing_permission_ends_the_function() {
    let world = World::bare().await;
    // The server reports the violation beside its replies, so it may be noticed some runs later.
    let (running, _) = start::<true>(&world, &[Step::Trespass; 1_000]).await;
    let ended = tokio::time::timeout(SOON, running.ended()).await;
    let fatal = ended.unwrap().unwrap_err().to_string();
    assert!(
        fatal.contains("chat.general") && fatal.contains("permissions"),
        "{fatal}"
    );
}

#[tokio::test]
async fn a_stop_waits_for_the_run_under_way_and_begins_no_other() {
    let world = World::bare().await;
    let (running, script) = start::<true>(&world, &[Step::Hang, Step::Hang]).await;
    script.has_begun(1).await;
    let stopping = tokio::spawn(running.stop());
    let client = world.client("operator").await;
    eventually("it does not answer any more", SOON, async || {
        let asked = client.request("$SRV.PING.relay-outbox", "".into());
        asked.await.is_err().then_some(())
    })
    .await;
    assert_eq!(script.ended.load(Ordering::SeqCst), 0);
    script.go_on.notify_one();
    stopping.await.unwrap().unwrap();
    assert_eq!(script.begun.load(Ordering::SeqCst), 1);
    assert_eq!(script.ended.load(Ordering::SeqCst), 1);
}
