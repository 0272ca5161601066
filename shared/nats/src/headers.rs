//! Parsing header blocks, for messages that did not come through async-nats: the client would close
//! its connection over some of them.

use std::str::FromStr;

use async_nats::header::{HeaderMap, HeaderName, HeaderValue};

/// Headers that async-nats cannot parse: when the server delivers them, its connection breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed headers")]
pub struct MalformedHeaders;

/// Parses a header block, `NATS/1.0\r\nName: value\r\n\r\n`. Refuses exactly what the parser of
/// async-nats 0.51 fails or panics on.
///
/// # Errors
/// [`MalformedHeaders`].
pub fn parse_headers(block: &[u8]) -> Result<HeaderMap, MalformedHeaders> {
    let text = std::str::from_utf8(block).map_err(|_| MalformedHeaders)?;
    let mut lines = text.lines().peekable();
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("NATS/1.0"))
        .ok_or(MalformedHeaders)?
        .trim();
    let code = status
        .split_once(' ')
        .map_or(status, |(code, _)| code.trim());
    if !code.is_empty() {
        code.parse::<async_nats::StatusCode>()
            .map_err(|_| MalformedHeaders)?;
    }
    let mut headers = HeaderMap::new();
    while let Some(line) = lines.next() {
        if line.is_empty() {
            continue;
        }
        let (name, value) = line.split_once(':').ok_or(MalformedHeaders)?;
        let name = HeaderName::from_str(name).map_err(|_| MalformedHeaders)?;
        let mut value = value.trim_start().to_owned();
        while let Some(folded) = lines.next_if(|line| line.starts_with(char::is_whitespace)) {
            value.push_str(folded);
        }
        let value = HeaderValue::from_str(value.trim_end()).map_err(|_| MalformedHeaders)?;
        headers.append(name, value);
    }
    Ok(headers)
}

/// The header block of parsed headers, as sent over the wire; empty without headers.
pub fn header_block(headers: Option<&HeaderMap>) -> Vec<u8> {
    let Some(headers) = headers.filter(|headers| !headers.is_empty()) else {
        return Vec::new();
    };
    let mut block = b"NATS/1.0\r\n".to_vec();
    for (name, values) in headers.iter() {
        let name: &str = name.as_ref();
        for value in values {
            block.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        }
    }
    block.extend_from_slice(b"\r\n");
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_formed_headers_are_parsed() {
        let headers = parse_headers(b"NATS/1.0\r\nNats-Msg-Id: a\r\nX:  b \r\n\r\n").unwrap();
        assert_eq!(
            headers.get("Nats-Msg-Id").map(HeaderValue::as_str),
            Some("a")
        );
        assert_eq!(headers.get("X").map(HeaderValue::as_str), Some("b"));
        assert_eq!(
            parse_headers(&header_block(Some(&headers))).unwrap(),
            headers
        );
        assert!(header_block(None).is_empty());
    }

    #[test]
    fn headers_that_would_break_a_connection_are_refused() {
        for block in [
            &b"NATS/1.0\r\nA: b\rc\r\n\r\n"[..],
            b"NATS/1.0\r\nA: \xff\r\n\r\n",
            b"NATS/1.0\r\nno colon\r\n\r\n",
            b"NATS/1.0\r\nA b: c\r\n\r\n",
            b"",
            b"X",
        ] {
            assert_eq!(
                parse_headers(block).unwrap_err(),
                MalformedHeaders,
                "{block:?}"
            );
        }
    }
}
