//! Encodes a page, no larger than the server accepts.

use base::error::{Code, Error, Result};
use protocol::header;
use protocol::history::{Cursor, Page};
use protocol::message::Message;
use service::request::Reply;

/// The part of `max_payload` that is left for the reply's headers.
const HEADER_ROOM: usize = 2 * 1024;

/// Encodes the page. Where it would exceed `max_payload` bytes, it ends early: the messages nearest
/// to the cursor stay.
///
/// # Errors
/// 413 when a single message is larger than a reply may be.
pub fn encode(mut page: Page, cursor: Cursor, max_payload: usize) -> Result<Reply<Page>> {
    let limit = max_payload.saturating_sub(HEADER_ROOM);
    let encoded: Vec<Vec<u8>> = page
        .messages
        .iter()
        .map(serde_json::to_vec)
        .collect::<Result<_, _>>()
        .map_err(Error::internal)?;
    let kept = fitting(&page.messages, &encoded, cursor, limit);
    if kept.len() < encoded.len() {
        page.more = true;
        if kept.is_empty() {
            return Err(Error::new(
                Code::TooLarge,
                "a message here is larger than the server's max_payload lets a reply be; \
                 ask beyond it with before or after",
            ));
        }
        // When messages after the last one were left out, the page is complete only up to there.
        if kept.end < encoded.len()
            && let Some(last) = page.messages.get(kept.end - 1)
        {
            page.through = last.seq;
        }
    }
    let mut body = Vec::with_capacity(
        encoded[kept.clone()]
            .iter()
            .map(|one| one.len() + 1)
            .sum::<usize>()
            + 2,
    );
    body.push(b'[');
    for (number, one) in encoded[kept].iter().enumerate() {
        if number > 0 {
            body.push(b',');
        }
        body.extend_from_slice(one);
    }
    body.push(b']');
    let headers = vec![
        (header::MORE, page.more.to_string()),
        (header::THROUGH, page.through.to_string()),
        (header::SOURCE, page.source.as_str().to_owned()),
    ];
    Ok(Reply::encoded(body.into(), headers))
}

/// The messages next to the cursor that fit into `limit` bytes.
fn fitting(
    messages: &[Message],
    encoded: &[Vec<u8>],
    cursor: Cursor,
    limit: usize,
) -> std::ops::Range<usize> {
    let split = match cursor {
        Cursor::Latest | Cursor::Before(_) => messages.len(),
        Cursor::After(_) => 0,
        Cursor::Around(seq) => messages.partition_point(|message| message.seq < seq),
    };
    let mut from = split;
    let mut to = split;
    // The two brackets.
    let mut bytes = 2;
    loop {
        let mut grown = false;
        if to < encoded.len() && bytes + encoded[to].len() < limit {
            bytes += encoded[to].len() + 1;
            to += 1;
            grown = true;
        }
        if from > 0 && bytes + encoded[from - 1].len() < limit {
            bytes += encoded[from - 1].len() + 1;
            from -= 1;
            grown = true;
        }
        if !grown {
            return from..to;
        }
    }
}
