//! `chat.sync.{room}`, `dm.sync.{user}.{peer}`: what happened after a cursor.

use serde::{Deserialize, Serialize};

use crate::body;
use crate::change::ChangeEntry;
use crate::conversation::{Conversation, Direct, user_and_peer};
use crate::endpoints;
use crate::message::Message;
use crate::name::Room;
use base::endpoint::ParseRequest;
use base::error::Refusal;
use base::seq::Seq;

const DEFAULT_PAGE: u32 = 50;
const EXAMPLE: &str = r#"{"after":1234,"limit":50}"#;

/// `{"after": seq, "limit"?: 1..500 (50)}`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SyncRequest {
    /// From the subject.
    pub conversation: Conversation,
    /// The client has everything up to here.
    pub after: Seq,
    /// The most messages and changes together.
    pub limit: u32,
}

impl SyncRequest {
    fn from_body(conversation: Conversation, body: &[u8]) -> Result<SyncRequest, Refusal> {
        let body = body::object(body, EXAMPLE)?;
        let limit = body::limit(&body, DEFAULT_PAGE)?;
        let after = body::sequence(&body, "after")?.ok_or_else(|| {
            Refusal::bad_request(
                "after is missing: the through of the page before, or 0 for everything",
            )
        })?;
        Ok(SyncRequest {
            conversation,
            after,
            limit,
        })
    }
}

impl ParseRequest for SyncRequest {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        SyncRequest::from_body(Conversation::Room(Room::parse(names)?), body)
    }
}

impl ParseRequest for Direct<SyncRequest> {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let (_, conversation) = user_and_peer(names, &endpoints::DM_SYNC.template)?;
        SyncRequest::from_body(conversation, body).map(Direct)
    }
}

/// What happened after the cursor: new messages and changes, each sorted by `seq`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncPage {
    /// Messages after the cursor, as they are now: those deleted since are tombstones.
    pub messages: Vec<Message>,
    /// Changes after the cursor, to any message.
    pub changes: Vec<ChangeEntry>,
    /// The page contains everything up to here: the next cursor.
    pub through: Seq,
    /// There is more after `through`: ask again.
    pub more: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_needed() {
        let parse = |body: &str| SyncRequest::parse("general", body.as_bytes());
        let request = parse(r#"{"after":7,"unknown":1}"#).unwrap();
        assert_eq!(
            (request.after, request.limit, request.conversation.name()),
            (Seq::new(7).unwrap(), 50, "general".to_owned())
        );
        for (body, hint) in [
            ("", "after is missing"),
            ("{}", "after is missing"),
            (r#"{"after":null}"#, "after is missing"),
            (r#"{"after":-1}"#, "after must be"),
            (r#"{"after":"7"}"#, "after must be"),
            (r#"{"after":1.5}"#, "after must be"),
            (r#"{"after":9223372036854775808}"#, "after must be"),
            (r#"{"after":7,"limit":0}"#, "limit must be"),
            (r#"{"after":7,"limit":501}"#, "limit must be"),
            (r#"{"after":7,"limit":"5"}"#, "limit must be"),
            ("[7]", "a JSON object"),
            ("seven", "a JSON object"),
        ] {
            let refusal = parse(body).unwrap_err();
            assert_eq!(refusal.code.number(), 400, "{body}");
            assert!(refusal.reason.contains(hint), "{body}: {}", refusal.reason);
        }
    }

    #[test]
    fn the_name_of_a_room_never_means_a_conversation() {
        for names in ["ann.bob", "dm.ann.bob", "", "*", ">", "a b"] {
            assert!(
                SyncRequest::parse(names, br#"{"after":0}"#).is_err(),
                "{names}"
            );
        }
        let Direct(request) = Direct::<SyncRequest>::parse("bob.ann", br#"{"after":0}"#).unwrap();
        assert_eq!(request.conversation.name(), "dm.ann.bob");
        for names in [
            "ann",
            "ann.",
            ".bob",
            "ann.bob.carol",
            "ann.*",
            "ann.>",
            "ann.b c",
        ] {
            assert!(
                Direct::<SyncRequest>::parse(names, br#"{"after":0}"#).is_err(),
                "{names}"
            );
        }
    }
}
