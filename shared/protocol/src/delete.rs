//! `chat.delete.{user}.{room}`, `dm.delete.{user}.{peer}`: the text goes, a tombstone stays.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::body;
use crate::change::Mode;
use crate::conversation::{Conversation, Direct, user_and_peer, user_and_room};
use crate::endpoints;
use crate::message::MAX_ID_BYTES;
use crate::name::User;
use base::endpoint::ParseRequest;
use base::error::Refusal;
use base::seq::Seq;

const EXAMPLE: &str = r#"{"seq":1234} or {"id":"a-1","mode":"hard"}"#;

/// `{"seq"|"id", "mode"?: "soft"|"hard"}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeleteRequest {
    /// Who asks, from the subject.
    pub user: User,
    /// The message's conversation, from the subject.
    pub conversation: Conversation,
    /// Which message.
    pub key: MessageKey,
    /// Soft by default.
    pub mode: Mode,
}

/// How a request identifies a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MessageKey {
    /// By its position.
    Seq(Seq),
    /// By its id. Messages of the user who asks come before those of others with the same id.
    Id(String),
}

impl DeleteRequest {
    fn from_body(
        (user, conversation): (User, Conversation),
        body: &[u8],
    ) -> Result<DeleteRequest, Refusal> {
        let body = body::object(body, EXAMPLE)?;
        let id = match body.get("id") {
            None | Some(Value::Null) => None,
            Some(Value::String(id))
                if (1..=MAX_ID_BYTES).contains(&id.len()) && !id.contains('\0') =>
            {
                Some(id.clone())
            }
            Some(_) => {
                return Err(Refusal::bad_request(format!(
                    "id must be a string of 1 to {MAX_ID_BYTES} bytes without U+0000"
                )));
            }
        };
        let key = match (body::sequence(&body, "seq")?, id) {
            (Some(Seq::ZERO), None) => {
                return Err(Refusal::bad_request("seq must be a message's: at least 1"));
            }
            (Some(seq), None) => MessageKey::Seq(seq),
            (None, Some(id)) => MessageKey::Id(id),
            (None, None) => {
                return Err(Refusal::bad_request("seq or id of the message is missing"));
            }
            (Some(_), Some(_)) => return Err(Refusal::bad_request("give either seq or id")),
        };
        let mode = match body.get("mode") {
            None | Some(Value::Null) => Mode::Soft,
            Some(mode) => mode.as_str().and_then(Mode::parse).ok_or_else(|| {
                Refusal::bad_request(r#"mode must be "soft" or "hard"; without it, soft"#)
            })?,
        };
        Ok(DeleteRequest {
            user,
            conversation,
            key,
            mode,
        })
    }
}

impl ParseRequest for DeleteRequest {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        DeleteRequest::from_body(user_and_room(names, &endpoints::DELETE.template)?, body)
    }
}

impl ParseRequest for Direct<DeleteRequest> {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        DeleteRequest::from_body(user_and_peer(names, &endpoints::DM_DELETE.template)?, body)
            .map(Direct)
    }
}

/// The message is deleted for everybody who reads from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// The message's position, which is now that of its tombstone.
    pub seq: Seq,
    /// `deleted`.
    pub status: DeletedStatus,
}

/// What became of the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeletedStatus {
    /// It is deleted.
    Deleted,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_identified_one_way() {
        let parse = |body: &str| DeleteRequest::parse("ann.general", body.as_bytes());
        let request = parse(r#"{"seq":7,"user":"mallory","text":[]}"#).unwrap();
        assert_eq!(
            (request.user.as_str(), request.key, request.mode),
            ("ann", MessageKey::Seq(Seq::new(7).unwrap()), Mode::Soft)
        );
        let request = parse(r#"{"id":"a","seq":null,"mode":"hard"}"#).unwrap();
        assert_eq!(
            (request.key, request.mode),
            (MessageKey::Id("a".to_owned()), Mode::Hard)
        );
        let long = format!(r#"{{"id":"{}"}}"#, "i".repeat(129));
        for (body, hint) in [
            ("", "is missing"),
            ("{}", "is missing"),
            (r#"{"seq":7,"id":"a"}"#, "either"),
            (r#"{"seq":0}"#, "at least 1"),
            (r#"{"seq":-1}"#, "seq must be"),
            (r#"{"seq":"7"}"#, "seq must be"),
            (r#"{"seq":1e99}"#, "seq must be"),
            (r#"{"id":""}"#, "id must be"),
            (r#"{"id":7}"#, "id must be"),
            (r#"{"id":"a\u0000"}"#, "id must be"),
            (&long, "id must be"),
            (r#"{"seq":7,"mode":"HARD"}"#, "mode must be"),
            (r#"{"seq":7,"mode":1}"#, "mode must be"),
            ("[7]", "a JSON object"),
            ("\u{0}", "a JSON object"),
        ] {
            let refusal = parse(body).unwrap_err();
            assert_eq!(refusal.code.number(), 400, "{body}");
            assert!(refusal.reason.contains(hint), "{body}: {}", refusal.reason);
        }
    }

    #[test]
    fn a_wrong_name_is_refused() {
        for names in [
            "",
            "ann",
            "ann.",
            ".general",
            "ann.a.b",
            "a b.general",
            "ann.*",
            ">.general",
        ] {
            assert!(
                DeleteRequest::parse(names, br#"{"seq":7}"#).is_err(),
                "{names}"
            );
            assert!(
                Direct::<DeleteRequest>::parse(names, br#"{"seq":7}"#).is_err(),
                "{names}"
            );
        }
    }
}
