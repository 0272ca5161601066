//! Singleflight: identical requests that arrive at the same moment share one call.
//!
//! A call serves only requests that arrived before it began. A request that arrives while the call
//! runs waits for the next one, so each sees at least what was there when it arrived.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{Instrument, Span};

use base::error::{Code, Error, Result};

/// Calls under way, by key.
pub struct Singleflight<K, V>(Arc<Waiting<K, V>>);

/// The requests that wait for the next call, by key. While a key is in the map, its call runs.
type Waiting<K, V> = Mutex<HashMap<K, Vec<Waiter<V>>>>;

struct Waiter<V> {
    /// `None` when the call took too long.
    result: oneshot::Sender<Option<V>>,
    span: Span,
}

impl<K, V> Default for Singleflight<K, V> {
    fn default() -> Self {
        Singleflight(Arc::default())
    }
}

impl<K: Eq + Hash + Clone + Send + 'static, V: Clone + Send + 'static> Singleflight<K, V> {
    /// The result of a call that began after this request. A call takes at most `limit`, whether a
    /// request still waits for it or not.
    ///
    /// # Errors
    /// 503 when the call took too long, 500 when it panicked.
    pub async fn run<F>(
        &self,
        key: K,
        limit: Duration,
        call: impl Fn() -> F + Send + 'static,
    ) -> Result<V>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let (result, received) = oneshot::channel();
        let waiter = Waiter {
            result,
            span: Span::current(),
        };
        let first = {
            let mut waiting = lock(&self.0);
            match waiting.get_mut(&key) {
                Some(next) => {
                    next.push(waiter);
                    None
                }
                None => {
                    waiting.insert(key.clone(), Vec::new());
                    Some(waiter)
                }
            }
        };
        if let Some(waiter) = first {
            let running = Running {
                waiting: self.0.clone(),
                key,
            };
            // A task of its own: when the first request is given up, the others still wait.
            tokio::spawn(call_until_nobody_waits(running, waiter, limit, call));
        }
        match received.await {
            Ok(Some(result)) => Ok(result),
            Ok(None) => Err(Error::new(
                Code::Unavailable,
                "reading this took too long; try again",
            )),
            Err(_) => Err(Error::internal("the shared call panicked")),
        }
    }
}

async fn call_until_nobody_waits<K: Eq + Hash, V: Clone, F: Future<Output = V>>(
    running: Running<K, V>,
    first: Waiter<V>,
    limit: Duration,
    call: impl Fn() -> F,
) {
    let mut waiters = vec![first];
    loop {
        // The call belongs to the trace of the first request that it serves.
        let span = waiters
            .first()
            .map_or_else(Span::none, |waiter| waiter.span.clone());
        let result = timeout(limit, call().instrument(span)).await.ok();
        for waiter in waiters {
            // A request that was given up does not receive it any more.
            let _ = waiter.result.send(result.clone());
        }
        let mut waiting = lock(&running.waiting);
        waiters = waiting
            .get_mut(&running.key)
            .map(std::mem::take)
            .unwrap_or_default();
        if waiters.is_empty() {
            waiting.remove(&running.key);
            return;
        }
    }
}

/// Removes its key when the call panics, so that the next request makes a new call.
struct Running<K: Eq + Hash, V> {
    waiting: Arc<Waiting<K, V>>,
    key: K,
}

impl<K: Eq + Hash, V> Drop for Running<K, V> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(&self.waiting).remove(&self.key);
        }
    }
}

fn lock<K, V>(waiting: &Waiting<K, V>) -> MutexGuard<'_, HashMap<K, Vec<Waiter<V>>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use futures::FutureExt as _;
    use tokio::sync::Semaphore;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_call_serves_only_requests_that_arrived_before_it_began() {
        let singleflight = Arc::new(Singleflight::<&str, u32>::default());
        let calls = Arc::new(AtomicU32::new(0));
        let go = Arc::new(Semaphore::new(0));
        let request = || {
            let singleflight = singleflight.clone();
            let calls = calls.clone();
            let go = go.clone();
            tokio::spawn(async move {
                let call = move || {
                    let number = calls.fetch_add(1, Ordering::SeqCst) + 1;
                    let go = go.clone();
                    async move {
                        go.acquire().await.unwrap().forget();
                        number
                    }
                };
                singleflight.run("page", LONG, call).await.unwrap()
            })
        };
        let first = request();
        while calls.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let later = [request(), request(), request()];
        while lock(&singleflight.0).get("page").map_or(0, Vec::len) < later.len() {
            tokio::task::yield_now().await;
        }
        go.add_permits(2);
        assert_eq!(first.await.unwrap(), 1);
        for one in later {
            assert_eq!(
                one.await.unwrap(),
                2,
                "requests that arrived during the first call share the second"
            );
        }
        assert!(lock(&singleflight.0).is_empty());
    }

    #[tokio::test]
    async fn a_panic_fails_only_the_requests_that_shared_the_call() {
        let singleflight = Singleflight::<&str, u32>::default();
        let failed = singleflight
            .run("page", LONG, || async { panic!("as a test") })
            .await;
        assert_eq!(failed.unwrap_err().code, Code::Internal);
        let next = singleflight.run("page", LONG, || async { 7 }).await;
        assert_eq!(next.unwrap(), 7);
    }

    #[tokio::test]
    async fn a_call_ends_though_its_request_was_given_up() {
        let singleflight = Singleflight::<&str, u32>::default();
        let short = Duration::from_millis(20);
        drop(
            singleflight
                .run("page", short, std::future::pending)
                .now_or_never(),
        );
        let late = singleflight
            .run("page", short, std::future::pending)
            .await
            .unwrap_err();
        assert_eq!(late.code, Code::Unavailable);
        while !lock(&singleflight.0).is_empty() {
            tokio::task::yield_now().await;
        }
    }
}
