//! `chat.history.{room}`, `dm.history.{u}.{peer}`: one page of a conversation.

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

/// Which page: `{"limit"?: 1..500 (50), "before"?: seq, "after"?: seq, "around"?: seq}`, of two people also `"receipts"?: bool`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HistoryRequest {
    /// From the subject.
    pub conversation: Conversation,
    /// How many messages at most.
    pub limit: u32,
    /// From where, and in which direction.
    pub cursor: Cursor,
    /// Of two people: with the times when messages were delivered and read.
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
    /// Half of the page before this sequence, half from it on.
    Around(Seq),
}

impl HistoryRequest {
    fn read(conversation: Conversation, body: &[u8]) -> Result<HistoryRequest, Refusal> {
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
        HistoryRequest::read(Conversation::Room(Room::parse(names)?), body)
    }
}

impl ParseRequest for Direct<HistoryRequest> {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let (_, conversation) = user_and_peer(names, &endpoints::DM_HISTORY.template)?;
        let mut request = HistoryRequest::read(conversation, body)?;
        request.receipts = body::flag(&body::object(body, EXAMPLE)?, "receipts")?;
        Ok(Direct(request))
    }
}

/// One page, oldest first. On the wire the array is the body and the rest stands in headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Oldest first.
    pub messages: Vec<Message>,
    /// More in the direction asked for; around a sequence: on either side.
    pub more: bool,
    /// The page holds everything of its room up to here, in the range asked for.
    pub through: Seq,
    /// Where the messages came from.
    pub source: Source,
}

/// Where a page came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// PostgreSQL had everything.
    Index,
    /// PostgreSQL did not answer: what the log still holds.
    Log,
    /// PostgreSQL and the part of the log it has not stored yet.
    Both,
}

impl Source {
    /// The value of the header.
    pub const fn as_str(self) -> &'static str {
        match self {
            Source::Index => "index",
            Source::Log => "log",
            Source::Both => "both",
        }
    }

    /// From the value of the header.
    pub fn parse(value: &str) -> Option<Source> {
        [Source::Index, Source::Log, Source::Both]
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
    fn receipts_are_asked_for_between_two_people() {
        let direct = |body: &str| {
            Direct::<HistoryRequest>::parse("ann.bob", body.as_bytes())
                .map(|Direct(ask)| ask.receipts)
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
    fn a_refusal_says_what_to_mend() {
        for (body, mend) in [
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
            assert!(refusal.reason.contains(mend), "{body}: {}", refusal.reason);
        }
    }
}
