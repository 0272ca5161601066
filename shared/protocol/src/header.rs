//! Names of the headers Scrollback reads and writes.

/// `true` when there is more in the direction asked for.
pub const MORE: &str = "Scrollback-More";
/// The reply holds everything of its room up to this sequence, in the range asked for.
pub const THROUGH: &str = "Scrollback-Through";
/// Where the reply came from: `index`, `log` or `both`.
pub const SOURCE: &str = "Scrollback-Source";
/// JetStream's deduplication id; a message's id when its body names none.
pub const MESSAGE_ID: &str = "Nats-Msg-Id";
/// The `Nats-Msg-Id` a message came with before it was appended again, from below the fence or from the dead letters. A
/// message from below the fence that came with none has it empty; a retried letter has one that names the letter.
pub const ORIGINAL_ID: &str = "Scrollback-Original-Id";
/// CloudEvents' extension `sequence`: the position in the log, with leading zeros.
pub const SEQUENCE: &str = "ce-sequence";
/// On the event of a receipt, which has no position of its own: everything of the log was told up to here.
pub const PUBLISHED_THROUGH: &str = "Scrollback-Told";
/// ADR-32: the sentence for the caller.
pub const SERVICE_ERROR: &str = "Nats-Service-Error";
/// ADR-32: the code, as a number.
pub const SERVICE_ERROR_CODE: &str = "Nats-Service-Error-Code";
