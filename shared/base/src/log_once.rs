//! Logging the same message once, however often what it is about happens.

/// Remembers the message that was logged last: the same message again is not news.
///
/// ```
/// use base::log_once::LogOnce;
///
/// let mut log = LogOnce::default();
/// assert!(log.is_news("PostgreSQL is away"));
/// assert!(!log.is_news("PostgreSQL is away"), "still");
/// assert!(log.is_news("the stream is gone"), "something else");
/// assert!(log.recovered(), "worth a line");
/// assert!(!log.recovered(), "all was well already");
/// ```
#[derive(Debug, Default)]
pub struct LogOnce {
    last: Option<String>,
}

impl LogOnce {
    /// Whether `message` differs from the last one and so is worth a line.
    #[must_use]
    pub fn is_news(&mut self, message: &str) -> bool {
        let news = self.last.as_deref() != Some(message);
        if news {
            self.last = Some(message.to_owned());
        }
        news
    }

    /// Forgets the last message. Whether there was one: then the recovery is worth a line, too.
    pub fn recovered(&mut self) -> bool {
        self.last.take().is_some()
    }
}
