//! Subjects of JetStream's JSON API.

/// Every stream of the account.
pub const STREAM_LIST: &str = "$JS.API.STREAM.LIST";

/// Does `verb` (`INFO`, `CREATE`, `UPDATE`, `MSG.GET`) with a stream.
pub fn stream(verb: &str, stream: &str) -> String {
    format!("$JS.API.STREAM.{verb}.{stream}")
}

/// Messages of a stream as they are, in batches.
pub fn direct_get(stream: &str) -> String {
    format!("$JS.API.DIRECT.GET.{stream}")
}

/// Does `verb` (`INFO`, `DURABLE.CREATE`, `MSG.NEXT`) with a consumer.
pub fn consumer(verb: &str, stream: &str, consumer: &str) -> String {
    format!("$JS.API.CONSUMER.{verb}.{stream}.{consumer}")
}
