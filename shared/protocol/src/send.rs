//! `chat.send.{u}.{room}`, `dm.send.{u}.{peer}`: one message, acknowledged when the log has it.

use serde::{Deserialize, Serialize};

use crate::endpoints;
use crate::message::{Keys, MAX_ID_BYTES, Scalar};
use crate::name::{Room, User, split_names};
use crate::reason::Reason;
use base::endpoint::ParseRequest;
use base::error::Refusal;
use base::seq::Seq;

/// One message to a [`Room`] or to another [`User`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendRequest<To> {
    /// Who sends: the subject says so, and permissions pin that token. What the body says is not looked at.
    pub user: User,
    /// Where to, from the subject.
    pub to: To,
    /// What the body says.
    pub draft: Draft,
}

/// The body of a [`SendRequest`]: `{"text", "id"?, "timestamp"?}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// The text: no U+0000; its length is the function's to check.
    pub text: String,
    /// The sender's id: 1 to [`MAX_ID_BYTES`] bytes, no U+0000.
    pub id: Option<String>,
    /// Unix milliseconds, as the client says.
    pub timestamp: Option<i64>,
}

impl ParseRequest for SendRequest<Room> {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let (user, room) = split_names(names, &endpoints::SEND.template)?;
        let (user, to) = (User::parse(user)?, Room::parse(room)?);
        if to.as_str() == Room::ADMIN {
            return Err(Refusal::forbidden(
                "the room __admin__ takes messages from trusted publishers only",
            ));
        }
        Ok(SendRequest {
            user,
            to,
            draft: Draft::parse(body)?,
        })
    }
}

impl ParseRequest for SendRequest<User> {
    fn parse(names: &str, body: &[u8]) -> Result<Self, Refusal> {
        let (user, peer) = split_names(names, &endpoints::DM_SEND.template)?;
        Ok(SendRequest {
            user: User::parse(user)?,
            to: User::parse(peer)?,
            draft: Draft::parse(body)?,
        })
    }
}

impl Draft {
    fn parse(body: &[u8]) -> Result<Draft, Refusal> {
        let keys = Keys::read(body).map_err(refusal)?;
        let text = match keys.text {
            Some(Scalar::Text(text)) if text.contains('\0') => {
                return Err(Refusal::bad_request(
                    "text must not hold U+0000: the database cannot store it",
                ));
            }
            Some(Scalar::Text(text)) => text,
            None | Some(Scalar::Null) => return Err(Refusal::bad_request("text is missing")),
            Some(_) => return Err(Refusal::bad_request("text must be a string")),
        };
        let id = match keys.id {
            None | Some(Scalar::Null) => None,
            Some(Scalar::Text(id))
                if !id.is_empty() && id.len() <= MAX_ID_BYTES && !id.contains('\0') =>
            {
                Some(id)
            }
            Some(_) => {
                let rule = format!(
                    "id must be a string of 1 to {MAX_ID_BYTES} bytes without U+0000; leave it out and one is made"
                );
                return Err(Refusal::bad_request(rule));
            }
        };
        let timestamp = match keys.timestamp {
            None | Some(Scalar::Null) => None,
            Some(Scalar::Whole(ms)) => Some(ms),
            Some(_) => {
                return Err(Refusal::bad_request(
                    "timestamp must be a number of Unix milliseconds, or be left out",
                ));
            }
        };
        Ok(Draft {
            text,
            id,
            timestamp,
        })
    }
}

/// What is wrong with the body as a whole.
fn refusal(reason: Reason) -> Refusal {
    Refusal::bad_request(match reason {
        Reason::DuplicateKey => "a field of the body stands there twice",
        Reason::TooDeep => "the body is nested too deeply",
        Reason::LoneSurrogate => "the body holds half of a surrogate pair, which is no character",
        Reason::NumberOutOfRange => "the body holds a number that is out of range",
        Reason::InvalidUtf8 => "the body must be UTF-8",
        _ => r#"the body must be a JSON object such as {"text":"hello","id":"a-1"}"#,
    })
}

/// The log has the message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "ack", tag = "type", rename_all = "camelCase")]
pub struct SendAck {
    /// The id given, or the one that was made.
    pub message_id: String,
    /// Its place in the one order; of a resend, where the message stands already.
    pub seq: Seq,
    /// How far it came.
    pub status: SentStatus,
    /// The log had it before.
    pub duplicate: bool,
}

/// How far a message that was just sent has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SentStatus {
    /// In the log.
    Sent,
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::error::Code;

    fn room(names: &str, body: &str) -> Result<SendRequest<Room>, Refusal> {
        SendRequest::<Room>::parse(names, body.as_bytes())
    }

    #[test]
    fn the_subject_names_the_sender() {
        let ask = room(
            "ann.general",
            r#"{"text":"hi","user":"mallory","id":"a","timestamp":5,"room":7,"more":[1]}"#,
        )
        .unwrap();
        assert_eq!((ask.user.as_str(), ask.to.as_str()), ("ann", "general"));
        assert_eq!(
            ask.draft,
            Draft {
                text: "hi".to_owned(),
                id: Some("a".to_owned()),
                timestamp: Some(5)
            }
        );
        let ask =
            SendRequest::<User>::parse("ann.bob", br#"{"text":"","id":null,"timestamp":null}"#)
                .unwrap();
        assert_eq!(
            (ask.to.as_str(), ask.draft.id, ask.draft.timestamp),
            ("bob", None, None)
        );
    }

    #[test]
    fn a_wrong_name_is_refused() {
        for names in [
            "",
            "ann",
            "ann.",
            ".general",
            "ann.general.x",
            "a b.general",
            "ann.*",
            ">.general",
        ] {
            assert_eq!(
                room(names, r#"{"text":"x"}"#).unwrap_err().code,
                Code::BadRequest,
                "{names}"
            );
            assert_eq!(
                SendRequest::<User>::parse(names, br#"{"text":"x"}"#)
                    .unwrap_err()
                    .code,
                Code::BadRequest,
                "{names}"
            );
        }
        assert_eq!(
            room("ann.__admin__", r#"{"text":"x"}"#).unwrap_err().code,
            Code::Forbidden
        );
    }

    #[test]
    fn a_wrong_body_is_told_what_to_mend() {
        let (at_the_limit, too_long) = (
            format!(r#"{{"text":"","id":"{}"}}"#, "i".repeat(128)),
            format!(r#"{{"text":"","id":"{}"}}"#, "i".repeat(129)),
        );
        room("ann.general", &at_the_limit).unwrap();
        for (body, mend) in [
            ("", "a JSON object"),
            ("hello", "a JSON object"),
            (r#"["text"]"#, "a JSON object"),
            ("{}", "text is missing"),
            (r#"{"text":null}"#, "text is missing"),
            (r#"{"text":5}"#, "text must be a string"),
            (r#"{"text":{}}"#, "text must be a string"),
            (r#"{"text":"a\u0000b"}"#, "U+0000"),
            (r#"{"text":"a","text":"b"}"#, "twice"),
            (r#"{"text":"\ud800"}"#, "surrogate"),
            (r#"{"text":"a","id":""}"#, "id must be"),
            (r#"{"text":"a","id":7}"#, "id must be"),
            (r#"{"text":"a","id":"\u0000"}"#, "id must be"),
            (&too_long, "id must be"),
            (r#"{"text":"a","timestamp":"now"}"#, "timestamp must be"),
            (r#"{"text":"a","timestamp":true}"#, "timestamp must be"),
            (
                r#"{"text":"a","timestamp":99999999999999999999}"#,
                "timestamp must be",
            ),
            (r#"{"text":"a","timestamp":1e999}"#, "out of range"),
        ] {
            let refusal = room("ann.general", body).unwrap_err();
            assert_eq!(refusal.code, Code::BadRequest, "{body}");
            assert!(refusal.reason.contains(mend), "{body}: {}", refusal.reason);
        }
        assert!(
            SendRequest::<Room>::parse("ann.general", b"{\"text\":\"\xff\"}")
                .unwrap_err()
                .reason
                .contains("UTF-8")
        );
    }

    #[test]
    fn an_acknowledgement_reads_as_the_contract_says() {
        let ack = SendAck {
            message_id: "a".to_owned(),
            seq: Seq::ZERO.next(),
            status: SentStatus::Sent,
            duplicate: false,
        };
        let text = r#"{"type":"ack","messageId":"a","seq":1,"status":"sent","duplicate":false}"#;
        assert_eq!(serde_json::to_string(&ack).unwrap(), text);
        assert_eq!(serde_json::from_str::<SendAck>(text).unwrap(), ack);
    }
}
