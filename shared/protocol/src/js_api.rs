//! Subjects of JetStream's API for the stream and the worker's consumer. `jetstream::api` has those
//! for any stream.

/// State and configuration of the stream.
pub const STREAM_INFO: &str = "$JS.API.STREAM.INFO.CHAT_MESSAGES";
/// Changes the stream's configuration.
pub const STREAM_UPDATE: &str = "$JS.API.STREAM.UPDATE.CHAT_MESSAGES";
/// Removes messages, or advances the next sequence.
pub const STREAM_PURGE: &str = "$JS.API.STREAM.PURGE.CHAT_MESSAGES";
/// Reads one message as JSON, with its headers in base64.
pub const MESSAGE_GET: &str = "$JS.API.STREAM.MSG.GET.CHAT_MESSAGES";
/// Removes one message.
pub const MESSAGE_DELETE: &str = "$JS.API.STREAM.MSG.DELETE.CHAT_MESSAGES";
/// State of the worker's consumer.
pub const CONSUMER_INFO: &str = "$JS.API.CONSUMER.INFO.CHAT_MESSAGES.persist-message";
/// Pauses the deliveries of the worker's consumer.
pub const CONSUMER_PAUSE: &str = "$JS.API.CONSUMER.PAUSE.CHAT_MESSAGES.persist-message";
/// Resets the worker's consumer to a sequence: what was acknowledged from there on is delivered
/// again.
pub const CONSUMER_RESET: &str = "$JS.API.CONSUMER.RESET.CHAT_MESSAGES.persist-message";
/// Pulls from the worker's consumer.
pub const CONSUMER_NEXT: &str = "$JS.API.CONSUMER.MSG.NEXT.CHAT_MESSAGES.persist-message";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subject::{STREAM, WORKER};

    #[test]
    fn every_subject_names_the_stream() {
        for subject in [
            STREAM_INFO,
            STREAM_UPDATE,
            STREAM_PURGE,
            MESSAGE_GET,
            MESSAGE_DELETE,
        ] {
            assert!(subject.ends_with(&format!(".{STREAM}")), "{subject}");
        }
        for subject in [CONSUMER_INFO, CONSUMER_PAUSE, CONSUMER_RESET, CONSUMER_NEXT] {
            assert!(
                subject.ends_with(&format!(".{STREAM}.{WORKER}")),
                "{subject}"
            );
        }
    }
}
