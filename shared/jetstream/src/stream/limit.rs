//! How much one read may bring.

use std::time::Duration;

use tokio::time::Instant;

use super::StreamError;

/// How much one read may bring, and until when. Every read of the stream takes one.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    /// At most so many messages.
    pub messages: usize,
    /// No further message once there are so many bytes of payload.
    pub bytes: usize,
    /// After this the read fails with [`StreamError::Late`].
    pub until: Instant,
}

impl Limit {
    /// So many messages and bytes, within `time` from now.
    pub fn within(messages: usize, bytes: usize, time: Duration) -> Limit {
        Limit {
            messages,
            bytes,
            until: Instant::now() + time,
        }
    }

    pub(super) fn check_time(&self) -> Result<(), StreamError> {
        if Instant::now() < self.until {
            Ok(())
        } else {
            Err(StreamError::Late)
        }
    }
}
