//! A page as bytes, no larger than the server takes.

use base::error::{Code, Error, Result};
use protocol::header;
use protocol::history::{Cursor, Page};
use protocol::message::Message;
use service::request::Reply;

/// What the reply's headers and the protocol may take of `max_payload`.
const HEADER_ROOM: usize = 2 * 1024;

/// Writes the page; ends it early, away from the cursor, where it would exceed `max_payload` bytes.
///
/// # Errors
/// 413 when a single message is larger than a reply may be.
pub fn encode(mut page: Page, cursor: Cursor, max_payload: usize) -> Result<Reply<Page>> {
    let room = max_payload.saturating_sub(HEADER_ROOM);
    let written: Vec<Vec<u8>> = page
        .messages
        .iter()
        .map(serde_json::to_vec)
        .collect::<Result<_, _>>()
        .map_err(Error::internal)?;
    let kept = fitting(&page.messages, &written, cursor, room);
    if kept.len() < written.len() {
        page.more = true;
        if kept.is_empty() {
            let reason = "a message here is larger than the server's max_payload lets a reply be; ask beyond it with before or after";
            return Err(Error::new(Code::TooLarge, reason));
        }
        // Reading forward, what was left out lies ahead: the page is complete only up to its last message.
        if kept.end < written.len()
            && let Some(last) = page.messages.get(kept.end - 1)
        {
            page.through = last.seq;
        }
    }
    let mut body = Vec::with_capacity(
        written[kept.clone()]
            .iter()
            .map(|one| one.len() + 1)
            .sum::<usize>()
            + 2,
    );
    body.push(b'[');
    for (number, one) in written[kept].iter().enumerate() {
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

/// The stretch of messages next to the cursor that fits into `room` bytes.
fn fitting(
    messages: &[Message],
    written: &[Vec<u8>],
    cursor: Cursor,
    room: usize,
) -> std::ops::Range<usize> {
    let split = match cursor {
        Cursor::Latest | Cursor::Before(_) => messages.len(),
        Cursor::After(_) => 0,
        Cursor::Around(seq) => messages.partition_point(|message| message.seq < seq),
    };
    let (mut from, mut to, mut bytes) = (split, split, 2);
    loop {
        let mut grown = false;
        if to < written.len() && bytes + written[to].len() < room {
            bytes += written[to].len() + 1;
            to += 1;
            grown = true;
        }
        if from > 0 && bytes + written[from - 1].len() < room {
            bytes += written[from - 1].len() + 1;
            from -= 1;
            grown = true;
        }
        if !grown {
            return from..to;
        }
    }
}
