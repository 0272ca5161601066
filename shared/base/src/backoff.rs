//! How long to wait between attempts. Only computes; the caller sleeps.

use std::fmt;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// Pauses that double from a first one to a longest one, each with jitter: between half of it and
/// all of it, so that replicas which failed together do not come back together.
///
/// ```
/// # use std::time::Duration;
/// use base::backoff::Backoff;
///
/// let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(1));
/// let pause = backoff.next_pause();
/// assert!(pause >= Duration::from_millis(5) && pause <= Duration::from_millis(10));
/// let pause = backoff.next_pause();
/// assert!(pause >= Duration::from_millis(10) && pause <= Duration::from_millis(20));
/// ```
pub struct Backoff {
    builder: ExponentialBuilder,
    pauses: ExponentialBackoff,
    longest: Duration,
}

impl Backoff {
    /// From `first` to `longest`.
    pub fn new(first: Duration, longest: Duration) -> Backoff {
        // backon adds between nothing and the whole delay to a delay, so it gets half of each.
        let builder = ExponentialBuilder::new()
            .with_min_delay(first / 2)
            .with_max_delay(longest / 2)
            .without_max_times()
            .with_jitter();
        Backoff {
            builder,
            pauses: builder.build(),
            longest,
        }
    }

    /// Always about `pause`.
    pub fn fixed(pause: Duration) -> Backoff {
        Backoff::new(pause, pause)
    }

    /// How long to wait before the next attempt.
    pub fn next_pause(&mut self) -> Duration {
        let pause = self.pauses.next().unwrap_or(self.longest);
        pause.min(self.longest)
    }

    /// Starts over with the first pause, because an attempt succeeded.
    pub fn reset(&mut self) {
        self.pauses = self.builder.build();
    }
}

impl fmt::Debug for Backoff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backoff")
            .field("longest", &self.longest)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_start_over() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(45));
        for _ in 0..100 {
            for longest in [10.0, 20.0, 40.0, 45.0, 45.0] {
                let pause = backoff.next_pause().as_secs_f64() * 1_000.0;
                assert!(
                    pause >= longest / 2.0 - 0.01 && pause <= longest + 0.01,
                    "{pause} ms instead of {} to {longest} ms",
                    longest / 2.0
                );
            }
            backoff.reset();
        }
    }

    #[test]
    fn pauses_have_jitter() {
        let mut backoff = Backoff::fixed(Duration::from_secs(1));
        let first = backoff.next_pause();
        assert!((0..100).any(|_| backoff.next_pause() != first));
    }
}
