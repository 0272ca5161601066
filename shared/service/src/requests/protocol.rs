//! Decodes what a NATS server sends: the part of the client protocol that a receiver needs.
//!
//! Nothing here parses headers or payloads, so no message can break the connection it came on.
//! Lines and messages have limits; a server that exceeds them is not a NATS server, and the
//! connection is closed.

use bytes::{Buf, Bytes, BytesMut};

/// The longest line. `max_control_line` limits what clients send, but the INFO of a large cluster
/// is longer.
const MAX_LINE: usize = 64 * 1024;
/// What headers that servers add may take beyond `max_payload`.
const HEADER_ROOM: usize = 64 * 1024;
/// `max_payload` until the server's INFO has its own.
const DEFAULT_MAX_PAYLOAD: usize = 1024 * 1024;
/// The highest `max_payload` that a server accepts in its configuration.
const MAX_PAYLOAD: usize = 64 * 1024 * 1024;

/// One protocol message of the server.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// `INFO {…}`, the JSON.
    Info(Bytes),
    Ping,
    Pong,
    Ok,
    /// `-ERR '…'`, without the quotes.
    Error(String),
    Message(Delivery),
}

/// `MSG` or `HMSG`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Delivery {
    pub sid: u64,
    /// `None` when the bytes are not UTF-8, which the server does not check.
    pub subject: Option<String>,
    /// `None` without one, and when the bytes are not UTF-8: no reply can be sent there.
    pub reply: Option<String>,
    /// The header block as received; `None` without headers.
    pub headers: Option<Bytes>,
    pub payload: Bytes,
}

/// The bytes are not the NATS protocol.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the server broke the NATS protocol: {0}")]
pub(super) struct ProtocolError(&'static str);

/// Decodes [`Frame`]s from bytes as they arrive.
#[derive(Debug)]
pub(super) struct Decoder {
    pub buffer: BytesMut,
    /// The line of a message whose bytes have not all arrived yet.
    head: Option<Head>,
    max_message: usize,
}

#[derive(Debug)]
struct Head {
    sid: u64,
    subject: Option<String>,
    reply: Option<String>,
    header_bytes: Option<usize>,
    total: usize,
}

impl Decoder {
    pub(super) fn new() -> Decoder {
        let max_message = DEFAULT_MAX_PAYLOAD + HEADER_ROOM;
        Decoder {
            buffer: BytesMut::new(),
            head: None,
            max_message,
        }
    }

    /// The server's own `max_payload`.
    pub(super) fn set_max_payload(&mut self, max_payload: usize) {
        if max_payload > 0 {
            self.max_message = max_payload.min(MAX_PAYLOAD) + HEADER_ROOM;
        }
    }

    /// The next frame; `None` until more bytes have arrived.
    ///
    /// # Errors
    /// The bytes are not what a server sends.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, ProtocolError> {
        if let Some(head) = self.head.take() {
            return Ok(self.body(head));
        }
        let Some(end) = self
            .buffer
            .iter()
            .take(MAX_LINE)
            .position(|byte| *byte == b'\n')
        else {
            return if self.buffer.len() >= MAX_LINE {
                Err(ProtocolError("a line is too long"))
            } else {
                Ok(None)
            };
        };
        let line = self.buffer.split_to(end + 1);
        let line = line
            .strip_suffix(b"\r\n")
            .or_else(|| line.strip_suffix(b"\n"))
            .unwrap_or(&line);
        let (verb, rest) = match line.iter().position(|byte| byte.is_ascii_whitespace()) {
            Some(at) => (&line[..at], line[at..].trim_ascii()),
            None => (line, &b""[..]),
        };
        match verb.to_ascii_uppercase().as_slice() {
            b"MSG" => self.message(rest, false),
            b"HMSG" => self.message(rest, true),
            b"PING" => Ok(Some(Frame::Ping)),
            b"PONG" => Ok(Some(Frame::Pong)),
            b"+OK" => Ok(Some(Frame::Ok)),
            b"INFO" => Ok(Some(Frame::Info(Bytes::copy_from_slice(rest)))),
            b"-ERR" => {
                let text = String::from_utf8_lossy(rest);
                Ok(Some(Frame::Error(text.trim_matches('\'').to_owned())))
            }
            _ => Err(ProtocolError("an unknown verb")),
        }
    }

    fn message(
        &mut self,
        words: &[u8],
        with_headers: bool,
    ) -> Result<Option<Frame>, ProtocolError> {
        let head = parse_head(words, with_headers).ok_or(ProtocolError("a message's line"))?;
        if head.total > self.max_message
            || head.header_bytes.is_some_and(|bytes| bytes > head.total)
        {
            return Err(ProtocolError("a message's length"));
        }
        // One allocation for the rest of the message, rather than one for each doubling.
        self.buffer
            .reserve((head.total + 2).saturating_sub(self.buffer.len()));
        Ok(self.body(head))
    }

    /// The message, once all of it has arrived. Its bytes are copied, because a slice of the buffer
    /// would keep the whole buffer in memory while the message waits in the queue.
    fn body(&mut self, head: Head) -> Option<Frame> {
        if self.buffer.len() < head.total + 2 {
            self.head = Some(head);
            return None;
        }
        let headers = head
            .header_bytes
            .map(|bytes| Bytes::copy_from_slice(&self.buffer[..bytes]));
        let payload =
            Bytes::copy_from_slice(&self.buffer[head.header_bytes.unwrap_or(0)..head.total]);
        self.buffer.advance(head.total + 2);
        let Head {
            sid,
            subject,
            reply,
            ..
        } = head;
        Some(Frame::Message(Delivery {
            sid,
            subject,
            reply,
            headers,
            payload,
        }))
    }
}

/// `subject sid [reply] [header bytes] bytes`.
fn parse_head(words: &[u8], with_headers: bool) -> Option<Head> {
    let words: Vec<&[u8]> = words
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty())
        .collect();
    let (subject, sid, reply, lengths) = match (with_headers, words.as_slice()) {
        (false, [subject, sid, lengths @ ..]) if lengths.len() == 1 => {
            (subject, sid, None, lengths)
        }
        (true, [subject, sid, lengths @ ..]) if lengths.len() == 2 => (subject, sid, None, lengths),
        (false, [subject, sid, reply, lengths @ ..]) if lengths.len() == 1 => {
            (subject, sid, Some(reply), lengths)
        }
        (true, [subject, sid, reply, lengths @ ..]) if lengths.len() == 2 => {
            (subject, sid, Some(reply), lengths)
        }
        _ => return None,
    };
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
    Some(Head {
        sid: number(sid)?,
        subject: text(subject),
        reply: reply.and_then(|reply| text(reply)),
        header_bytes: if with_headers {
            Some(number(lengths.first()?)?)
        } else {
            None
        },
        total: number(lengths.last()?)?,
    })
}

fn number<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits)
        .ok()
        .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything in `bytes`, handed over in pieces of `size`.
    fn frames(bytes: &[u8], size: usize) -> Result<Vec<Frame>, ProtocolError> {
        let mut decoder = Decoder::new();
        let mut found = Vec::new();
        for piece in bytes.chunks(size) {
            decoder.buffer.extend_from_slice(piece);
            while let Some(frame) = decoder.next()? {
                found.push(frame);
            }
        }
        Ok(found)
    }

    fn message(
        reply: Option<&str>,
        headers: Option<&'static [u8]>,
        payload: &'static [u8],
    ) -> Frame {
        let reply = reply.map(str::to_owned);
        let headers = headers.map(Bytes::from_static);
        Frame::Message(Delivery {
            sid: 7,
            subject: Some("a.b".to_owned()),
            reply,
            headers,
            payload: Bytes::from_static(payload),
        })
    }

    #[test]
    fn everything_a_server_sends_is_read_however_it_is_cut() {
        let bytes = b"INFO {\"a\":1} \r\n+OK\r\nPING\r\n\
            MSG a.b 7 5\r\nhe\r\no\r\nMSG a.b 7 _INBOX.x 0\r\n\r\n\
            HMSG a.b 7 _INBOX.x 17 19\r\nNATS/1.0\r\na\rb\r\n\r\nhi\r\n\
            HMSG a.b 7 0 1\r\nx\r\n-ERR 'Stale Connection'\r\nPONG\r\n";
        for size in [1, 2, 3, 7, 1_000] {
            let expected = [
                Frame::Info(Bytes::from_static(b"{\"a\":1}")),
                Frame::Ok,
                Frame::Ping,
                message(None, None, b"he\r\no"),
                message(Some("_INBOX.x"), None, b""),
                message(Some("_INBOX.x"), Some(b"NATS/1.0\r\na\rb\r\n\r\n"), b"hi"),
                message(None, Some(b""), b"x"),
                Frame::Error("Stale Connection".to_owned()),
                Frame::Pong,
            ];
            assert_eq!(
                frames(bytes, size).unwrap(),
                expected,
                "in pieces of {size}"
            );
        }
    }

    #[test]
    fn a_subject_that_is_not_utf_8_does_not_break_the_connection() {
        let found = frames(b"MSG a.\xff 7 \xfe 0\r\n\r\nPING\r\n", 100).unwrap();
        let headless = Delivery {
            sid: 7,
            subject: None,
            reply: None,
            headers: None,
            payload: Bytes::new(),
        };
        assert_eq!(found, [Frame::Message(headless), Frame::Ping]);
    }

    #[test]
    fn what_no_server_sends_is_an_error() {
        for bytes in [
            &b"HELLO\r\n"[..],
            b"MSG a 7\r\n",
            b"MSG a x 5\r\n",
            b"MSG a 7 b c 5\r\n",
            b"MSG a 7 +5\r\n",
            b"MSG a 7 99999999999999999999999\r\n",
            b"MSG a 7 2000000\r\n",
            b"HMSG a 7 9 5\r\n",
        ] {
            assert!(
                frames(bytes, 100).is_err(),
                "{}",
                String::from_utf8_lossy(bytes)
            );
        }
        assert!(
            frames(&[b'a'; MAX_LINE], 1_000).is_err(),
            "a line without an end"
        );
    }
}
