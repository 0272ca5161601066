//! JetStream's API, as far as Scrollback asks it.

/// State and configuration of the log.
pub const STREAM_INFO: &str = "$JS.API.STREAM.INFO.CHAT_MESSAGES";
/// Makes the log.
pub const STREAM_CREATE: &str = "$JS.API.STREAM.CREATE.CHAT_MESSAGES";
/// Changes its configuration.
pub const STREAM_UPDATE: &str = "$JS.API.STREAM.UPDATE.CHAT_MESSAGES";
/// Removes messages, or lifts the next sequence.
pub const STREAM_PURGE: &str = "$JS.API.STREAM.PURGE.CHAT_MESSAGES";
/// Every stream of the account.
pub const STREAM_LIST: &str = "$JS.API.STREAM.LIST";
/// One message as JSON, headers in base64.
pub const MESSAGE_GET: &str = "$JS.API.STREAM.MSG.GET.CHAT_MESSAGES";
/// Removes one message.
pub const MESSAGE_DELETE: &str = "$JS.API.STREAM.MSG.DELETE.CHAT_MESSAGES";
/// Messages as they are, in batches.
pub const DIRECT_GET: &str = "$JS.API.DIRECT.GET.CHAT_MESSAGES";
/// State of the shared consumer.
pub const CONSUMER_INFO: &str = "$JS.API.CONSUMER.INFO.CHAT_MESSAGES.persist-message";
/// Makes or changes the shared consumer.
pub const CONSUMER_CREATE: &str = "$JS.API.CONSUMER.DURABLE.CREATE.CHAT_MESSAGES.persist-message";
/// Holds back deliveries of the shared consumer for a while.
pub const CONSUMER_PAUSE: &str = "$JS.API.CONSUMER.PAUSE.CHAT_MESSAGES.persist-message";
/// Begins the shared consumer anew at a sequence: what was acknowledged from there on is delivered again.
pub const CONSUMER_RESET: &str = "$JS.API.CONSUMER.RESET.CHAT_MESSAGES.persist-message";
/// Pulls from the shared consumer.
pub const CONSUMER_NEXT: &str = "$JS.API.CONSUMER.MSG.NEXT.CHAT_MESSAGES.persist-message";

/// Does `verb` (`INFO`, `CREATE`, `UPDATE`, `MSG.GET`) with any stream.
pub fn stream(verb: &str, stream: &str) -> String {
    format!("$JS.API.STREAM.{verb}.{stream}")
}

/// Does `verb` (`INFO`, `DURABLE.CREATE`) with any consumer.
pub fn consumer(verb: &str, stream: &str, consumer: &str) -> String {
    format!("$JS.API.CONSUMER.{verb}.{stream}.{consumer}")
}
