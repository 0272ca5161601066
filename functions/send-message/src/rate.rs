//! How fast one user may send: a bucket of `burst` tokens that fills at `per_second`.
//!
//! A bucket is written as one moment: when it will be full again. A full bucket needs no memory at all, so what is
//! remembered is bounded by the requests of the last `burst / per_second` seconds, whatever names they carry.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Below this many buckets nobody looks for full ones.
const SWEEP_FROM: usize = 1_024;

/// A bucket per user.
#[derive(Debug)]
pub struct Rate {
    per_second: f64,
    burst: u32,
    buckets: Mutex<Buckets>,
}

#[derive(Debug)]
struct Buckets {
    full_at: HashMap<String, Instant>,
    sweep_at: usize,
}

impl Rate {
    /// `per_second` and `burst` as the settings allow them: what a bucket takes to fill is far below what a moment can hold.
    pub fn new(per_second: f64, burst: u32) -> Rate {
        Rate {
            per_second,
            burst,
            buckets: Mutex::new(Buckets {
                full_at: HashMap::new(),
                sweep_at: SWEEP_FROM,
            }),
        }
    }

    /// Takes a token of `user`'s.
    ///
    /// # Errors
    /// There is none; after this time there is one.
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
        if buckets.full_at.len() >= buckets.sweep_at {
            buckets.full_at.retain(|_, full_at| *full_at > now);
            buckets.sweep_at = (buckets.full_at.len() * 2).max(SWEEP_FROM);
        }
        Ok(())
    }

    /// What a user is told who has to wait.
    pub fn sentence(&self, wait: Duration) -> String {
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
        let (rate, start) = (Rate::new(10.0, 3), Instant::now());
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
            rate.sentence(Duration::from_micros(60_100)),
            "too fast: at most 3 at once and 10 a second; wait 0.061 s"
        );
    }

    #[test]
    fn invented_names_do_not_fill_the_memory() {
        let (rate, start) = (Rate::new(1_000.0, 10), Instant::now());
        for number in 0..100_000_u32 {
            rate.take(
                &format!("user-{number}"),
                start + Duration::from_micros(u64::from(number) * 100),
            )
            .unwrap();
        }
        assert!(rate.buckets.lock().unwrap().full_at.len() <= 2 * SWEEP_FROM);
    }
}
