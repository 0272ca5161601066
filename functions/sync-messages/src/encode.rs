//! Encodes a page: no more entries than asked for, no larger than the server accepts.

use serde::Serialize;

use crate::page::Found;
use base::error::{Code, Error, Result};
use base::seq::Seq;
use protocol::header;
use protocol::sync::SyncPage;
use service::request::Reply;

/// The part of `max_payload` that is left for the fields around the lists and the reply's headers.
const ENVELOPE: usize = 2 * 1024;

/// An entry of the page, as long as it may still be cut.
#[derive(Clone, Copy)]
struct Entry {
    seq: Seq,
    bytes: usize,
}

/// Encodes the page. It ends after `limit` entries, in the order of their `seq`, and earlier where
/// it would exceed `max_payload` bytes.
///
/// # Errors
/// 413 when a single message is larger than a reply may be.
pub fn encode(mut found: Found, limit: usize, max_payload: usize) -> Result<Reply<SyncPage>> {
    let mut entries = found
        .messages
        .iter()
        .map(|message| entry(message.seq, message))
        .collect::<Result<Vec<Entry>>>()?;
    entries.extend(
        found
            .changes
            .iter()
            .map(|change| entry(change.seq, change))
            .collect::<Result<Vec<Entry>>>()?,
    );
    entries.sort_by_key(|entry| entry.seq);
    let mut fitting = 0;
    let mut bytes = ENVELOPE;
    for entry in entries.iter().take(limit) {
        bytes += entry.bytes + 1;
        if bytes > max_payload {
            break;
        }
        fitting += 1;
    }
    if fitting < entries.len() {
        let Some(last) = entries[..fitting].last() else {
            return Err(Error::new(
                Code::TooLarge,
                "the next message is larger than the server's max_payload lets a reply be; \
                 go on after its seq, which history shows",
            ));
        };
        found.through = last.seq;
        found.more = true;
        found.messages.retain(|message| message.seq <= last.seq);
        found.changes.retain(|change| change.seq <= last.seq);
    }
    let source = (header::SOURCE, found.source.as_str().to_owned());
    let page = SyncPage {
        messages: found.messages,
        changes: found.changes,
        through: found.through,
        more: found.more,
    };
    Ok(Reply::encoded(
        serde_json::to_vec(&page).map_err(Error::internal)?.into(),
        vec![source],
    ))
}

fn entry(seq: Seq, one: &impl Serialize) -> Result<Entry> {
    Ok(Entry {
        seq,
        bytes: serde_json::to_vec(one).map_err(Error::internal)?.len(),
    })
}
