//! Names of the headers that Scrollback reads and writes.

/// `true` when there are more messages in the direction of the page.
pub const MORE: &str = "Scrollback-More";
/// Within the range asked for, the reply contains every message of the room up to this sequence.
pub const THROUGH: &str = "Scrollback-Through";
/// Where the messages came from: `index` (PostgreSQL), `log` (the stream) or `both`.
pub const SOURCE: &str = "Scrollback-Source";
/// JetStream's deduplication id. It is also the message's id when the body has none.
pub const MESSAGE_ID: &str = "Nats-Msg-Id";
/// The `Nats-Msg-Id` that a message had before it was appended again, either above the sequence
/// guard or as a retried dead letter. Empty when a message below the guard had none; a retried dead
/// dead letter has one that names the dead letter.
pub const ORIGINAL_ID: &str = "Scrollback-Original-Id";
/// CloudEvents' extension `sequence`: the position in the stream, with leading zeros.
pub const SEQUENCE: &str = "ce-sequence";
/// On events of receipts, which have no position of their own: the events of everything in the
/// stream up to here were published before. The name keeps an older word (docs/GLOSSARY.md).
pub const PUBLISHED_THROUGH: &str = "Scrollback-Told";
/// The reason of an error reply, for the caller (ADR-32).
pub const SERVICE_ERROR: &str = "Nats-Service-Error";
/// The code of an error reply, as a number (ADR-32).
pub const SERVICE_ERROR_CODE: &str = "Nats-Service-Error-Code";
