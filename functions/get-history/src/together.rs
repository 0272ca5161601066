//! Identical questions asked at the same moment cost one reading.
//!
//! A reading serves only those who asked before it began: whoever comes while it runs waits for the next
//! one, so everyone sees at least what was there when they asked.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{Instrument, Span};

use base::error::{Code, Error, Result};

/// Readings under way, by question.
pub struct Together<K, V>(Arc<Waiting<K, V>>);

/// Who waits for the next reading of a question; a question that is there is being read.
type Waiting<K, V> = Mutex<HashMap<K, Vec<Waiter<V>>>>;

struct Waiter<V> {
    /// `None` when it took too long.
    answer: oneshot::Sender<Option<V>>,
    span: Span,
}

impl<K, V> Default for Together<K, V> {
    fn default() -> Self {
        Together(Arc::default())
    }
}

impl<K: Eq + Hash + Clone + Send + 'static, V: Clone + Send + 'static> Together<K, V> {
    /// The answer of a reading that began after this call. A reading takes at most `limit`, whether anybody still waits
    /// for it or not.
    ///
    /// # Errors
    /// 503 when the reading took too long, 500 when it panicked.
    pub async fn ask<F>(
        &self,
        question: K,
        limit: Duration,
        read: impl Fn() -> F + Send + 'static,
    ) -> Result<V>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let waiter = Waiter {
            answer,
            span: Span::current(),
        };
        let first = {
            let mut waiting = lock(&self.0);
            match waiting.get_mut(&question) {
                Some(next) => {
                    next.push(waiter);
                    None
                }
                None => {
                    waiting.insert(question.clone(), Vec::new());
                    Some(waiter)
                }
            }
        };
        if let Some(waiter) = first {
            // A task of its own: whoever asked first may give up, the others have not.
            tokio::spawn(read_until_nobody_waits(
                Reading {
                    waiting: self.0.clone(),
                    question,
                },
                waiter,
                limit,
                read,
            ));
        }
        match answered.await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(Error::new(
                Code::Unavailable,
                "reading this took too long; try again",
            )),
            Err(_) => Err(Error::internal("the shared reading ended badly")),
        }
    }
}

async fn read_until_nobody_waits<K: Eq + Hash, V: Clone, F: Future<Output = V>>(
    reading: Reading<K, V>,
    first: Waiter<V>,
    limit: Duration,
    read: impl Fn() -> F,
) {
    let mut waiters = vec![first];
    loop {
        // The reading shows in the trace of the first of those it serves.
        let span = waiters
            .first()
            .map_or_else(Span::none, |waiter| waiter.span.clone());
        let answer = timeout(limit, read().instrument(span)).await.ok();
        for waiter in waiters {
            // Whoever gave up does not want it any more.
            let _ = waiter.answer.send(answer.clone());
        }
        let mut waiting = lock(&reading.waiting);
        waiters = waiting
            .get_mut(&reading.question)
            .map(std::mem::take)
            .unwrap_or_default();
        if waiters.is_empty() {
            waiting.remove(&reading.question);
            return;
        }
    }
}

/// Takes its question off the list when the reading panics, so that the next asker reads anew.
struct Reading<K: Eq + Hash, V> {
    waiting: Arc<Waiting<K, V>>,
    question: K,
}

impl<K: Eq + Hash, V> Drop for Reading<K, V> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(&self.waiting).remove(&self.question);
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
    async fn a_reading_serves_only_those_who_asked_before_it_began() {
        let together = Arc::new(Together::<&str, u32>::default());
        let (readings, go) = (Arc::new(AtomicU32::new(0)), Arc::new(Semaphore::new(0)));
        let ask = || {
            let (together, readings, go) = (together.clone(), readings.clone(), go.clone());
            tokio::spawn(async move {
                let read = move || {
                    let (number, go) = (readings.fetch_add(1, Ordering::SeqCst) + 1, go.clone());
                    async move {
                        go.acquire().await.unwrap().forget();
                        number
                    }
                };
                together.ask("page", LONG, read).await.unwrap()
            })
        };
        let first = ask();
        while readings.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let later = [ask(), ask(), ask()];
        while lock(&together.0).get("page").map_or(0, Vec::len) < later.len() {
            tokio::task::yield_now().await;
        }
        go.add_permits(2);
        assert_eq!(first.await.unwrap(), 1);
        for one in later {
            assert_eq!(
                one.await.unwrap(),
                2,
                "whoever came while the first reading ran shares the second"
            );
        }
        assert!(lock(&together.0).is_empty());
    }

    #[tokio::test]
    async fn a_panic_costs_only_those_who_shared_it() {
        let together = Together::<&str, u32>::default();
        let failed = together
            .ask("page", LONG, || async { panic!("as a test") })
            .await;
        assert_eq!(failed.unwrap_err().code, Code::Internal);
        assert_eq!(together.ask("page", LONG, || async { 7 }).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn a_reading_ends_though_whoever_asked_is_gone() {
        let together = Together::<&str, u32>::default();
        let short = Duration::from_millis(20);
        drop(
            together
                .ask("page", short, std::future::pending)
                .now_or_never(),
        );
        let late = together
            .ask("page", short, std::future::pending)
            .await
            .unwrap_err();
        assert_eq!(late.code, Code::Unavailable);
        while !lock(&together.0).is_empty() {
            tokio::task::yield_now().await;
        }
    }
}
