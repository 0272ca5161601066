//! Appends a dead letter to the stream again. Every function that does so does it here, because the
//! headers have to be treated alike.

use std::time::Duration;

use async_nats::header::{HeaderMap, HeaderValue};

use base::seq::Seq;
use jetstream::append::{AppendError, append};
use nats::connection::Connection;
use nats::headers::{MalformedHeaders, parse_headers};
use protocol::header;
use protocol::subject::STREAM;

/// So much our own headers add to a message that is appended again.
const HEADER_ROOM: usize = 512;

/// A message to append again.
#[derive(Debug, Clone, Copy)]
pub struct Again<'a> {
    /// The subject it was published on.
    pub subject: &'a str,
    /// The header block it came with; empty when there was none.
    pub headers: &'a [u8],
    /// As published.
    pub payload: &'a [u8],
    /// The `Nats-Msg-Id` it gets: the same whenever the same dead letter is appended, and no other
    /// message's.
    pub message_id: &'a str,
    /// The `Scrollback-Original-Id` it gets when it came without an id.
    pub unnamed: &'a str,
}

impl Again<'_> {
    /// The id that a reader of the stream takes for the message's own when its body has none: the
    /// one it came with first, or else `unnamed`.
    ///
    /// # Errors
    /// The headers it came with cannot be read.
    pub fn first_id(&self) -> Result<HeaderValue, MalformedHeaders> {
        let original = self.original()?;
        let first_id = original
            .get(header::ORIGINAL_ID)
            .or_else(|| original.get(header::MESSAGE_ID));
        match first_id.filter(|id| !id.as_str().is_empty()) {
            Some(id) => Ok(id.clone()),
            None => self.unnamed.parse().map_err(|_| MalformedHeaders),
        }
    }

    fn original(&self) -> Result<HeaderMap, MalformedHeaders> {
        if self.headers.is_empty() {
            Ok(HeaderMap::new())
        } else {
            parse_headers(self.headers)
        }
    }
}

/// Appends a message to the stream again, waiting at most `limit`; its position. When JetStream
/// knows the `message_id` already, it does not store the message twice, and the position is the
/// first one's.
///
/// # Errors
/// [`AppendError`].
pub async fn append_again(
    nats: &Connection,
    message: Again<'_>,
    limit: Duration,
) -> Result<Seq, AppendError> {
    if message.headers.len() + message.payload.len() + HEADER_ROOM
        > nats.client().server_info().max_payload
    {
        return Err(AppendError::TooLarge(
            "no room for our own headers below max_payload".to_owned(),
        ));
    }
    append(
        nats,
        STREAM,
        message.subject,
        headers(message)?,
        message.payload.to_vec().into(),
        limit,
    )
    .await
}

/// The headers the message came with, changed so that they can be sent again.
///
/// Headers that instruct JetStream are left out, because what they expect was true long ago.
/// `Nats-Msg-Id` is ours, so that a dead letter that is sent twice is appended once; the original
/// id moves to a header of its own. It could not stay: JetStream remembers it for two minutes, even
/// when the message was purged, and would answer "duplicate" although the message is gone (tried on
/// 2.15.1).
fn headers(message: Again<'_>) -> Result<HeaderMap, MalformedHeaders> {
    let original = message.original()?;
    let mut headers = HeaderMap::new();
    for (name, values) in original.iter() {
        let text: &str = name.as_ref();
        let is_order = text
            .get(..5)
            .is_some_and(|start| start.eq_ignore_ascii_case("Nats-"));
        if !is_order && text != header::ORIGINAL_ID {
            values
                .iter()
                .for_each(|value| headers.append(name.clone(), value.clone()));
        }
    }
    headers.insert(header::ORIGINAL_ID, message.first_id()?);
    headers.insert(
        header::MESSAGE_ID,
        message
            .message_id
            .parse::<HeaderValue>()
            .map_err(|_| MalformedHeaders)?,
    );
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(block: &str, unnamed: &str) -> Vec<(String, String)> {
        let message = Again {
            subject: "",
            headers: block.as_bytes(),
            payload: b"",
            message_id: "/ours/1",
            unnamed,
        };
        let headers = headers(message).unwrap();
        let name = |name: &async_nats::HeaderName| AsRef::<str>::as_ref(name).to_owned();
        let mut pairs: Vec<(String, String)> = headers
            .iter()
            .flat_map(|(key, values)| {
                values
                    .iter()
                    .map(move |value| (name(key), value.as_str().to_owned()))
            })
            .collect();
        pairs.sort();
        pairs
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn orders_to_jetstream_are_left_out_and_the_id_moves_aside() {
        let block = "NATS/1.0\r\nNats-Msg-Id: ann:a\r\nNats-Expected-Last-Sequence: 3\r\n\
                     nats-rollup: all\r\nX: one\r\nX: two\r\n\r\n";
        let wanted = [
            ("Nats-Msg-Id", "/ours/1"),
            ("Scrollback-Original-Id", "ann:a"),
            ("X", "one"),
            ("X", "two"),
        ];
        assert_eq!(sent(block, "unnamed"), pairs(&wanted));
        // Again and again, the first id stays.
        let again = "NATS/1.0\r\nNats-Msg-Id: /ours/0\r\nScrollback-Original-Id: ann:a\r\n\r\n";
        assert_eq!(
            sent(again, "unnamed"),
            pairs(&[
                ("Nats-Msg-Id", "/ours/1"),
                ("Scrollback-Original-Id", "ann:a")
            ])
        );
    }

    #[test]
    fn without_an_id_it_gets_the_one_for_the_unnamed() {
        for block in [
            "",
            "NATS/1.0\r\n\r\n",
            "NATS/1.0\r\nNats-Msg-Id: /ours/0\r\nScrollback-Original-Id:\r\n\r\n",
        ] {
            assert_eq!(
                sent(block, ""),
                pairs(&[("Nats-Msg-Id", "/ours/1"), ("Scrollback-Original-Id", "")]),
                "{block}"
            );
            assert_eq!(
                sent(block, "u"),
                pairs(&[("Nats-Msg-Id", "/ours/1"), ("Scrollback-Original-Id", "u")]),
                "{block}"
            );
        }
        let message = Again {
            subject: "",
            headers: b"NATS/1.0\r\nA B: c\r\n\r\n",
            payload: b"",
            message_id: "m",
            unnamed: "",
        };
        assert_eq!(headers(message), Err(MalformedHeaders));
    }
}
