//! Names of headers that NATS itself defines.

/// JetStream's deduplication id.
pub const MESSAGE_ID: &str = "Nats-Msg-Id";
/// The reason of an error reply, for the caller (ADR-32).
pub const SERVICE_ERROR: &str = "Nats-Service-Error";
/// The code of an error reply, as a number (ADR-32).
pub const SERVICE_ERROR_CODE: &str = "Nats-Service-Error-Code";
