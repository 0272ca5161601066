//! Names of headers that NATS itself defines.

/// JetStream's deduplication id.
pub const MESSAGE_ID: &str = "Nats-Msg-Id";
/// ADR-32: the sentence for the caller.
pub const SERVICE_ERROR: &str = "Nats-Service-Error";
/// ADR-32: the code, as a number.
pub const SERVICE_ERROR_CODE: &str = "Nats-Service-Error-Code";
