//! Deletions on their way into the stream.

use std::time::Duration;

use async_nats::HeaderMap;
use tracing::{Instrument, Span};

use base::error::{Error, Result};
use base::seq::Seq;
use base::span::SpanGuard;
use jetstream::append::append;
use nats::connection::Connection;
use nats::span::send_span;
use nats::trace::inject_trace;
use protocol::change::{Deletion, change_subject};
use protocol::header;
use protocol::subject::{STREAM, subject_template};

/// Appends a deletion to the stream, waiting at most `limit`; its position. Appending the same
/// deletion again, whichever function does it, does not store it twice.
///
/// # Errors
/// The stream does not take it.
pub async fn append_deletion(
    nats: &Connection,
    room: &str,
    deletion: &Deletion,
    limit: Duration,
) -> Result<Seq> {
    let subject = change_subject(room);
    let template = subject_template(&subject);
    let span = send_span(&Span::current(), &subject, template);
    let mut headers = HeaderMap::new();
    headers.insert(header::MESSAGE_ID, message_id(deletion).as_str());
    inject_trace(&span, &mut headers);
    let payload = serde_json::to_vec(deletion).map_err(Error::internal)?;
    let guard = SpanGuard::new(&span);
    let appended = append(nats, STREAM, &subject, headers, payload.into(), limit)
        .instrument(span)
        .await;
    match &appended {
        Ok(_) => guard.done(),
        Err(_) => guard.failed("append"),
    }
    Ok(appended?)
}

/// The `Nats-Msg-Id`: the same for the same deletion. The ids of send-message begin with a user and
/// a colon, so no user can take this one.
fn message_id(deletion: &Deletion) -> String {
    let Deletion {
        target,
        received,
        mode,
        ..
    } = deletion;
    format!("/delete/{target}/{received}/{}", mode.as_str())
}
