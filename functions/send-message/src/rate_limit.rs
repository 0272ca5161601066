//! How fast one user may send: a bucket of `burst` tokens that fills at `per_second`.
//!
//! A bucket is stored as the time at which it will be full again. A full bucket needs no memory at
//! all, so memory is bounded by the requests of the last `burst / per_second` seconds, whatever
//! names they contain.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// With fewer buckets than this, full ones are not removed.
const PRUNE_FROM: usize = 1_024;

/// A bucket per user.
#[derive(Debug)]
pub struct RateLimit {
    per_second: f64,
    burst: u32,
    buckets: Mutex<Buckets>,
}

#[derive(Debug)]
struct Buckets {
    full_at: HashMap<String, Instant>,
    prune_at: usize,
}

impl RateLimit {
    /// `per_second` and `burst` have the ranges of the settings, in which no time overflows.
    pub fn new(per_second: f64, burst: u32) -> RateLimit {
        RateLimit {
            per_second,
            burst,
            buckets: Mutex::new(Buckets {
                full_at: HashMap::new(),
                prune_at: PRUNE_FROM,
            }),
        }
    }

    /// Takes a token from the bucket of `user`.
    ///
    /// # Errors
    /// The bucket is empty; how long until it has a token again.
    pub fn take(&self, user: &str, now: Instant) -> Result<(), Duration> {
        let token = Duration::from_secs_f64(1.0 / self.per_second);
        let whole = token * self.burst;
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let full_at = buckets.full_at.get(user).copied().unwrap_or(now).max(now) + token;
        if full_at > now + whole {
            return Err(full_at - (now + whole));
        }
        match buckets.full_at.get_mut(user) {
            Some(moment) => *moment = full_at,
            None => _ = buckets.full_at.insert(user.to_owned(), full_at),
        }
        if buckets.full_at.len() >= buckets.prune_at {
            buckets.full_at.retain(|_, full_at| *full_at > now);
            buckets.prune_at = (buckets.full_at.len() * 2).max(PRUNE_FROM);
        }
        Ok(())
    }

    /// The error message for a user who has to wait.
    pub fn message(&self, wait: Duration) -> String {
        format!(
            "too fast: at most {} at once and {} a second; wait {:.3} s",
            self.burst,
            self.per_second,
            (wait.as_secs_f64() * 1_000.0).ceil() / 1_000.0
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate_each_user_alone() {
        let rate = RateLimit::new(10.0, 3);
        let start = Instant::now();
        for _ in 0..3 {
            rate.take("ann", start).unwrap();
        }
        assert_eq!(rate.take("ann", start), Err(Duration::from_millis(100)));
        rate.take("bob", start).unwrap();
        assert_eq!(
            rate.take("ann", start + Duration::from_millis(40)),
            Err(Duration::from_millis(60))
        );
        rate.take("ann", start + Duration::from_millis(100))
            .unwrap();
        assert!(
            rate.take("ann", start + Duration::from_millis(100))
                .is_err()
        );
        let later = start + Duration::from_secs(60);
        for _ in 0..3 {
            rate.take("ann", later).unwrap();
        }
        assert!(
            rate.take("ann", later).is_err(),
            "a long pause fills the bucket, no further"
        );
        assert_eq!(
            rate.message(Duration::from_micros(60_100)),
            "too fast: at most 3 at once and 10 a second; wait 0.061 s"
        );
    }

    #[test]
    fn invented_names_do_not_fill_the_memory() {
        let rate = RateLimit::new(1_000.0, 10);
        let start = Instant::now();
        for number in 0..100_000_u32 {
            rate.take(
                &format!("user-{number}"),
                start + Duration::from_micros(u64::from(number) * 100),
            )
            .unwrap();
        }
        assert!(rate.buckets.lock().unwrap().full_at.len() <= 2 * PRUNE_FROM);
    }
}
