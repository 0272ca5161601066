//! `chat.history.{room}`, `dm.history.{user}.{peer}`: one page of a conversation.

use crate::body;
use crate::conversation::{Conversation, Direct, user_and_peer};
use crate::endpoints;
use crate::message::Message;
use crate::name::Room;
use base::endpoint::ParseRequest;
use base::error::Refusal;
use base::seq::Seq;

const DEFAULT_PAGE: u32 = 50;
const EXAMPLE: &str = r#"{"limit":50,"before":1234}, or empty"#;

/// `{"limit"?: 1..500 (50), "before"?: seq, "after"?: seq, "around"?: seq}`, for direct messages
/// also `"receipts"?: bool`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HistoryRequest {
    /// From the subject.
    pub conversation: Conversation,
    /// The most messages on the page.
    pub limit: u32,
    /// Where the page starts, and in which direction it goes.
    pub cursor: Cursor,
    /// Direct messages only: with the times when messages were delivered and read.
    pub receipts: bool,
}

/// Where a page starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cursor {
    /// The newest messages.
    Latest,
    /// The newest messages before this sequence.
    Before(Seq),
    /// The oldest messages after this sequence.
    After(Seq),
    /// One half of the page before this sequence, the other from it on.
    Around(Seq),
}

impl HistoryRequest {
    fn from_body(conversation: Conversation, body: &[u8]) -> Result<HistoryRequest, Refusal> {
        let body = body::object(body, EXAMPLE)?;
        let limit = body::limit(&body, DEFAULT_PAGE)?;
        let mut cursor = Cursor::Latest;
        for (key, make) in [
            ("before", Cursor::Before as fn(Seq) -> Cursor),
            ("after", Cursor::After),
            ("around", Cursor::Around),
        ] {
            let Some(seq) = body::sequence(&body, key)? else {
                continue;
            };
            if cursor != Cursor::Latest {
                return Err(Refusal::bad_request(
                    "give at most one of before, after and around",
                ));
            }
            cursor = make(seq);
        }
        Ok(HistoryRequest {
            conversation,
            limit,
            cursor,
            receipts: false,
        })
    }
}

impl ParseRequest for HistoryRequest {
    fn parse(names: &str, body: &[u8]) -> Result<HistoryRequest, Refusal> {
        HistoryRequest::from_body(Conversation::Room(Room::parse(names)?), body)
    }
}

impl ParseRequest for Direct<HistoryRequest> {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let (_, conversation) = user_and_peer(names, &endpoints::DM_HISTORY.template)?;
        let mut request = HistoryRequest::from_body(conversation, body)?;
        request.receipts = body::flag(&body::object(body, EXAMPLE)?, "receipts")?;
        Ok(Direct(request))
    }
}

/// One page. On the wire the body is the array of messages; the rest is in headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Oldest first.
    pub messages: Vec<Message>,
    /// There are more messages in the direction of the page; around a sequence, on either side.
    pub more: bool,
    /// Within the range asked for, the page contains every message of the room up to here.
    pub through: Seq,
    /// Where the messages came from.
    pub source: Source,
}

/// Where the messages of a page came from. The names on the wire are older words for PostgreSQL
/// (`index`) and the stream (`log`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// PostgreSQL had all of them.
    Projection,
    /// PostgreSQL did not answer; the page has what the stream still holds.
    Stream,
    /// PostgreSQL, and the part of the stream that is not stored yet.
    Both,
}

impl Source {
    /// The value of the header.
    pub const fn as_str(self) -> &'static str {
        match self {
            Source::Projection => "index",
            Source::Stream => "log",
            Source::Both => "both",
        }
    }

    /// From the value of the header.
    pub fn parse(value: &str) -> Option<Source> {
        [Source::Projection, Source::Stream, Source::Both]
            .into_iter()
            .find(|source| source.as_str() == value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<HistoryRequest, Refusal> {
        HistoryRequest::parse("general", body.as_bytes())
    }

    #[test]
    fn an_empty_body_asks_for_the_newest_fifty() {
        for body in ["", "{}", r#"{"limit":null,"unknown":[1,2]}"#] {
            let request = parse(body).unwrap();
            assert_eq!(
                (request.limit, request.cursor),
                (50, Cursor::Latest),
                "{body}"
            );
        }
    }

    #[test]
    fn one_cursor_at_most() {
        assert_eq!(
            parse(r#"{"before":7}"#).unwrap().cursor,
            Cursor::Before(Seq::new(7).unwrap())
        );
        assert_eq!(
            parse(r#"{"after":0}"#).unwrap().cursor,
            Cursor::After(Seq::ZERO)
        );
        assert_eq!(
            parse(r#"{"around":7}"#).unwrap().cursor,
            Cursor::Around(Seq::new(7).unwrap())
        );
        assert!(
            parse(r#"{"before":1,"after":2}"#)
                .unwrap_err()
                .reason
                .contains("at most one")
        );
    }

    #[test]
    fn receipts_belong_to_direct_messages_only() {
        let direct = |body: &str| {
            Direct::<HistoryRequest>::parse("ann.bob", body.as_bytes())
                .map(|Direct(request)| request.receipts)
        };
        assert_eq!(
            (
                direct(r#"{"receipts":true}"#),
                direct(r#"{"receipts":null}"#),
                direct("")
            ),
            (Ok(true), Ok(false), Ok(false))
        );
        assert!(
            direct(r#"{"receipts":1}"#)
                .unwrap_err()
                .reason
                .contains("receipts must be")
        );
        assert!(!parse(r#"{"receipts":true}"#).unwrap().receipts);
    }

    #[test]
    fn a_refusal_says_what_to_correct() {
        for (body, hint) in [
            (r#"{"limit":0}"#, "limit must be"),
            (r#"{"limit":-1}"#, "limit must be"),
            (r#"{"limit":1000000000}"#, "limit must be"),
            (r#"{"limit":"x"}"#, "limit must be"),
            (r#"{"limit":1.5}"#, "limit must be"),
            (r#"{"before":9223372036854775808}"#, "before must be"),
            (r#"{"after":-1}"#, "after must be"),
            (r#"{"around":"7"}"#, "around must be"),
            ("not json", "JSON object"),
            ("[50]", "JSON object"),
            ("50", "JSON object"),
        ] {
            let refusal = parse(body).unwrap_err();
            assert_eq!(refusal.code.number(), 400, "{body}");
            assert!(refusal.reason.contains(hint), "{body}: {}", refusal.reason);
        }
    }
}
